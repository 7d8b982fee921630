"""A plan in one line, the same way wherever one is named."""

from collections import Counter

from galvatron_megatron.plan.plan import Plan


def plan_line(plan: Plan) -> str:
    """A plan in one line, the outer decisions first.

    Args:
        plan: any plan.

    Returns:
        ``"pp2 x4 chunks tp2+megatron dp4 zero1 micro-batch 1 x 8"`` (a replica takes 8 micro-batches of one
        sample); where the layers differ from each other or from embedding and head, how many run under which
        strategy:
        ``"pp1 micro-batch 4 x 2: 1 x (tp2 dp8), 31 x (tp1 dp16); embedding and head tp2 dp8"``.
    """
    head = f"pp{plan.pp}"
    if plan.virtual_stages > 1:
        head += f" x{plan.virtual_stages} chunks"
    micro_batches = f"micro-batch {plan.micro_batch_size} x {plan.micro_batches}"
    if plan.is_uniform and len(plan.strategies) == 1:
        return f"{head} {plan.strategies[0]} {micro_batches}"
    counts = Counter(layer.strategy for layer in plan.layers)
    layers = ", ".join(f"{count} x ({strategy})" for strategy, count in counts.items())
    return f"{head} {micro_batches}: {layers}; embedding and head {plan.base}"
