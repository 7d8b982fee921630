"""The best multipliers for one sequence: dual ascent by cutting planes.

The dual function of memory, synchronisation and, where it is limited, host memory, min over paths of
[t + beta (b - B) + kappa (y - Y) + mu (h - H)], is concave and piecewise linear. Every evaluation is one
shortest path, whose (t, b - B, y - Y, h - H) is a plane above the function; the next multipliers maximise the
lowest of the planes found so far. A few rounds reach the maximum, which is the linear-programming bound of the
sequence with its resharding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from galvatron_megatron.search.chain import BOUNDARY, TIME_ROW, Chain

_ROUNDS = 12
_CLOSE = 1e-5
_SAFETY = 1e-12
_KEPT = 4
_GOLDEN = (5**0.5 - 1) / 2
_SECTIONS = 60
_NEAR = 1e-3


@dataclass(kw_only=True, frozen=True, slots=True)
class DualRow:
    """Cheapest prices of all rests of a sequence under one set of multipliers."""

    beta: float
    kappa: float
    tails: list[np.ndarray]
    """[n + 1] arrays [K]: price from every layout in front of element i to the end."""
    value: float
    """Lower bound of the time of the whole sequence."""
    mu: float = 0.0
    """Seconds per byte in host memory."""


def best_dual(
    chain: Chain,
    sequence: tuple[int, ...],
    position: int,
    spare: float,
    sync_limit: float,
    enough: float,
    *,
    host_limit: float = np.inf,
) -> tuple[list[DualRow], float]:
    """Maximises the dual function.

    Args:
        chain: prices.
        sequence: elements and boundaries.
        position: class of the pipeline position.
        spare: bytes for state and live activations.
        sync_limit: seconds of synchronisation, or infinite.
        enough: a bound above this many seconds ends the ascent.
        host_limit: bytes in host memory, or infinite.

    Returns:
        The best rows found, the best first, and the best bound.
    """
    with_sync, with_host = bool(np.isfinite(sync_limit)), bool(np.isfinite(host_limit))
    prices = {e: _prices(chain, e, position) for e in set(sequence) if e != BOUNDARY}
    bytes_scale = max(float(p[1].max()) for p in prices.values()) or 1.0
    time_scale = max(float(p[0].max()) for p in prices.values()) or 1.0
    beta_most = 1e3 * time_scale / bytes_scale
    kappa_most = 1e3
    host_scale = max(float(p[3].max()) for p in prices.values()) if with_host else 0.0
    mu_most = 1e3 * time_scale / host_scale if host_scale else 0.0
    fastest = chain.fastest(sequence)
    planes = [
        (
            fastest.seconds,
            float(fastest.bytes[position]) - spare,
            fastest.sync - sync_limit if with_sync else 0.0,
            fastest.host - host_limit if with_host else 0.0,
        )
    ]
    limits = (spare, sync_limit if with_sync else 0.0, host_limit if with_host else 0.0)
    rows: list[DualRow] = []
    best = -np.inf
    start = chain.beta[TIME_ROW + 1 : TIME_ROW + 2, position]
    multipliers = (float(start[0]) if len(start) else 0.0, 0.0, 0.0)
    for _ in range(_ROUNDS):
        row, plane = _evaluate(chain, sequence, prices, multipliers, limits)
        rows.append(row)
        best = max(best, row.value)
        planes.append(plane)
        if best > enough:
            break
        *multipliers, height = _highest_of_all(
            np.array(planes), beta_most, kappa_most if with_sync else 0.0, mu_most
        )
        if height <= best + _CLOSE * abs(best):
            break
    rows.sort(key=lambda row: -row.value)
    return rows[:_KEPT], best


def _prices(chain: Chain, element: int, position: int) -> tuple[np.ndarray, ...]:
    """Seconds, bytes, sync, host bytes and layout of every strategy."""
    options = chain.elements[element]
    return options.seconds, chain.bytes_of(element)[position], options.sync, options.host, options.layouts


def _evaluate(
    chain: Chain,
    sequence: tuple[int, ...],
    prices: dict,
    multipliers: Sequence[float],
    limits: tuple[float, float, float],
) -> tuple[DualRow, tuple[float, float, float, float]]:
    """One shortest path: its row and its plane, for multipliers and limits of bytes, sync and host bytes."""
    beta, kappa, mu = multipliers
    reshard, base = chain.reshard, chain.base
    cheapest, chosen = {}, {}
    for element, (seconds, bytes_, sync, host, layouts) in prices.items():
        price = seconds + beta * bytes_ + kappa * sync
        if mu:
            price = price + mu * host
        order = np.argsort(price, kind="stable")[::-1]
        least = np.full(len(reshard), np.inf)
        which = np.zeros(len(reshard), dtype=np.intp)
        least[layouts[order]] = price[order]  # the cheapest of a layout is written last
        which[layouts[order]] = order
        cheapest[element], chosen[element] = least, which
    tails = [reshard[:, base]]
    for element in reversed(sequence):
        onward = tails[-1]
        if element == BOUNDARY:
            tails.append(reshard[:, base] + onward[base])
        else:
            tails.append((reshard + (cheapest[element] + onward)).min(1))
    tails.reverse()
    seconds = bytes_ = sync = host = 0.0
    layout = base
    for index, element in enumerate(sequence):
        if element == BOUNDARY:
            seconds += reshard[layout, base]
            layout = base
            continue
        after = int((reshard[layout] + cheapest[element] + tails[index + 1]).argmin())
        choice = chosen[element][after]
        price = prices[element]
        seconds += reshard[layout, after] + price[0][choice]
        bytes_ += price[1][choice]
        sync += price[2][choice]
        host += price[3][choice]
        layout = after
    seconds += reshard[layout, base]
    whole = float(tails[0][base])
    paid = beta * limits[0] + kappa * limits[1] + mu * limits[2]
    value = whole - paid - _SAFETY * (whole + abs(paid))
    row = DualRow(beta=beta, kappa=kappa, mu=mu, tails=tails, value=value)
    over = (float(used) - limit for used, limit in zip((bytes_, sync, host), limits, strict=True))
    return row, (float(seconds), *over)


def _highest_of_all(
    planes: np.ndarray, beta_most: float, kappa_most: float, mu_most: float
) -> tuple[float, float, float, float]:
    """The same as ``_highest`` with a multiplier of host memory between the other two and the height.

    The best height at a given mu is concave in it, so that golden sections find the best mu.
    """
    planes, host = planes[:, :3], planes[:, 3]

    def at(mu: float) -> tuple[float, float, float, float]:
        charged = planes.copy()
        charged[:, 0] += mu * host
        beta, kappa, height = _highest(charged, beta_most, kappa_most)
        return beta, kappa, mu, height

    best = at(0.0)
    if not mu_most or not (host > 0).any():
        return best
    low, high = 0.0, mu_most
    inner, outer = (at(high - (high - low) * _GOLDEN), at(low + (high - low) * _GOLDEN))
    for _ in range(_SECTIONS):
        if inner[-1] >= outer[-1]:
            high, outer = outer[2], inner
            inner = at(high - (high - low) * _GOLDEN)
        else:
            low, inner = inner[2], outer
            outer = at(low + (high - low) * _GOLDEN)
        if high - low <= _NEAR * high:
            break
    return max((best, inner, outer), key=lambda entry: entry[-1])


def _highest(planes: np.ndarray, beta_most: float, kappa_most: float) -> tuple[float, float, float]:
    """Multipliers in the box that maximise the lowest plane t + beta * p + kappa * q, and that height."""
    planes = np.unique(planes, axis=0)
    t, p, q = planes.T
    points = [(0.0, 0.0), (beta_most, 0.0)]
    count = len(planes)
    if count > 1:
        first, second = np.triu_indices(count, 1)
        dt, dp, dq = t[first] - t[second], p[first] - p[second], q[first] - q[second]
        with np.errstate(divide="ignore", invalid="ignore"):
            points += [(b, 0.0) for b in (-dt / dp).tolist() if 0 <= b <= beta_most]
            if kappa_most:
                points += [(0.0, k) for k in (-dt / dq).tolist() if 0 <= k <= kappa_most]
                points += [(0.0, kappa_most), (beta_most, kappa_most)]
                points += [
                    (beta_most, k) for k in (-(dt + beta_most * dp) / dq).tolist() if 0 <= k <= kappa_most
                ]
                points += [
                    (b, kappa_most) for b in (-(dt + kappa_most * dq) / dp).tolist() if 0 <= b <= beta_most
                ]
                # Where three planes meet: two of the pairs that share a plane.
                i, j = np.triu_indices(len(dt), 1)
                together = (first[i] == first[j]) | (second[i] == second[j])
                i, j = i[together], j[together]
                determinant = dp[i] * dq[j] - dp[j] * dq[i]
                b = (-dt[i] * dq[j] + dt[j] * dq[i]) / determinant
                k = (-dp[i] * dt[j] + dp[j] * dt[i]) / determinant
                inside = (b >= 0) & (b <= beta_most) & (k >= 0) & (k <= kappa_most)
                points += list(zip(b[inside].tolist(), k[inside].tolist(), strict=True))
    at = np.array(points)
    height = (t + at[:, :1] * p + at[:, 1:] * q).min(1)
    best = int(height.argmax())
    return float(at[best, 0]), float(at[best, 1]), float(height[best])
