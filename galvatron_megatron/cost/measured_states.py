"""Prices keeping states equal or sharded from a profile: measured collectives, measured optimizer steps."""

from galvatron_megatron.cost.measured_points import CurveTable, fit_steps
from galvatron_megatron.cost.memory import ElementBytes, Share, StateBytes, held_bytes
from galvatron_megatron.cost.offload import host_bytes, host_traffic, link_seconds, link_source
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.overlap import exposed_seconds
from galvatron_megatron.cost.sharded_states import (
    GATHER,
    REDUCE,
    AtUse,
    Sent,
    is_sent_every_micro_batch,
    micro_batch_seconds,
    partial_sum,
    sent_collectives,
    sent_seconds,
    tied_sum,
    transient_bytes,
)
from galvatron_megatron.cost.sharding import BACKWARD, FORWARD, REDUCTION, UPDATE
from galvatron_megatron.cost.terms import Term
from galvatron_megatron.describe.cluster import Cluster
from galvatron_megatron.describe.profile import Profile
from galvatron_megatron.plan.strategy import Offload, Recompute, Strategy

REDUCING, GATHERING = "gradient reduction", "parameter gathering"
"""Names of terms."""


class StatePrices:
    """What reducing gradients, gathering parameters and stepping costs.

    Args:
        profile: with optimizer steps.
        curves: its collectives.
        element: bytes of one parameter by purpose.
        options: switches of the job.
        cluster: of the live ranks, with the bandwidth between devices and their hosts.
    """

    def __init__(
        self,
        profile: Profile,
        curves: CurveTable,
        element: ElementBytes,
        options: RunOptions,
        cluster: Cluster,
    ) -> None:
        self._curves = curves
        self._element = element
        self._options = options
        self._cluster = cluster
        self._slowdown = cluster.constants.overlap_slowdown
        self._steps = {
            zero: fit_steps([point for point in profile.steps if point.zero == zero])
            for zero in {point.zero for point in profile.steps}
        }
        self._engines = {point.key: point for point in profile.engines if not point.failure}
        self._host_step = fit_steps(profile.host_steps) if profile.host_steps else None

    def has_step(self, strategy: Strategy) -> bool:
        """Whether an optimizer was measured whose step tells the time of this strategy's.

        States in host memory also need the bandwidth of the way there.
        """
        if strategy.offload is not Offload.NONE:
            return self._host_step is not None and self._cluster.host is not None
        return min(strategy.zero, 1) in self._steps

    def _shares(self, parameters: int, strategy: Strategy) -> tuple[Share, ...]:
        return (Share(parameters=parameters, replicas=strategy.state_replicas, stride=strategy.weight_shards),)

    def sent(
        self, parameters: int, strategy: Strategy, *, modules: int = 1, borrowed: int = 0, whole: int = 0
    ) -> dict[tuple[str, str], float]:
        """Seconds of the collectives for some parameters of one rank, see ``sent_collectives``."""
        sent = sent_collectives(
            self._shares(parameters, strategy),
            strategy,
            self._element,
            self._options,
            modules=modules,
            borrowed=borrowed,
            whole=whole,
        )
        return sent_seconds(sent, self._curves.seconds)

    def partial_seconds(self, parameters: int, strategy: Strategy) -> float:
        """Seconds in which gradients that tp ranks compute in part are summed, see ``partial_sum``."""
        share = self._shares(parameters, strategy)[0]
        sums = partial_sum(parameters, share, strategy, self._element, self._options)
        return sum(entry.seconds(self._curves.seconds) for entry in sums)

    def tied_seconds(self, parameters: int, stride: int, base: Strategy) -> float:
        """Seconds in which gradients of an embedding on two stages are summed, see ``tied_sum``."""
        share = self._shares(parameters, base)[0]
        sums = tied_sum(parameters, stride, share, base, self._element, self._options)
        return sum(entry.seconds(self._curves.seconds) for entry in sums)

    def once_per_step(self, parameters: int, tensors: int, strategy: Strategy, sent: Sent) -> list[Term]:
        """Gradient reduction, optimizer and parameter gathering of some parameters of one rank, in this order.

        Stages 2 and 3 update a shard as stage 1 does, whose step stands for theirs. Where the host updates it,
        its gradients go there before and its weights come back after, unless they stay.

        Args:
            parameters: of the rank.
            tensors: that they are in.
            strategy: how their states are kept.
            sent: of these parameters.
        """
        return [
            Term(name=REDUCING, value=sent.get((REDUCTION, REDUCE), 0.0), source="measured"),
            *self._update(parameters, tensors, strategy),
            Term(name=GATHERING, value=sent.get((UPDATE, GATHER), 0.0), source="measured"),
        ]

    def _update(self, parameters: int, tensors: int, strategy: Strategy) -> list[Term]:
        updated = parameters / strategy.state_replicas if strategy.zero else parameters
        line = self._steps.get(min(strategy.zero, 1))
        step = 0.0 if line is None else line.seconds(tensors, updated)
        if strategy.offload is Offload.NONE:
            return [Term(name="optimizer", value=step, source="modelled" if strategy.zero > 1 else "measured")]
        moved = host_traffic(self._shares(parameters, strategy), strategy, self._element)
        copies = link_seconds(moved.stored_per_step + moved.returned_per_step, self._cluster)
        # Flat partitions: as many tensors whatever they hold. No host is faster than its devices: where CPU
        # ranks are their own, Megatron's step is slower by work around it that DeepSpeed's has as well.
        step = max(step, self._host_step.seconds(1, updated))
        return [
            Term(name="optimizer on the host", value=step, source="measured"),
            Term(name="offloading gradients and weights", value=copies, source=link_source(self._cluster)),
        ]

    def fetching(self, parameters: int, strategy: Strategy) -> tuple[float, str]:
        """Seconds in which a pass fetches weights from host memory, and where that number comes from."""
        moved = host_traffic(self._shares(parameters, strategy), strategy, self._element)
        return link_seconds(moved.fetched_per_pass, self._cluster), link_source(self._cluster)

    def held_bytes(self, parameters: int, strategy: Strategy, *, whole: int = 0) -> StateBytes:
        """What a rank has of some parameters on its device, see ``memory.held_bytes``."""
        shares = self._shares(parameters, strategy)
        return held_bytes(shares, strategy, self._element, self._options, whole=whole)

    def host_bytes(self, parameters: int, strategy: Strategy) -> int:
        """What a rank keeps of some parameters in host memory."""
        return host_bytes(self._shares(parameters, strategy), strategy, self._element)

    def overlapped(self, terms: list[Term], forward_seconds: float, backward_seconds: float) -> list[Term]:
        """Once-per-step terms where the job overlaps them with computation.

        Args:
            terms: as ``once_per_step`` returns them.
            forward_seconds: computation that gathering hides behind.
            backward_seconds: computation that reduction hides behind.
        """
        behind = {}
        if self._options.overlap_gradients:
            behind[REDUCING] = backward_seconds
        if self._options.overlap_parameters:
            behind[GATHERING] = forward_seconds
        return [
            Term(
                name=term.name,
                value=exposed_seconds(term.value, behind[term.name], self._slowdown),
                source="modelled",
            )
            if term.name in behind
            else term
            for term in terms
        ]

    def added(
        self, parameters: int, tensors: int, beside: tuple[int, int], strategy: Strategy, own: Sent
    ) -> tuple[dict[tuple[str, str], float], list[Term]]:
        """What some parameters add to what others on the same rank, with which they are reduced, take.

        Args:
            parameters: that come on top.
            tensors: that they are in.
            beside: parameters and tensors of the others.
            strategy: how all of them are kept.
            own: sent for the parameters alone; what stage 3 gathers, it gathers module by module.

        Returns:
            Seconds sent, and once-per-step terms.
        """
        less = self.sent(beside[0], strategy)
        more = self.sent(beside[0] + parameters, strategy)
        sent = {
            key: own[key]
            if is_sent_every_micro_batch(key[0]) and key[1] == GATHER
            else max(0.0, more[key] - less.get(key, 0.0))
            for key in own
        }
        steps = zip(
            self.once_per_step(*beside, strategy, less),
            self.once_per_step(beside[0] + parameters, beside[1] + tensors, strategy, more),
            strict=True,
        )
        return sent, [
            Term(name=new.name, value=max(0.0, new.value - old.value), source=new.source) for old, new in steps
        ]

    def micro_batch_terms(
        self, sent: Sent, forward_seconds: float, backward_seconds: float, at_use: AtUse
    ) -> list[Term]:
        """What stages 2 and 3 add to the forward and to the backward pass of every micro-batch, in this order.

        Args:
            sent: of the parameters.
            forward_seconds: of computation, beside which parameters are gathered.
            backward_seconds: of computation, beside which they are, and beside which the job may reduce.
            at_use: what is not gathered ahead.
        """
        return [
            Term(
                name=f"{phase} sharded parameters",
                value=micro_batch_seconds(phase, computing, sent, self._options, self._slowdown, at_use),
                source="modelled" if self._options.overlap_gradients or (phase, GATHER) in sent else "measured",
            )
            for phase, computing in ((FORWARD, forward_seconds), (BACKWARD, backward_seconds))
        ]

    def engine_terms(self, part: str, strategy: Strategy) -> list[Term]:
        """Processor time of an engine of ZeRO in the forward and the backward pass of a micro-batch.

        Recomputation runs the hooks of stage 3 on the forward pass once more. None where it was not measured.

        Args:
            part: as a profile names it.
            strategy: how it runs.
        """
        point = self._engines.get((part, strategy.zero)) if strategy.state_replicas > 1 else None
        forward, backward = (point.forward_seconds, point.backward_seconds) if point else (0.0, 0.0)
        if strategy.zero == 3 and strategy.recompute is Recompute.FULL:
            backward += forward
        return [
            Term(name=f"{phase} ZeRO engine", value=seconds, source="measured")
            for phase, seconds in ((FORWARD, forward), (BACKWARD, backward))
        ]

    def transient_bytes(
        self, parameters: int, strategy: Strategy, layers: int, *, borrowed: int = 0, whole: int = 0
    ) -> int:
        """What sharding needs for a while, see ``sharded_states.transient_bytes``."""
        shares = self._shares(parameters, strategy)
        return transient_bytes(
            shares, strategy, self._element, self._options, layers, borrowed=borrowed, whole=whole
        )
