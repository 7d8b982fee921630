"""The one objective: step time and stage memory from the costs of layers.

The search optimises exactly these formulas and the estimate reports exactly these formulas, so that a plan
is never ranked by one and chosen by another.
"""

from collections.abc import Sequence


def step_seconds(
    stage_seconds: Sequence[float],
    sync_seconds: Sequence[float],
    micro_batches: int,
    virtual_stages: int = 1,
) -> float:
    """Predicts the time of one training step.

    With t_p the forward and backward time of one micro-batch on pipeline rank p (all its chunks, with its
    non-overlapped communication), m micro-batches and v chunks per rank::

        T = m * max(t) + (sum(t) - max(t)) / v + max(sync)

    For v = 1 this is sum(t) + (m - 1) * max(t), the 1F1B pipeline of arXiv 2104.04473 section 2.2.1 for
    unequal stages; for equal stages the fill term shrinks to (P - 1) * t / v (section 2.2.2).

    Args:
        stage_seconds: t_p of every pipeline rank, in seconds.
        sync_seconds: exposed gradient and parameter synchronisation plus optimizer step of every pipeline
            rank, in seconds; it is paid once per step, after the pipeline has drained.
        micro_batches: m.
        virtual_stages: v.

    Returns:
        Seconds.
    """
    slowest = max(stage_seconds)
    fill = (sum(stage_seconds) - slowest) / virtual_stages
    return micro_batches * slowest + fill + max(sync_seconds)


def live_micro_batches(pp: int, position: int, micro_batches: int, virtual_stages: int = 1) -> tuple[int, ...]:
    """Counts the micro-batches whose activations a pipeline rank holds at its peak.

    1F1B holds min(m, P - p). The interleaved schedule runs (P - p - 1) * 2 + (v - 1) * P chunk forwards before
    its first backward (Megatron's ``get_pp_rank_microbatches``) and then one more; chunk k of a rank runs P
    micro-batches in a row before chunk k + 1 does.

    Args:
        pp: pipeline degree P.
        position: pipeline rank p, from 0.
        micro_batches: m.
        virtual_stages: v.

    Returns:
        For every chunk of the rank, how many micro-batches of it are live: ``virtual_stages`` entries.
    """
    if virtual_stages == 1:
        return (min(micro_batches, pp - position),)
    forwards = min(micro_batches * virtual_stages, (pp - position - 1) * 2 + (virtual_stages - 1) * pp + 1)
    live = [0] * virtual_stages
    for step in range(forwards):
        live[(step // pp) % virtual_stages] += 1
    return tuple(live)
