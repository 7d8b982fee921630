"""Prices from Hetu-Galvatron's profile tables.

Time: measured forward time of one sample by local batch, divided by tp, backward twice the forward,
recomputation one
more forward; four tensor-parallel all-reduces per layer and micro-batch (six with recomputation), or eight
Ulysses
all-to-alls (twelve), from the measured time tables. Once per step the gradients are reduced over the ranks
that hold
the same weights, overlapped with the last backward pass under the measured slowdown; ZeRO 2 and 3 reduce
them and
ZeRO 3 gathers parameters in every micro-batch. Memory: measured activations by tp degree; model states are
four times
the fp32 parameters (2 + 2 bytes of 16-bit weights and gradients, 12 of fp32 copies and moments, per parameter).

Not in the tables, hence not priced: context parallelism, tp without sequence parallelism, selective
recomputation, optimizer time.
"""

import itertools
from functools import lru_cache

from galvatron_megatron.cost.counts import layer_counts
from galvatron_megatron.cost.protocol import LayerCost, Setting
from galvatron_megatron.describe.galvatron_tables import EndMemory, GalvatronProfile
from galvatron_megatron.describe.model import Model
from galvatron_megatron.errors import DescriptionError
from galvatron_megatron.plan.strategy import Recompute, SequenceParallel, Strategy

_MB = 2**20
_BACKWARD = 2.0
_PARAMETER_TOLERANCE = 0.05
"""Their profiler takes the parameters of a layer from allocated memory: 0.8 % too many for LLaMA2-7B."""


def interpolated(table: dict[int, float], at: float) -> float:
    """Linear between measured points, proportional beyond the largest, constant below the smallest."""
    keys = list(table)
    if at <= keys[0]:
        return table[keys[0]]
    if at >= keys[-1]:
        return table[keys[-1]] * at / keys[-1]
    for low, high in itertools.pairwise(keys):
        if at <= high:
            part = (at - low) / (high - low)
            return table[low] + part * (table[high] - table[low])
    raise AssertionError("unreachable")


def zero_fraction(zero: int, ranks: int) -> float:
    """Part of the model states that a rank keeps: 16-bit weights, 16-bit gradients and 12 bytes of
    optimizer."""
    weights, gradients, optimizer = 2 / 16, 2 / 16, 12 / 16
    if zero >= 1:
        optimizer /= ranks
    if zero >= 2:
        gradients /= ranks
    if zero >= 3:
        weights /= ranks
    return weights + gradients + optimizer


class GalvatronCostModel:
    """Implements the ``CostModel`` protocol on a :class:`GalvatronProfile`.

    Args:
        model: with the sequence length that was profiled and blocks of one kind.
        profile: the tables.
        reserved_bytes: memory of a device that no plan may use (driver context, communication).

    Raises:
        DescriptionError: the model is not the one profiled.
    """

    def __init__(self, model: Model, profile: GalvatronProfile, *, reserved_bytes: int = 0) -> None:
        if model.seq_length != profile.seq_length:
            raise DescriptionError(
                f"profile {profile.name}: sequence length {profile.seq_length}, model {model.name} has "
                f"{model.seq_length}; valid: the same"
            )
        if len(set(model.layers)) != 1:
            raise DescriptionError(f"profile {profile.name}: one kind of layer; model {model.name} has several")
        parameters = layer_counts(model, model.layers[0], Strategy(), 1).parameters
        profiled = profile.parameter_mb * _MB / 4
        if not abs(parameters / profiled - 1) <= _PARAMETER_TOLERANCE:
            raise DescriptionError(
                f"profile {profile.name}: layers of {profiled / 1e6:.1f}M parameters, model {model.name} has "
                f"{parameters / 1e6:.1f}M in each; valid: the model that was profiled"
            )
        self.model, self.profile, self.reserved_bytes = model, profile, reserved_bytes
        self._layer = lru_cache(maxsize=None)(self._price_layer)
        self._moved = lru_cache(maxsize=None)(self._price_move)

    def layer_cost(self, layer: int, strategy: Strategy, setting: Setting) -> LayerCost:
        """Prices a layer; see :class:`~galvatron_megatron.cost.protocol.CostModel`."""
        return self._layer(strategy, setting.micro_batch_samples, setting.micro_batches)

    def _price_layer(self, strategy: Strategy, samples: int, micro_batches: int) -> LayerCost:
        plain = strategy.tp > 1 and strategy.sequence_parallel is SequenceParallel.NONE
        if strategy.cp > 1 or plain or strategy.recompute is Recompute.SELECTIVE:
            raise DescriptionError(
                f"profile {self.profile.name}: no prices under {strategy}; valid: cp 1, recompute none "
                f"or full, and "
                "sequence parallelism with every tp above 1"
            )
        profile, tp = self.profile, strategy.tp
        batch = samples // strategy.dp
        if tp not in profile.activation_mb:
            valid = ", ".join(map(str, profile.activation_mb))
            raise DescriptionError(f"profile {profile.name}: no activations at tp {tp}; valid: {valid}")
        forward = batch * self._rate(profile.layer_ms, batch) / tp * 1e-3
        again = strategy.recompute is Recompute.FULL
        exchange = self._exchange(strategy, batch) * (1.5 if again else 1.0)
        seconds = forward * (1 + _BACKWARD + again) + exchange
        shards = strategy.weight_shards
        activation = profile.checkpoint_mb / tp if again else profile.activation_mb[tp]
        transient = profile.activation_mb[tp] * batch if again else 0.0
        if strategy.zero == 3:
            transient += profile.parameter_mb / 2 / shards  # the gathered 16-bit weights
        return self._sharded(
            strategy,
            micro_batches,
            seconds,
            backward=forward * _BACKWARD,
            parameter_mb=profile.parameter_mb / shards,
            state_mb=4 * profile.parameter_mb / shards,
            activation_mb=activation * batch,
            transient_mb=transient,
        )

    @staticmethod
    def _rate(table: dict[int, float], batch: int) -> float:
        """Milliseconds of one sample; beyond the measured batches as at the largest."""
        return interpolated(table, min(batch, max(table)))

    def _sharded(
        self,
        strategy: Strategy,
        micro_batches: int,
        seconds: float,
        *,
        backward: float,
        parameter_mb: float,
        state_mb: float,
        activation_mb: float,
        transient_mb: float,
    ) -> LayerCost:
        """Adds what data parallelism costs."""
        replicas = strategy.state_replicas
        sync = 0.0
        if replicas > 1:
            half = parameter_mb / 2 * (replicas - 1) / replicas / self._bandwidth(strategy) * 1e-3
            slowdown = self.profile.overlap_slowdown
            reduced = max(half - backward, half * (1 - 1 / slowdown))
            if strategy.zero >= 2 and micro_batches > 1:
                seconds += reduced
            else:
                sync += reduced
            if strategy.zero == 3:
                seconds += 2 * max(half - backward, half * (1 - 1 / slowdown))
            else:
                sync += half
        return LayerCost(
            micro_batch_seconds=seconds,
            sync_seconds=sync,
            state_bytes=round(state_mb * zero_fraction(strategy.zero, replicas) * _MB),
            activation_bytes=round(activation_mb * _MB),
            transient_bytes=round(transient_mb * _MB),
        )

    def _bandwidth(self, strategy: Strategy) -> float:
        """Bus bandwidth (MB a millisecond) of the ranks that hold the same weights."""
        table, ranks = self.profile.all_reduce_gb_per_second, strategy.state_replicas
        consecutive = strategy.weight_shards == 1
        for key in ((ranks, consecutive), (ranks, not consecutive)):
            if key in table:
                return table[key]
        sizes = [size for size, _ in table if size >= ranks] or [max(size for size, _ in table)]
        nearest = min(sizes)
        return min(value for (size, _), value in table.items() if size == nearest)

    def _exchange(self, strategy: Strategy, batch: int) -> float:
        """Seconds of a layer's tensor-parallel or Ulysses collectives, forward and backward."""
        if strategy.tp == 1:
            return 0.0
        whole = batch * self.model.seq_length * self.model.hidden_size * 2 / _MB
        if strategy.sequence_parallel is SequenceParallel.ULYSSES:
            return 8 * self._collective(self.profile.all_to_all_ms, strategy.tp, whole / strategy.tp)
        return 4 * self._collective(self.profile.all_reduce_ms, strategy.tp, whole)

    def _collective(self, tables: dict[int, dict[int, float]], ranks: int, megabytes: float) -> float:
        if ranks not in tables:
            valid = ", ".join(map(str, sorted(tables)))
            raise DescriptionError(
                f"profile {self.profile.name}: no collectives of {ranks} ranks; valid: {valid}"
            )
        return interpolated(tables[ranks], megabytes) * 1e-3

    def _end(self, setting: Setting, memory: EndMemory, share: float) -> LayerCost:
        base, profile = setting.base, self.profile
        if base.tp not in memory.state_mb:
            valid = ", ".join(map(str, memory.state_mb))
            raise DescriptionError(f"profile {profile.name}: no vocabulary at tp {base.tp}; valid: {valid}")
        batch = setting.micro_batch_size
        forward = share * batch * self._rate(profile.other_ms, batch) / base.tp * 1e-3
        exchange = 0.0
        if base.tp > 1:
            whole = batch * self.model.seq_length * self.model.hidden_size * 2 / _MB
            exchange = 2 * self._collective(profile.all_reduce_ms, base.tp, whole)
        state = memory.state_mb[base.tp]
        return self._sharded(
            base,
            setting.micro_batches,
            forward * (1 + _BACKWARD) + exchange,
            backward=forward * _BACKWARD,
            parameter_mb=state / 4,
            state_mb=state,
            activation_mb=memory.activation_mb[base.tp] * batch,
            transient_mb=0.0,
        )

    def embedding_cost(self, setting: Setting) -> LayerCost:
        """Prices the embedding; without a pipeline the tables hold embedding and head together."""
        if setting.pp == 1:
            return self._end(setting, self.profile.other_alone, 1.0)
        return self._end(setting, self.profile.other_first, 0.5)

    def head_cost(self, setting: Setting) -> LayerCost:
        """Prices the head; nothing without a pipeline, where ``embedding_cost`` holds both."""
        if setting.pp == 1:
            return LayerCost(
                micro_batch_seconds=0.0, sync_seconds=0.0, state_bytes=0, activation_bytes=0, transient_bytes=0
            )
        return self._end(setting, self.profile.other_last, 0.5)

    def reshard_seconds(self, layer: int, before: Strategy, after: Strategy, setting: Setting) -> float:
        """An all-to-all of a rank's part over the ranks of a stage, in both directions."""
        if before.layout == after.layout:
            return 0.0
        return self._moved(max(before.ranks, after.ranks), setting.micro_batch_samples)

    def _price_move(self, ranks: int, samples: int) -> float:
        part = samples * self.model.seq_length * self.model.hidden_size * 2 / _MB / ranks
        return 2 * self._collective(self.profile.all_to_all_ms, ranks, part)

    def send_seconds(self, setting: Setting) -> float:
        """One micro-batch's activation and its gradient over one boundary."""
        if setting.pp == 1:
            return 0.0
        table = self.profile.send_gb_per_second
        bandwidth = table.get(setting.pp) or min(table.values())
        split = setting.base.tp if setting.base.sequence_parallel is not SequenceParallel.NONE else 1
        part = setting.micro_batch_size * self.model.seq_length * self.model.hidden_size * 2 / _MB / split
        return 2 * part / bandwidth * 1e-3

    def overhead_bytes(self, setting: Setting, position: int) -> int:
        """What is reserved."""
        return self.reserved_bytes
