"""How stages of a pipeline share the memory of their nodes, exactly.

Offloaded states of stage p take h_p bytes on each of its ranks. With c_np of them on node n, a plan fits where

    sum over p of c_np h_p <= H        on every node n.

Where a node holds ranks of one stage alone, that limits every stage by itself. Else the stages are solved with
limits of their own that are too loose together; as long as the answer overfills a node, one of its stages keeps
at most s bytes, or more than s, so that the others have less left: a branch and bound over boxes of limits, the
fastest answer first. The first answer that fits is the best one.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count

import numpy as np

from galvatron_megatron.search.layer_dp import LateError
from galvatron_megatron.search.positions import Partition
from galvatron_megatron.search.stage_answers import ROUNDING
from galvatron_megatron.search.stage_partition import PipelineProblem

MOST_BOXES = 250
"""Boxes of one setting after which the best answer so far is taken, and said to be (``SearchResult.gap``)."""

Pose = Callable[[np.ndarray], PipelineProblem]
"""The problem under limits of host bytes by position [P]."""


class HostShares:
    """The limit of one pipeline.

    Attributes:
        ranks: [n, P] ranks of every stage on every node; equal nodes once.
        free: [n] bytes that embedding and head leave for layers.
    """

    def __init__(self, stage_ranks: int, devices_per_node: int, host_bytes: int, ends: np.ndarray) -> None:
        """Places the stages.

        Args:
            stage_ranks: ranks of a stage; consecutive ones share a node.
            devices_per_node: ranks of a node.
            host_bytes: that a node has for offloaded states.
            ends: [P] bytes of embedding and head on a rank.
        """
        stages = np.repeat(np.arange(len(ends)), stage_ranks)
        nodes = np.arange(len(stages)) // devices_per_node
        ranks = np.zeros((nodes[-1] + 1, len(ends)))
        np.add.at(ranks, (nodes, stages), 1.0)
        self.ranks = np.unique(ranks, axis=0)
        self.free = host_bytes - self.ranks @ ends
        self.unproven = np.inf
        """Step seconds that a better plan takes at least, where the search for one was cut short."""
        self._is_late = False

    def excess(self, used: np.ndarray) -> np.ndarray:
        """Bytes by which stages that keep ``used`` [P] overfill every node."""
        return self.ranks @ used - self.free

    def most(self, least: np.ndarray, most: np.ndarray) -> np.ndarray:
        """Limits [P] of stages that keep from ``least`` to ``most`` bytes; below ``least`` where none do."""
        left = self.free[:, None] - (self.ranks @ least)[:, None] + self.ranks * least
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(self.ranks > 0, np.floor(left / self.ranks), np.inf)
        return np.minimum(most, room.min(0))

    def solve(self, pose: Pose, cutoff: float) -> Partition | None:
        """Finds the best partition that fits on all nodes.

        Args:
            pose: the problem under limits by stage.
            cutoff: only a plan faster than this many seconds is wanted.

        Returns:
            The partition; None where none is faster.
        """
        best: Partition | None = None
        ticket = count()
        nothing = np.zeros(self.ranks.shape[1])
        boxes = [(0.0, next(ticket), nothing, np.full(len(nothing), np.inf))]
        tried = 0
        whole = pose(np.full(len(nothing), np.inf))
        if not whole.is_possible:
            return None
        needed = whole.least_host()
        while boxes and not self._is_late:
            bound, _, least, most = heappop(boxes)
            if bound >= cutoff * (1 - ROUNDING):
                break
            limits = self.most(least, most)
            if (limits < least).any():
                continue
            found = self._best(pose, needed, limits, cutoff)
            if found is None:
                continue
            if tried == MOST_BOXES:
                self.unproven = min(self.unproven, bound)
                break
            tried += 1
            used = np.array([stage.host for stage in found.assignments])
            if (self.excess(used) <= 0).all():
                best, cutoff = found, found.step_seconds
                continue
            fair = self._best(pose, needed, self._fair(used), cutoff)
            if fair is not None:
                best, cutoff = fair, fair.step_seconds
            for below, above in self._halves(used, least, limits):
                heappush(boxes, (found.step_seconds, next(ticket), below, above))
        return best

    def _best(self, pose: Pose, needed: np.ndarray, limits: np.ndarray, cutoff: float) -> Partition | None:
        """The best partition within limits that may, for all that is needed at least, fit on all nodes."""
        problem = pose(limits)
        slowest = cutoff / problem.micro_batches
        inside = needed <= limits[:, None]
        needed = np.where(inside, needed, 0.0)
        for ranks, free in zip(self.ranks, self.free, strict=True):
            together = np.where(inside, ranks[:, None] * needed, np.inf)
            if problem.least_together(together, slowest) > free:
                return None
        try:
            return problem.solve(cutoff)
        except LateError:
            # The best so far is the answer; whoever set the deadline looks at the clock, too.
            self._is_late = True
            return None

    def _fair(self, used: np.ndarray) -> np.ndarray:
        """Limits in proportion to what stages would keep, which fit whatever they keep of them."""
        wanted = self.ranks @ used
        share = np.divide(self.free, wanted, out=np.ones_like(wanted), where=wanted > self.free)
        by_stage = np.where(self.ranks > 0, share[:, None], 1.0).min(0)
        return np.floor(used * by_stage)

    def _halves(
        self, used: np.ndarray, least: np.ndarray, most: np.ndarray
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Two boxes (least, most) that hold every answer of one but such as keep what overfills a node."""
        excess = self.excess(used)
        node = int(excess.argmax())
        ranks = self.ranks[node]
        slack = ranks * (used - least)
        stage = int(slack.argmax())
        part = excess[node] * slack[stage] / slack[slack > 0].sum()
        at = max(least[stage], used[stage] - max(1.0, np.ceil(part / ranks[stage])))
        below, above = most.copy(), least.copy()
        below[stage], above[stage] = at, at + 1
        return (least, below), (above, most)
