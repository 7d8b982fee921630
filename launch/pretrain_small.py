"""Trains a small GPT (or hybrid model) with Megatron's own training loop, on numbers that count upwards.

A script as a Megatron user writes one; it knows nothing of plans. ``make demo`` runs it, and so may you:

    torchrun --nproc-per-node 2 launch/pretrain_small.py MEGATRON-ARGS --galvatron-auto --galvatron-device cpu

The data needs no file: every sample counts upwards from a random start by a random step, modulo the vocabulary,
so that the loss falls within a few iterations. Needs megatron-core 0.19.
"""

from collections.abc import Iterator
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args


class CountingSamples(torch.utils.data.Dataset):
    """Samples that count upwards; sample i is the same on every rank and in every run.

    Args:
        count: number of samples.
        seq_length: tokens of a sample.
        vocab_size: tokens are below it.
    """

    def __init__(self, count: int, seq_length: int, vocab_size: int) -> None:
        self._count = count
        self._seq_length = seq_length
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        start, step = torch.randint(1, 8, (2,), generator=generator).tolist()
        numbers = (start + step * torch.arange(self._seq_length + 1)) % self._vocab_size
        return {"tokens": numbers[:-1], "labels": numbers[1:]}


def datasets(sizes: list[int], vp_stage: int | None = None) -> tuple[CountingSamples, None, None]:
    """Training data; no validation, no test."""
    args = get_args()
    return CountingSamples(sizes[0] or 1, args.seq_length, args.vocab_size), None, None


datasets.is_distributed = True  # Every rank makes its own samples: nothing has to be sent.


def loss_function(
    mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the losses of all tokens, their number, and both for the log."""
    losses = output.view(-1).float()
    loss = torch.sum(losses * mask.view(-1))
    tokens = mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.float().view(1)])}


def forward_step(samples: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple:
    """One micro-batch through the model's stage on this rank."""
    batch = next(samples)
    tokens, labels = batch["tokens"].cuda(), batch["labels"].cuda()
    count, length = tokens.shape
    positions = torch.arange(length, device="cuda").expand(count, -1)
    allowed = torch.tril(torch.ones((1, 1, length, length), device="cuda"))
    mask = torch.ones((count, length), device="cuda")
    output = model(tokens, positions, allowed < 0.5, labels=labels)
    return output, partial(loss_function, mask)


def embedding_ranks(pipeline_ranks: list[int]) -> list[int]:
    """Pipeline ranks that hold the word embedding: the first, and the last where it is tied to the output."""
    ends = (
        {pipeline_ranks[0]}
        if get_args().untie_embeddings_and_output_weights
        else {
            pipeline_ranks[0],
            pipeline_ranks[-1],
        }
    )
    return sorted(ends)


def main() -> None:
    """Runs the job."""
    args = parse_and_validate_args()
    describe = hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args
    pretrain(
        pretrain_cfg_container_from_args(args, describe(args)),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=embedding_ranks,
    )
    if mpu.model_parallel_is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
