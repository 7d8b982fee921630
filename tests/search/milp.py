"""An independent formulation of one outer point as a mixed-integer linear program, solved by HiGHS.

Binary x[p, i, s]: layer i runs on rank p under strategy s; u[p, i, a, b]: layer i - 1 under a and layer i
under b, both on rank p; f/l[p, i, s]: layer i is first/last on its rank. Partitions are consecutive, without
interleaving.
"""

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from galvatron_megatron.cost.objective import live_micro_batches


def milp_step_seconds(request, costs, space, outer, setting) -> float:
    """Step seconds of the best plan of one setting, infinite where none fits."""
    model, pp, m = request.model, outer.pp, outer.micro_batches
    count = len(model.layers)
    options = [space.strategies(layer, outer) for layer in model.layers]
    width = [len(o) for o in options]
    names: dict[tuple, int] = {}

    def var(*key):
        return names.setdefault(key, len(names))

    integral: set[int] = set()
    rows: list[tuple[dict[int, float], float, float]] = []

    def add(coefficients, low, high):
        rows.append((coefficients, low, high))

    price = [[costs.layer_cost(i, s, setting) for s in options[i]] for i in range(count)]
    for p in range(pp):
        for i in range(count):
            for s in range(width[i]):
                integral.add(var("x", p, i, s))
    on = {}
    for p in range(pp):
        for i in range(count):
            on[p, i] = {var("x", p, i, s): 1.0 for s in range(width[i])}
    for i in range(count):
        add({v: 1.0 for p in range(pp) for v in on[p, i]}, 1, 1)
    for p in range(pp):
        add({v: 1.0 for i in range(count) for v in on[p, i]}, 1, np.inf)
    for i in range(1, count):
        # ranks do not decrease along the model
        for p in range(pp):
            row = {}
            for q in range(p + 1):
                for v in on[q, i]:
                    row[v] = row.get(v, 0) + 1.0
                for v in on[q, i - 1]:
                    row[v] = row.get(v, 0) - 1.0
            add(row, -np.inf, 0)
    # Flow of layouts on every rank: from base (f) through pairs (u) to base (l).
    for p in range(pp):
        for i in range(count):
            for s in range(width[i]):
                into = {var("f", p, i, s): 1.0, var("x", p, i, s): -1.0}
                out = {var("l", p, i, s): 1.0, var("x", p, i, s): -1.0}
                if i:
                    for a in range(width[i - 1]):
                        into[var("u", p, i, a, s)] = 1.0
                if i + 1 < count:
                    for b in range(width[i + 1]):
                        out[var("u", p, i + 1, s, b)] = 1.0
                add(into, 0, 0)
                add(out, 0, 0)
        add({var("f", p, i, s): 1.0 for i in range(count) for s in range(width[i])}, 1, 1)
        add({var("l", p, i, s): 1.0 for i in range(count) for s in range(width[i])}, 1, 1)
    slowest, latest = var("slowest"), var("latest")
    embedding, head = costs.embedding_cost(setting), costs.head_cost(setting)
    objective = {slowest: m - 1.0, latest: 1.0}
    fixed = 0.0
    for p in range(pp):
        live = live_micro_batches(pp, p, m)[0]
        ends = ([embedding] if p == 0 else []) + ([head] if p == pp - 1 else [])
        t0 = sum(c.micro_batch_seconds for c in ends) + (costs.send_seconds(setting) if p < pp - 1 else 0.0)
        y0 = sum(c.sync_seconds for c in ends)
        b0 = costs.overhead_bytes(setting, p) + sum(c.state_bytes + live * c.activation_bytes for c in ends)
        x0 = max([c.transient_bytes for c in ends], default=0)
        time, sync, held = {}, {}, {}
        for i in range(count):
            for s in range(width[i]):
                v, c = var("x", p, i, s), price[i][s]
                time[v] = c.micro_batch_seconds
                sync[v] = c.sync_seconds
                held[v] = c.state_bytes + live * c.activation_bytes
                time[var("f", p, i, s)] = costs.reshard_seconds(i, setting.base, options[i][s], setting)
                time[var("l", p, i, s)] = costs.reshard_seconds(i + 1, options[i][s], setting.base, setting)
                add({v: c.transient_bytes, var("transient", p): -1.0}, -np.inf, 0)
                if i:
                    for a in range(width[i - 1]):
                        time[var("u", p, i, a, s)] = costs.reshard_seconds(
                            i, options[i - 1][a], options[i][s], setting
                        )
        add({var("transient", p): 1.0}, x0, np.inf)
        add({**held, var("transient", p): 1.0}, -np.inf, request.memory_bytes - b0)
        add({**time, slowest: -1.0}, -np.inf, -t0)
        add({**sync, latest: -1.0}, -np.inf, -y0)
        for v, seconds in time.items():
            objective[v] = objective.get(v, 0.0) + seconds
        fixed += t0
    size = len(names)
    entries = [(r, v, c) for r, (row, _, _) in enumerate(rows) for v, c in row.items()]
    r, v, c = zip(*entries, strict=True)
    matrix = coo_matrix((c, (r, v)), shape=(len(rows), size)).tocsr()
    upper = np.ones(size)
    for key, index in names.items():
        if key[0] in ("slowest", "latest", "transient"):
            upper[index] = np.inf
    weights = np.zeros(size)
    for index, value in objective.items():
        weights[index] = value
    kinds = np.array([1 if index in integral else 0 for index in range(size)])
    found = milp(
        weights,
        constraints=LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows]),
        bounds=Bounds(np.zeros(size), upper),
        integrality=kinds,
        options={"mip_rel_gap": 1e-10, "time_limit": 60},
    )
    if found.status == 2:
        return np.inf
    assert found.status == 0, found.message
    return float(found.fun + fixed)
