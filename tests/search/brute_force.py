"""Exhaustive search, written apart from the engine: every assignment, partition and outer point of a
request."""

from itertools import product

import numpy as np

from galvatron_megatron.cost.objective import live_micro_batches, step_seconds
from galvatron_megatron.search.decision_tree import Space, setting_of


def chunk_sizes(layers: int, pp: int, virtual: int):
    """All layer counts of the virtual stages, in model order, that the documented space holds."""
    found = set()
    if virtual == 1:
        for sizes in product(range(1, layers + 1), repeat=pp):
            if sum(sizes) == layers:
                found.add(sizes)
        return sorted(found)
    for widths in product(range(1, layers + 3), repeat=pp):
        for first, last in product(range(3), repeat=2):
            sizes = list(widths * virtual)
            sizes[0] -= first
            sizes[-1] -= last
            if min(sizes) >= 1 and sum(sizes) == layers:
                found.add(tuple(sizes))
    return sorted(found)


def best_step_seconds(request, costs, *, uniform: bool = False) -> float:
    """Step seconds of the best plan, infinite where none fits; per sample where batches are free."""
    space = Space(request=request)
    best = np.inf
    for outer in space.outers():
        for virtual in space.virtual_stages(outer):
            for base in space.bases(outer):
                value = best_in_setting(request, costs, space, outer, virtual, base, uniform)
                best = min(best, value / (outer.global_batch_size if request.global_batch_sizes else 1))
    return best


def best_in_setting(request, costs, space, outer, virtual, base, uniform=False) -> float:
    model, pp = request.model, outer.pp
    setting = setting_of(outer, virtual, base)
    count = len(model.layers)
    best = np.inf
    fronts = {}
    for sizes in chunk_sizes(count, pp, virtual):
        starts = np.concatenate([[0], np.cumsum(sizes)])
        if uniform:
            choices = [
                s
                for s in space.strategies(model.layers[0], outer)
                if (s.layout, s.sequence_parallel, s.zero) == (base.layout, base.sequence_parallel, base.zero)
            ]
        else:
            choices = [None]
        for only in choices:
            stages = []
            for position in range(pp):
                ranges = tuple(
                    (int(starts[c * pp + position]), int(starts[c * pp + position + 1])) for c in range(virtual)
                )
                key = (position, ranges, only)
                if key not in fronts:
                    fronts[key] = rank_front(request, costs, space, outer, setting, position, ranges, only)
                stages.append(fronts[key])
            for combination in product(*stages):
                times, syncs, hosts = zip(*combination, strict=True)
                if not fits_hosts(request, outer.ranks, hosts):
                    continue
                best = min(best, step_seconds(times, syncs, outer.micro_batches, virtual))
    return best


def fits_hosts(request, stage_ranks, hosts) -> bool:
    """Whether no node keeps more than it may, where each rank of a stage keeps so much."""
    if request.host_bytes is None:
        return True
    by_rank = [size for size in hosts for _ in range(stage_ranks)]
    nodes = range(0, len(by_rank), request.devices_per_node)
    return all(sum(by_rank[first : first + request.devices_per_node]) <= request.host_bytes for first in nodes)


def rank_front(request, costs, space, outer, setting, position, ranges, only):
    """Undominated (seconds, sync, host bytes) of all assignments of one rank that fit.

    Host bytes are zero where they are not limited.
    """
    model, pp = request.model, setting.pp
    live = live_micro_batches(pp, position, setting.micro_batches, setting.virtual_stages)
    indices = [(index, chunk) for chunk, (first, last) in enumerate(ranges) for index in range(first, last)]
    options = [space.strategies(model.layers[i], outer) if only is None else [only] for i, _ in indices]
    fixed_t = fixed_y = fixed_h = 0.0
    fixed_b, fixed_x = costs.overhead_bytes(setting, position), 0
    ends = []
    if position == 0:
        ends.append((costs.embedding_cost(setting), live[0]))
    if position == pp - 1:
        ends.append((costs.head_cost(setting), live[-1]))
    for cost, alive in ends:
        fixed_t += cost.micro_batch_seconds
        fixed_y += cost.sync_seconds
        fixed_b += cost.state_bytes + alive * cost.activation_bytes
        fixed_x = max(fixed_x, cost.transient_bytes)
        fixed_h += cost.host_bytes
    sends = setting.virtual_stages - (1 if position == pp - 1 else 0)
    fixed_t += sends * costs.send_seconds(setting)
    grids = np.indices([len(o) for o in options]).reshape(len(options), -1)
    t, y = np.full(grids.shape[1], fixed_t), np.full(grids.shape[1], fixed_y)
    b, x = np.full(grids.shape[1], fixed_b), np.full(grids.shape[1], fixed_x)
    h = np.full(grids.shape[1], fixed_h)
    for slot, (index, chunk) in enumerate(indices):
        prices = [costs.layer_cost(index, s, setting) for s in options[slot]]
        t += np.array([p.micro_batch_seconds for p in prices])[grids[slot]]
        y += np.array([p.sync_seconds for p in prices])[grids[slot]]
        b += np.array([p.state_bytes + live[chunk] * p.activation_bytes for p in prices])[grids[slot]]
        x = np.maximum(x, np.array([p.transient_bytes for p in prices])[grids[slot]])
        h += np.array([p.host_bytes for p in prices])[grids[slot]]
        first, last = ranges[chunk]
        if index == first:
            moves = [costs.reshard_seconds(index, setting.base, s, setting) for s in options[slot]]
            t += np.array(moves)[grids[slot]]
        else:
            moves = [
                [costs.reshard_seconds(index, a, s, setting) for s in options[slot]] for a in options[slot - 1]
            ]
            t += np.array(moves)[grids[slot - 1], grids[slot]]
        if index == last - 1:
            moves = [costs.reshard_seconds(index + 1, s, setting.base, setting) for s in options[slot]]
            t += np.array(moves)[grids[slot]]
    fits = b + x <= request.memory_bytes
    if request.host_bytes is None:
        h[:] = 0.0
    found = np.unique(np.stack([t, y, h], axis=1)[fits], axis=0)
    front = np.empty((0, 3))
    for label in found:
        if not (front <= label).all(1).any():
            front = np.vstack([front, label])
    return [tuple(label) for label in front.tolist()]
