"""Time of operators on a device: a roofline with tile waves, a fixed time per kernel, the host's issue rate."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from galvatron_megatron.cost.counts_values import Operator
from galvatron_megatron.describe.cluster import GB, MICROSECOND, Constants, Device

_TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.92), (128, 64, 0.75), (64, 64, 0.55))
"""(rows, columns, efficiency relative to the largest) of the matrix tiles a GEMM library chooses among."""
_PIPELINE_DEPTH = 256
"""Inner dimension that a tile loses to filling its pipeline and writing its result."""

FORWARD_PHASES = ("forward",)
BACKWARD_PHASES = ("recompute", "backward", "input_gradient", "weight_gradient")


@dataclass(kw_only=True, frozen=True, slots=True)
class PhaseSeconds:
    """Device time of one phase and the time the host needs to issue it."""

    gemm: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    host: float = 0.0

    @property
    def device(self) -> float:
        """Seconds the device is busy."""
        return self.gemm + self.attention + self.memory

    @property
    def seconds(self) -> float:
        """Seconds that pass: the slower of device and host, which run in parallel."""
        return max(self.device, self.host)


@lru_cache(maxsize=65536)
def gemm_utilization(batch: int, m: int, n: int, k: int, processors: int) -> float:
    """Fraction of a device's full GEMM rate that a shape can use.

    A GEMM is cut into tiles; tiles run in waves of one per processor, so that the last wave leaves processors
    idle, border tiles compute padding, and every tile spends time on filling its pipeline that only a long
    inner dimension hides. Small results split the inner dimension over idle processors, at most until each
    part is one pipeline depth long. Source: the wave quantisation of NVIDIA's "Matrix Multiplication
    Background User's Guide", section 3.

    Args:
        batch: independent products in one kernel.
        m: rows of the result.
        n: columns of the result.
        k: inner dimension.
        processors: streaming multiprocessors.

    Returns:
        A number in (0, 1].
    """
    best = 0.0
    for rows, columns, relative in _TILES:
        tiles = batch * ceil(m / rows) * ceil(n / columns)
        split = max(1, min(processors // tiles, k // (4 * _PIPELINE_DEPTH))) if tiles < processors else 1
        waves = ceil(tiles * split / processors)
        depth = k / split + _PIPELINE_DEPTH
        useful = batch * m * n * k / processors
        best = max(best, relative * useful / (waves * rows * columns * depth))
    return min(best, 1.0)


@lru_cache(maxsize=64)
def _measured_gemms(device: Device) -> dict[tuple[int, ...], float]:
    """Shape -> measured fraction of the peak."""
    return {entry[:4]: entry[4] for entry in device.gemm_efficiencies}


def operator_seconds(operator: Operator, device: Device, constants: Constants, precision: str) -> float:
    """Device time of ONE execution of an operator.

    Args:
        operator: what to run.
        device: on what.
        constants: what the device reaches of its peaks.
        precision: ``bf16``, ``fp16`` or ``fp32``, decides the matrix peak.

    Returns:
        Seconds: what bounds the kernel, and the fixed time to start and drain it.
    """
    traffic = operator.bytes / (device.memory_gb_per_second * GB * constants.memory_efficiency)
    compute = 0.0
    peak = device.peak_flops(precision)
    if operator.kind == "gemm":
        efficiency = _measured_gemms(device).get(operator.shape) if device.gemm_efficiencies else None
        if efficiency is None:
            efficiency = constants.gemm_efficiency * gemm_utilization(*operator.shape, device.processors)
        rate = peak * efficiency
        compute = operator.flops / rate
    elif operator.kind == "attention":
        # The counts hold all pairs of positions; a causal kernel skips the masked half.
        compute = operator.flops / 2 / (peak * constants.attention_efficiency)
    return max(compute, traffic) + constants.kernel_us * MICROSECOND


def phase_seconds(
    operators: Iterable[Operator],
    phases: tuple[str, ...],
    device: Device,
    constants: Constants,
    precision: str,
) -> PhaseSeconds:
    """Time of the operators of some phases, run one after the other.

    Args:
        operators: of one layer.
        phases: which of them to count.
        device: on what.
        constants: what the device reaches of its peaks.
        precision: ``bf16``, ``fp16`` or ``fp32``.

    Returns:
        Device time by kind of operator, and host time.
    """
    kinds = {"gemm": 0.0, "attention": 0.0, "memory": 0.0}
    issued = 0
    for operator in operators:
        if operator.phase in phases:
            kinds[operator.kind] += operator.count * operator_seconds(operator, device, constants, precision)
            issued += operator.count
    return PhaseSeconds(**kinds, host=issued * constants.host_us * MICROSECOND)


def element_bytes(precision: str) -> int:
    """Bytes of one element of activations and working weights."""
    return 4 if precision == "fp32" else 2
