"""How long tracing takes, and how far the closed forms are from it at full width.

Every model is traced in a new process under all strategies of one node (tensor-parallel degrees 1 to 8, with
and without sequence parallelism, every recomputation), as a rank of a job of 1,024. Prints the median of the
repeats, the time of the answer from the cache, and the largest difference of the closed forms from the trace.
"""

import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

from galvatron_megatron.cost.counts import layer_counts
from galvatron_megatron.errors import UnsupportedPlanError
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy
from galvatron_megatron.profiler.trace import Trace, trace_layers

REPEATS = 3
_COMMON = (
    "--seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 1 --bf16 --mock-data "
    "--tokenizer-type NullTokenizer --train-iters 1 --lr 1e-4 --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --disable-bias-linear --hidden-dropout 0 --attention-dropout 0 "
    "--untie-embeddings-and-output-weights "
)
MODELS = {
    "7B, dense": "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 "
    "--vocab-size 32000",
    "70B, grouped heads": "--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 "
    "--group-query-attention --num-query-groups 8 --vocab-size 128256",
    "8 experts of 7B": "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
    "--group-query-attention --num-query-groups 8 --num-experts 8 --moe-router-topk 2 "
    "--moe-router-load-balancing-type none --vocab-size 32000",
    "latent attention": "--num-layers 60 --hidden-size 5120 --ffn-hidden-size 12288 --num-attention-heads 128 "
    "--multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 "
    "--v-head-dim 128 --qk-layernorm --vocab-size 102400",
}


def strategies() -> list[Strategy]:
    kinds = (SequenceParallel.NONE, SequenceParallel.MEGATRON)
    return [
        Strategy(tp=tp, sequence_parallel=kind, recompute=recompute)
        for tp in (1, 2, 4, 8)
        for kind in (kinds if tp > 1 else kinds[:1])
        for recompute in Recompute
    ]


def largest_difference(trace: Trace) -> float:
    """Largest relative difference of kept bytes or FLOPs over all layers and strategies."""
    worst = 0.0
    for layer in set(trace.model.layers):
        for strategy in strategies():
            try:
                traced = trace.layer(layer, strategy, 1)
            except UnsupportedPlanError:
                continue
            counted = layer_counts(trace.model, layer, strategy, 1, "local")
            for mine, theirs in (
                (counted.activation_bytes, traced.activation_bytes),
                (counted.flops(), traced.flops()),
                (counted.parameters, traced.parameters),
            ):
                worst = max(worst, abs(mine / theirs - 1))
    return worst


def main() -> None:
    print(f"{'model':24} {'traced':>10} {'settings':>9} {'again':>9} {'closed forms differ by':>24}")
    for name, flags in MODELS.items():
        argv = (_COMMON + flags).split()
        new, again = [], []
        for _ in range(REPEATS):
            with tempfile.TemporaryDirectory() as cache:
                for times in (new, again):
                    start = perf_counter()
                    trace = trace_layers(argv, strategies(), [1], cache_directory=Path(cache), world_size=1024)
                    times.append(perf_counter() - start)
        print(
            f"{name:24} {median(new):8.1f} s {len(trace.counted):9} {median(again) * 1e3:6.1f} ms "
            f"{largest_difference(trace):24.1%}"
        )


if __name__ == "__main__":
    main()
