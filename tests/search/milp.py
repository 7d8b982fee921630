"""An independent formulation of one outer point as a mixed-integer linear program, solved by HiGHS.

One unit flows through a network: from cut (p, i), where rank p begins with layer i, over f[p, i, s] to layer i
under strategy s on rank p, over u[p, i, a, b] from layer i - 1 under a to layer i under b, and over l[p, i, s]
from the last layer of a rank to cut (p + 1, i + 1). A path is a partition with a strategy for every layer;
without interleaving. Side constraints hold its times, synchronisation and bytes.
"""

from collections import defaultdict

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from galvatron_megatron.cost.objective import live_micro_batches
from galvatron_megatron.plan.plan import LayerPlan, Plan, StagePlan


class _Program:
    """Rows and columns of a mixed-integer program, named by tuples."""

    def __init__(self) -> None:
        self.names: dict[tuple, int] = {}
        self.rows: list[tuple[dict[int, float], float, float]] = []
        self.objective: dict[int, float] = defaultdict(float)

    def var(self, *key: object) -> int:
        return self.names.setdefault(key, len(self.names))

    def add(self, coefficients: dict[int, float], low: float, high: float) -> None:
        self.rows.append((coefficients, low, high))

    def least(self) -> tuple[float, list[tuple]]:
        """Least objective, and the names of the arcs that are taken; infinite where nothing is feasible."""
        size = len(self.names)
        entries = [(r, v, c) for r, (row, _, _) in enumerate(self.rows) for v, c in row.items()]
        r, v, c = zip(*entries, strict=True)
        matrix = coo_matrix((c, (r, v)), shape=(len(self.rows), size)).tocsr()
        arcs = np.array([key[0] in ("f", "u", "l") for key in self.names])
        weights = np.zeros(size)
        for index, value in self.objective.items():
            weights[index] = value
        found = milp(
            weights,
            constraints=LinearConstraint(
                matrix, [low for _, low, _ in self.rows], [high for _, _, high in self.rows]
            ),
            bounds=Bounds(np.zeros(size), np.where(arcs, 1.0, np.inf)),
            integrality=arcs.astype(int),
            options={"mip_rel_gap": 1e-7, "time_limit": 60},
        )
        if found.status == 2:
            return np.inf, []
        assert found.status == 0, found.message
        return float(found.fun), [
            key for key, index in self.names.items() if arcs[index] and found.x[index] > 0.5
        ]


def milp_plan(request, costs, space, outer, setting) -> tuple[float, Plan | None]:
    """Step seconds of the best plan of one setting, as the solver sees them, and the plan; infinite and None
    where none fits."""
    model, pp, m = request.model, outer.pp, outer.micro_batches
    count = len(model.layers)
    options = [space.strategies(layer, outer) for layer in model.layers]
    price = [[costs.layer_cost(i, s, setting) for s in options[i]] for i in range(count)]
    program = _Program()
    var, add = program.var, program.add
    balance: dict[tuple, dict[int, float]] = defaultdict(dict)
    used: dict[tuple, dict[int, float]] = defaultdict(dict)
    time: list[dict[int, float]] = [{} for _ in range(pp)]

    def arc(p: int, source: tuple, target: tuple, seconds: float, *key: object) -> None:
        v = var(*key)
        balance[source][v] = -1.0
        balance[target][v] = 1.0
        time[p][v] = seconds
        if target[0] == "layer":
            used[target][v] = 1.0

    for p in range(pp):
        for i in range(p, count - pp + p + 1):
            for s, strategy in enumerate(options[i]):
                here = ("layer", p, i, s)
                if i == 0 or p > 0:
                    seconds = costs.reshard_seconds(i, setting.base, strategy, setting)
                    arc(p, ("cut", p, i), here, seconds, "f", p, i, s)
                if i > p:
                    for a, before in enumerate(options[i - 1]):
                        seconds = costs.reshard_seconds(i, before, strategy, setting)
                        arc(p, ("layer", p, i - 1, a), here, seconds, "u", p, i, a, s)
                if p < pp - 1 or i == count - 1:
                    seconds = costs.reshard_seconds(i + 1, strategy, setting.base, setting)
                    arc(p, here, ("cut", p + 1, i + 1), seconds, "l", p, i, s)
    for node, flow in balance.items():
        gain = {("cut", 0, 0): -1.0, ("cut", pp, count): 1.0}.get(node, 0.0)
        add(flow, gain, gain)
    slowest, latest = var("slowest"), var("latest")
    program.objective[slowest], program.objective[latest] = m - 1.0, 1.0
    embedding, head = costs.embedding_cost(setting), costs.head_cost(setting)
    fixed = 0.0
    for p in range(pp):
        live = live_micro_batches(pp, p, m)[0]
        ends = ([embedding] if p == 0 else []) + ([head] if p == pp - 1 else [])
        t0 = sum(c.micro_batch_seconds for c in ends) + (costs.send_seconds(setting) if p < pp - 1 else 0.0)
        b0 = costs.overhead_bytes(setting, p) + sum(c.state_bytes + live * c.activation_bytes for c in ends)
        transient = var("transient", p)
        add({transient: 1.0}, max([c.transient_bytes for c in ends], default=0), np.inf)
        sync, held = {}, {transient: 1.0}
        for (_, rank, i, s), flow in used.items():
            if rank != p:
                continue
            c = price[i][s]
            for v in flow:
                time[p][v] += c.micro_batch_seconds
                sync[v] = c.sync_seconds
                held[v] = c.state_bytes + live * c.activation_bytes
            add({**dict.fromkeys(flow, float(c.transient_bytes)), transient: -1.0}, -np.inf, 0)
        add(held, -np.inf, request.memory_bytes - b0)
        add({**time[p], slowest: -1.0}, -np.inf, -t0)
        add({**sync, latest: -1.0}, -np.inf, -sum(c.sync_seconds for c in ends))
        for v, seconds in time[p].items():
            program.objective[v] += seconds
        fixed += t0
    least, taken = program.least()
    if not taken:
        return np.inf, None
    # Every layer is entered once: over f as the first of its rank, over u behind another one.
    stages: list[list[LayerPlan]] = [[] for _ in range(pp)]
    for p, i, s in sorted((key[1], key[2], key[-1]) for key in taken if key[0] in ("f", "u")):
        stages[p].append(LayerPlan(kind=model.layers[i].kind, strategy=options[i][s]))
    plan = Plan(
        pp=pp,
        micro_batch_size=setting.micro_batch_size,
        micro_batches=m,
        base=setting.base,
        stages=tuple(StagePlan(layers=tuple(stage)) for stage in stages),
    )
    return least + fixed, plan
