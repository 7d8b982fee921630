"""Collectives over the groups of four live CPU ranks."""

import pytest

pytestmark = pytest.mark.alone


def measure_links(rank: int, world_size: int) -> list:
    """Curves of pairs of neighbours and of pairs two ranks apart."""
    from galvatron_megatron.profiler.collectives import GroupShape, measure_curve, siblings_of

    found = []
    for stride in (1, 2):
        with siblings_of(GroupShape(ranks=2, stride=stride)) as siblings:
            for collective in ("all_to_all", "broadcast", "send"):
                for contention in (True, False):
                    curve, seconds = measure_curve(
                        collective,
                        siblings,
                        largest_bytes=1 << 20,
                        contention=contention,
                        seconds_per_size=0.01,
                    )
                    assert [value > 0 for value in seconds] == [
                        contention or other in (0, stride) for other in range(world_size)
                    ]
                    found.append(curve)
    return found


@pytest.mark.distributed
def test_links_are_measured_alone_and_at_once_over_consecutive_and_strided_ranks(ranks, tmp_path):
    curves = ranks(4).run(measure_links)
    assert all(found == curves[0] for found in curves)
    for collective in ("all_to_all", "broadcast", "send"):
        for stride in (1, 2):
            together, alone = (
                next(c for c in curves[0] if c.key == (collective, 2, stride, at_once))
                for at_once in (True, False)
            )
            for curve in (together, alone):
                sizes = [size for size, _ in curve.points]
                assert (sizes[0], sizes[-1]) == (1 << 10, 1 << 20)
                assert all(seconds > 0 for _, seconds in curve.points)
                # What the fit leaves, as the points say.
                errors = [
                    (curve.latency_seconds + size * curve.seconds_per_byte) / seconds - 1
                    for size, seconds in curve.points
                ]
                assert curve.residual == pytest.approx((sum(e * e for e in errors) / len(errors)) ** 0.5)
    # The first pair alone takes part in what is measured alone.
    assert {c.key[:3] for c in curves[0] if not c.contention} == {c.key[:3] for c in curves[0] if c.contention}
