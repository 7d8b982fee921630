"""Small Megatron command lines that between them have every layer kind a trace can run."""

from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy

_COMMON = (
    "--num-layers 2 --hidden-size 256 --num-attention-heads 8 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 1 --vocab-size 1000 --bf16 --mock-data --tokenizer-type NullTokenizer --train-iters 1 "
    "--lr 1e-4 "
)
_LLAMA = (
    "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear --hidden-dropout 0 "
    "--attention-dropout 0 "
)
_EXPERTS = (
    "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 128 --moe-router-load-balancing-type none "
    "--moe-token-dispatcher-type alltoall "
)

CASES = {
    "gpt": _COMMON,
    "grouped": _COMMON
    + _LLAMA
    + "--group-query-attention --num-query-groups 4 --qk-layernorm --kv-channels 48",
    "experts": _COMMON
    + _LLAMA
    + _EXPERTS.replace("alltoall", "flex")
    + "--moe-shared-expert-intermediate-size 192 --moe-layer-freq ([0]+[1]) "
    + "--untie-embeddings-and-output-weights",
    "latent": _COMMON
    + _LLAMA
    + "--multi-latent-attention --kv-lora-rank 64 --q-lora-rank 96 --qk-head-dim 32 --qk-pos-emb-head-dim 16 "
    + "--v-head-dim 32 --qk-layernorm",
    "hybrid": _COMMON.replace("--num-layers 2 ", "") + _LLAMA + _EXPERTS + "--hybrid-layer-pattern M*-E "
    "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec",
    "unfused": _COMMON + "--group-query-attention --num-query-groups 2 --transformer-impl local",
}

MEGATRON = SequenceParallel.MEGATRON
STRATEGIES = (
    Strategy(),
    Strategy(recompute=Recompute.SELECTIVE),
    Strategy(tp=2),
    Strategy(tp=2, sequence_parallel=MEGATRON),
    Strategy(tp=2, sequence_parallel=MEGATRON, recompute=Recompute.FULL),
    Strategy(tp=2, sequence_parallel=MEGATRON, recompute=Recompute.SELECTIVE),
    Strategy(tp=4, sequence_parallel=MEGATRON),
)


EXPERT_STRATEGIES = (
    Strategy(dp=4, expert_parallel=4),
    Strategy(tp=2, sequence_parallel=MEGATRON, expert_parallel=2, expert_tensor_parallel=1),
    Strategy(tp=2, dp=2, sequence_parallel=MEGATRON, expert_parallel=2),
    Strategy(tp=2, dp=2, sequence_parallel=MEGATRON, expert_parallel=2, recompute=Recompute.FULL),
)
"""How layers with experts run beside those."""


def argv(case: str) -> list[str]:
    return CASES[case].split()
