"""The cluster to plan for: devices, nodes and the links between them."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import yaml

from galvatron_megatron.describe.shipped import find_description
from galvatron_megatron.errors import DescriptionError, did_you_mean
from galvatron_megatron.plan.checks import GREATEST, shown
from galvatron_megatron.plan.document import read_document

GB = 1e9
MICROSECOND = 1e-6
_GREATEST = {int: GREATEST, float: 1e30}


def _check_numbers(owner: object, where: str, *, zero_allowed: tuple[str, ...] = ()) -> None:
    """Raises where a numeric field of ``owner`` is not a finite number above zero."""
    for item in fields(owner):
        value = getattr(owner, item.name)
        if item.type not in (int, float):
            continue
        fits = type(value) is int or (item.type is float and type(value) is float)
        least = 0 if item.name in zero_allowed else 1e-12
        if not fits or not least <= value <= _GREATEST[item.type]:
            kind = "an integer" if item.type is int else "a number"
            bound = ">= 0" if item.name in zero_allowed else "> 0"
            if fits and value > _GREATEST[item.type]:
                bound += f" and <= {_GREATEST[item.type]}"
            raise DescriptionError(f"{where}.{item.name}: {shown(value)}; valid: {kind} {bound}")


@dataclass(kw_only=True, frozen=True, slots=True)
class Device:
    """One accelerator, as its vendor describes it."""

    name: str
    memory_gib: float
    """Usable device memory in GiB."""
    bf16_tflops: float
    """Dense matrix peak in 1e12 operations per second."""
    fp16_tflops: float
    fp32_tflops: float
    memory_gb_per_second: float
    """Device memory bandwidth in 1e9 bytes per second."""
    processors: int = 108
    """Streaming multiprocessors: decides how matrix tiles fill the device in waves."""
    gemm_efficiencies: tuple[tuple[int, int, int, int, float], ...] = ()
    """(batch, m, n, k, fraction of the matrix peak) of GEMM shapes that were measured; other shapes are
    modelled."""

    def __post_init__(self) -> None:
        _check_numbers(self, "cluster device")
        for entry in self.gemm_efficiencies:
            sizes = len(entry) == 5 and all(type(size) is int and size > 0 for size in entry[:4])
            if not sizes or type(entry[4]) not in (int, float) or not 0 < entry[4] <= 1:
                raise DescriptionError(
                    f"cluster device.gemm_efficiencies: {entry!r}; valid: batch, m, n, k, fraction of peak"
                )

    @property
    def memory_bytes(self) -> int:
        """Usable device memory in bytes."""
        return int(self.memory_gib * 2**30)

    def peak_flops(self, precision: str) -> float:
        """Dense matrix peak in operations per second for ``bf16``, ``fp16`` or ``fp32``."""
        return {"bf16": self.bf16_tflops, "fp16": self.fp16_tflops, "fp32": self.fp32_tflops}[precision] * 1e12


@dataclass(kw_only=True, frozen=True, slots=True)
class Link:
    """A level of the network."""

    gb_per_second: float
    """Bandwidth of ONE device in one direction, in 1e9 bytes per second. Between nodes: the node's share of
    one device (a node with eight 200 Gbit/s adapters and eight devices has 25)."""
    latency_us: float
    """Time of one point-to-point message of no size, in microseconds."""
    efficiency: float = 0.8
    """Fraction of the bandwidth that large collectives reach."""
    base_us: float = 20.0
    """Fixed time to start a collective, in microseconds."""
    group_efficiency: tuple[tuple[int, float], ...] = ()
    """(ranks, efficiency) where it was measured and differs by group size, e.g. on partly connected NVLink
    boards; other sizes use ``efficiency``."""
    spreads_groups: bool = True
    """Between nodes: a group with several members in a node drives the adapters of all of them. False where its
    ring must leave a node by the adapter it came in by (NCCL before 2.12 cannot pass data through the device
    beside another adapter): then only groups that hold a whole node, or one device of it, drive them all."""

    def __post_init__(self) -> None:
        if type(self.spreads_groups) is not bool:
            raise DescriptionError(
                f"cluster link.spreads_groups: {shown(self.spreads_groups)}; valid: true or false"
            )
        _check_numbers(self, "cluster link", zero_allowed=("latency_us", "base_us"))
        for pair in self.group_efficiency if isinstance(self.group_efficiency, tuple) else (None,):
            match pair:
                case (int(ranks), int() | float() as efficiency) if ranks > 1 and 0 < efficiency < float("inf"):
                    continue
            raise DescriptionError(
                f"cluster link.group_efficiency: {shown(pair or self.group_efficiency)}; "
                "valid: a mapping of group sizes > 1 to numbers > 0"
            )

    def bandwidth(self, ranks: int) -> float:
        """Bytes per second of one device that a large collective over ``ranks`` devices reaches."""
        return self.gb_per_second * GB * dict(self.group_efficiency).get(ranks, self.efficiency)


@dataclass(kw_only=True, frozen=True, slots=True)
class Host:
    """A node's own memory as ONE of its devices meets it while all of them use it; offloading needs it."""

    gb_per_second: float
    """Bandwidth of the link between a device and its host (PCIe) in one direction, in 1e9 bytes per second."""
    memory_gb_per_second: float
    """Bandwidth of the host's memory, divided by the devices of the node, in 1e9 bytes per second."""
    efficiency: float = 0.8
    """Fraction of the link's bandwidth that copies from and to page-locked memory reach."""
    memory_gib: float = 0.0
    """Memory of a node that offloaded states may fill, in GiB; 0 where it is not known, and not checked."""
    source: str = "constant"
    """``measured`` where the bandwidths are what the live ranks reached, else ``constant``."""

    def __post_init__(self) -> None:
        _check_numbers(self, "cluster host", zero_allowed=("memory_gib",))
        if self.source not in ("constant", "measured"):
            raise DescriptionError(f"cluster host.source: {shown(self.source)}; valid: constant, measured")
        if self.efficiency > 1:
            raise DescriptionError(f"cluster host.efficiency: {self.efficiency}; valid: a number > 0 and <= 1")


@dataclass(kw_only=True, frozen=True, slots=True)
class Constants:
    """What a device reaches of its peak: few, physical, fitted by ``galvatron calibrate``.

    The defaults are typical of recent data-centre devices; an estimate made with them is uncalibrated.
    """

    gemm_efficiency: float = 0.75
    """Fraction of the matrix peak that a GEMM which fills the device reaches."""
    attention_efficiency: float = 0.5
    """Fraction of the matrix peak that fused (flash) attention reaches."""
    memory_efficiency: float = 0.75
    """Fraction of the memory bandwidth that an element-wise kernel reaches."""
    kernel_us: float = 4.0
    """Fixed time of one operator on the device beside its work: start, drain and the small kernels around it
    (casts, transpositions, bias), in microseconds."""
    host_us: float = 40.0
    """Time the host needs to issue one operator, in microseconds; the floor of small models."""
    step_ms: float = 5.0
    """Time per training step outside all layers (data, logging, host synchronisation), in milliseconds."""
    overlap_slowdown: float = 1.15
    """Both computation and communication take this much longer while they overlap."""
    memory_slack: float = 0.03
    """Fraction of a plan's memory that allocator rounding and fragmentation add."""
    workspace_mib: float = 80.0
    """Workspaces of matrix and attention libraries and small buffers inside the allocator, in MiB."""
    context_gib: float = 1.0
    """Memory of the driver context and of communication libraries, outside the allocator, in GiB."""

    def __post_init__(self) -> None:
        _check_numbers(
            self,
            "cluster constants",
            zero_allowed=("kernel_us", "host_us", "step_ms", "memory_slack", "workspace_mib", "context_gib"),
        )
        if self.overlap_slowdown < 1:
            raise DescriptionError(f"cluster constants.overlap_slowdown: {self.overlap_slowdown}; valid: >= 1")


@dataclass(kw_only=True, frozen=True, slots=True)
class Calibration:
    """On what the constants were fitted, and how far estimates were off on rows that were held out."""

    runs: int = 0
    """Measured runs that the constants were fitted on; 0 where they were not fitted."""
    table: str = ""
    """File or source of the runs."""
    mean_error: float = 0.0
    """Mean absolute relative error of the step time over the held-out rows."""
    low: float = 0.0
    """10th percentile of measured / predicted over the held-out rows; 0 where unknown."""
    high: float = 0.0
    """90th percentile of measured / predicted over the held-out rows; 0 where unknown."""
    memory_runs: int = 0
    """Measured runs that memory was fitted on; 0 where it was not."""
    memory_table: str = ""
    """File or source of these runs."""
    memory_mean_error: float = 0.0
    """As ``mean_error``, of a rank's allocated memory."""
    memory_low: float = 0.0
    """As ``low``, of a rank's allocated memory."""
    memory_high: float = 0.0
    """As ``high``, of a rank's allocated memory."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Cluster:
    """Nodes of equal devices."""

    name: str
    nodes: int
    devices_per_node: int
    device: Device
    intra_node: Link
    inter_node: Link
    host: Host | None = None
    """None where nothing is known of the hosts: nothing can be offloaded."""
    constants: Constants = field(default_factory=Constants)
    calibration: Calibration = field(default_factory=Calibration)
    layer_factors: tuple[tuple[int, int, int, float], ...] = ()
    """(FLOPs, bytes, collective bytes, factor) of one micro-batch of a layer or head on one rank, forward and
    backward: work that several measured runs had in common, and how much longer it took than the constants
    say. Other work is priced by the constants alone."""
    sources: tuple[str, ...] = ()
    """Where the numbers come from."""

    def __post_init__(self) -> None:
        _check_numbers(self, "cluster")
        for entry in self.layer_factors:
            sizes = len(entry) == 4 and all(type(size) is int and size >= 0 for size in entry[:3])
            if not sizes or type(entry[3]) not in (int, float) or not 0 < entry[3] <= 10:
                raise DescriptionError(
                    f"cluster layer_factors: {shown(entry)}; valid: FLOPs, bytes, collective bytes, factor"
                )
        if not isinstance(self.name, str):
            raise DescriptionError(f"cluster name: {shown(self.name)}; valid: text")

    @property
    def world_size(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.devices_per_node

    @property
    def memory_bytes(self) -> int:
        """Usable memory of one device, in bytes."""
        return self.device.memory_bytes

    def with_nodes(self, nodes: int) -> "Cluster":
        """The same cluster with another number of nodes."""
        return replace(self, nodes=nodes)

    def members_per_node(self, ranks: int, stride: int = 1) -> int:
        """Members of one group that share a node.

        Args:
            ranks: size of the group.
            stride: distance between neighbouring ranks of the group.

        Returns:
            At least 1; ``ranks`` where the whole group lies in one node.
        """
        return max(1, min(ranks, self.devices_per_node // stride))

    def fingerprint(self) -> str:
        """16 hex digits that change with anything that changes an estimate; name and sources do not count."""
        content = asdict(self)
        for name in ("name", "sources", "calibration"):
            del content[name]
        if self.host is None:
            # A cluster of which nothing more is said keeps the fingerprint that it had.
            del content["host"]
        else:
            del content["host"]["source"]
            if not self.host.memory_gib:
                del content["host"]["memory_gib"]
        if not self.layer_factors:
            del content["layer_factors"]
        for link in ("intra_node", "inter_node"):
            if content[link]["spreads_groups"]:
                del content[link]["spreads_groups"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


_PARTS = {
    "device": Device,
    "intra_node": Link,
    "inter_node": Link,
    "constants": Constants,
    "calibration": Calibration,
    "host": Host,
}


def _build(kind: type, content: object, where: str) -> object:
    """Makes a value of ``kind`` from a mapping; names the file and key of anything unknown or missing."""
    if not isinstance(content, dict):
        raise DescriptionError(
            f"{where}: {shown(content)} is not a mapping; valid: keys {', '.join(_keys(kind))}"
        )
    known = _keys(kind)
    for key in content:
        if key not in known:
            raise DescriptionError(f"{where}: unknown key {shown(key)}; {did_you_mean(key, known)}")
    values = dict(content)
    for key, part in _PARTS.items():
        if kind is Cluster and key in values:
            values[key] = _build(part, values[key], f"{where}: {key}")
    if isinstance(values.get("group_efficiency"), dict):
        sizes = values["group_efficiency"].items()
        values["group_efficiency"] = tuple(
            sorted(sizes, key=lambda size: size[0] if type(size[0]) is int else 0)
        )
    for key in ("gemm_efficiencies", "layer_factors"):
        if isinstance(values.get(key), list):
            values[key] = tuple(tuple(entry) if isinstance(entry, list) else (entry,) for entry in values[key])
    if "sources" in values:
        if not isinstance(values["sources"], list):
            raise DescriptionError(f"{where}: sources is not a list; valid: a list of lines")
        values["sources"] = tuple(str(line) for line in values["sources"])
    try:
        return kind(**values)
    except TypeError as error:
        missing = [item for item in known if item not in values and f"'{item}'" in str(error)]
        raise DescriptionError(f"{where}: missing {', '.join(missing)}; valid: all of them given") from error
    except DescriptionError as error:
        raise DescriptionError(f"{where}: {error}") from error


def _keys(kind: type) -> list[str]:
    return [item.name for item in fields(kind)]


def read_cluster(path: str | Path, nodes: int | None = None) -> Cluster:
    """Reads a cluster description.

    Args:
        path: a YAML file with the fields of :class:`Cluster`; ``configs/clusters/`` holds examples;
            or the name of a shipped one, such as ``a100-80g``.
        nodes: how many nodes there are, instead of what the file says.

    Returns:
        The cluster.

    Raises:
        DescriptionError: the file cannot be read, or a key or value in it is not valid.
    """
    path = find_description("clusters", path)
    content = {"name": path.stem, "nodes": 1, **read_document(path, DescriptionError)}
    if nodes is not None:
        content["nodes"] = nodes
    return _build(Cluster, content, f"cluster file {path}")


def cluster_document(cluster: Cluster) -> str:
    """The YAML text that :func:`read_cluster` reads back to an equal cluster."""
    content = asdict(cluster)
    if cluster.host is None:
        del content["host"]
    for link in ("intra_node", "inter_node"):
        content[link]["group_efficiency"] = dict(content[link]["group_efficiency"])
    content["device"]["gemm_efficiencies"] = [list(entry) for entry in content["device"]["gemm_efficiencies"]]
    content["layer_factors"] = [list(entry) for entry in content["layer_factors"]]
    content["sources"] = list(content["sources"])
    return yaml.safe_dump(content, sort_keys=False, width=110)
