"""What prices a search: what was measured, Hetu-Galvatron's tables, or the data sheet of a cluster."""

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

from galvatron_megatron.commands.device_memory import usable_memory_bytes
from galvatron_megatron.commands.job_line import JobLine
from galvatron_megatron.commands.job_switches import options_of
from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.estimate import estimate_plan
from galvatron_megatron.cost.galvatron_table import GalvatronCostModel
from galvatron_megatron.cost.measurable import check_measured_experts, check_measured_optimizer
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.cost.protocol import CostModel
from galvatron_megatron.describe.cluster import Cluster, read_cluster
from galvatron_megatron.describe.galvatron_files import GalvatronFiles
from galvatron_megatron.describe.galvatron_store import galvatron_files
from galvatron_megatron.describe.galvatron_tables import galvatron_profile
from galvatron_megatron.describe.model import Model
from galvatron_megatron.describe.profile import Profile
from galvatron_megatron.describe.profile_cluster import cluster_from_ranks
from galvatron_megatron.describe.profile_key import measured_model
from galvatron_megatron.describe.profile_store import (
    check_directory,
    default_directory,
    from_json,
    list_profiles,
)
from galvatron_megatron.describe.switches import differing_switches
from galvatron_megatron.errors import DescriptionError, SearchError, did_you_mean
from galvatron_megatron.plan.plan import Plan
from galvatron_megatron.plan.runnable import HIGHEST_ZERO
from galvatron_megatron.plan.strategy import Offload
from galvatron_megatron.report.profile_report import provenance_line


@dataclass(kw_only=True, frozen=True, slots=True)
class Prices:
    """Where a search gets its prices from, and for what."""

    model: Model
    """As it was measured, where it was."""
    cluster: Cluster
    costs: CostModel
    options: RunOptions
    """Switches of the job."""
    limits: Mapping[str, object] = field(default_factory=dict)
    """Fields of the search request that leave out what has no price."""
    profile: str = ""
    """Fingerprint of the measured profile, or ""."""
    lines: tuple[str, ...] = ()
    """Where the prices come from, in words."""
    left_out: str = ""
    """What a search leaves out because it has no price, in words."""

    @property
    def is_measured(self) -> bool:
        """Whether a measured profile prices the search."""
        return isinstance(self.costs, MeasuredCostModel)

    def measured_share(self, plan: Plan) -> str:
        """How much of a plan's predicted time is measured, and what the rest is; "" where nothing is."""
        if not isinstance(self.costs, MeasuredCostModel):
            return ""
        estimate = estimate_plan(plan, self.costs)
        count = plan.micro_batches
        stage = max(estimate.stages, key=lambda stage: count * stage.seconds + stage.sync_seconds)
        terms = [(term, term.value * count) for term in stage.micro_batch_terms]
        terms += [(term, term.value) for term in stage.sync_terms]
        whole, rest = sum(seconds for _, seconds in terms), Counter()
        for term, seconds in terms:
            if term.source != "measured" and seconds:
                rest[term.name] += seconds
        if not rest:
            return "every part of this plan's predicted time is measured"
        names = ", ".join(f"{name} {seconds / whole:.1%}" for name, seconds in rest.most_common())
        return f"{1 - rest.total() / whole:.1%} of this plan's predicted time is measured; modelled: {names}"


def prices_of(
    arguments: argparse.Namespace,
    model: Model,
    decided: Mapping[str, tuple[str, object]],
    job: JobLine | None,
) -> Prices:
    """The prices that a command line asks for.

    A cluster's file is priced by its data sheet, or by Hetu-Galvatron's tables. Without one, ranks are priced
    that were measured: those of ``--profile``, else the newest stored profile of the model.

    Args:
        arguments: of the command.
        model: what to train.
        decided: what is decided by hand: name of the decision -> the flag as it was given, and the value.
        job: a Megatron command line, where one was given.

    Raises:
        GalvatronError: there are no such prices, or they are of something else.
    """
    if arguments.cluster is None:
        if arguments.galvatron_profile:
            raise SearchError(
                "--galvatron-profile: needs the memory of a device; valid: --cluster FILE beside it"
            )
        return measured_prices(arguments, model, decided, job)
    options = options_of(arguments, model) if job is None else job.options
    if arguments.profile is not None:
        raise SearchError(
            f"--profile {arguments.profile}: beside --cluster, whose prices are modelled; valid: one of the two"
        )
    cluster = read_cluster(arguments.cluster, nodes=arguments.nodes)
    if arguments.galvatron_profile:
        return _of_galvatron(arguments, model, cluster, options)
    fitted = cluster.calibration
    how = (
        f"fitted on {fitted.runs} measured runs ({fitted.table})"
        if fitted.runs
        else "not fitted to measured runs"
    )
    line = f"modelled from the description of cluster {cluster.name}, {how}"
    costs = AnalyticCostModel(model, cluster, options)
    return Prices(model=model, cluster=cluster, costs=costs, options=options, lines=(line,))


def _store(arguments: argparse.Namespace) -> Path:
    """The profile directory; the default one need not exist."""
    if arguments.profile_dir is not None:
        return check_directory(arguments.profile_dir, write=False)
    return default_directory()


def _of_galvatron(arguments: argparse.Namespace, model: Model, cluster: Cluster, options: RunOptions) -> Prices:
    store = _store(arguments)
    found = [galvatron_files(source, store) for source in arguments.galvatron_profile]
    files = reduce(GalvatronFiles.merged, found)
    profile = galvatron_profile(
        files, seq_length=model.seq_length, world_size=cluster.world_size, nodes=cluster.nodes
    )
    return Prices(
        model=model,
        cluster=cluster,
        costs=GalvatronCostModel(model, profile),
        options=options,
        limits={"allow_cp": False, "allow_plain_tp": False, "allow_expert_parallel": False},
        lines=(f"Hetu-Galvatron's profile {profile.name}, from {files.where}",),
    )


def measured_prices(
    arguments: argparse.Namespace,
    model: Model,
    decided: Mapping[str, tuple[str, object]],
    job: JobLine | None,
) -> Prices:
    """Prices of the ranks that a profile was measured on.

    Args:
        arguments: with ``profile``, ``profile_dir``, ``memory_gb``, ``nodes``, ``model`` and, of a search,
            ``offload``.
        model: what to train.
        decided: see ``prices_of``.
        job: a Megatron command line, where one was given.

    Raises:
        GalvatronError: there is no such profile, or something that is decided by hand was not measured.
    """
    if job is not None:
        check_measured_experts(job.constraints)
        check_measured_optimizer(job.options)
    profile, others = _chosen(arguments, model, job)
    found = measured_model(model, profile)
    name = profile.fingerprint()
    if found is None:
        raise DescriptionError(
            f"profile {name}: was measured for another model than {model.name} at sequence length "
            f"{model.seq_length}; valid: {_how_to_measure(arguments, job)}"
        )
    place = profile.provenance
    if arguments.nodes not in (None, place.nodes):
        raise SearchError(
            f"--nodes {arguments.nodes}: profile {name} was measured on {place.nodes}; valid: "
            f"{place.nodes}, or --cluster FILE for machines that were not measured"
        )
    cluster = cluster_from_ranks(profile)
    if arguments.memory_gb is not None:
        usable_memory_bytes(cluster, arguments.memory_gb)
        cluster = cluster_from_ranks(profile, memory_gb=arguments.memory_gb)
    options = options_of(arguments, found, profile) if job is None else job.options
    if job is None:
        check_measured_optimizer(options)
    costs = MeasuredCostModel(found, cluster, profile, options)
    _refuse_unmeasured(arguments, decided, profile, costs)
    lines = [f"measured: {provenance_line(profile)}"]
    if others:
        lines.append(f"{others} other profile(s) of this model are stored; --profile FINGERPRINT takes another")
    unmeasured = [
        "context and expert parallelism",
        *(() if costs.prices_ulysses else ("Ulysses",)),
        *(() if costs.prices_offloading else ("offloading (galvatron profile --offload measures it)",)),
    ]
    return Prices(
        model=found,
        cluster=cluster,
        costs=costs,
        options=options,
        limits={"allow_cp": False, "allow_expert_parallel": False}
        | ({} if costs.prices_ulysses else {"allow_ulysses": False}),
        profile=name,
        lines=tuple(lines),
        left_out=f"left out, as not measured: {', '.join(unmeasured)}",
    )


def _how_to_measure(arguments: argparse.Namespace, job: JobLine | None) -> str:
    what = f"--model {arguments.model}" if job is None else f"-- {job.words[0]} ARGS"
    return f"galvatron profile {what}"


def _chosen(arguments: argparse.Namespace, model: Model, job: JobLine | None) -> tuple[Profile, int]:
    """The profile asked for, else the newest complete one of the model; and how many others of it there are."""
    asked = arguments.profile
    if asked is not None and Path(asked).is_file():
        path = Path(asked)
        try:
            return from_json(path.read_text(encoding="utf-8", errors="replace"), asked), 0
        except OSError as error:
            raise DescriptionError(f"--profile {asked}: cannot be read ({error.strerror})") from None
    store = _store(arguments)
    stored = list_profiles(store)
    if asked is not None:
        matching = [profile for profile in stored if profile.fingerprint().startswith(asked)]
        if len(matching) != 1:
            kind = "is ambiguous" if matching else f"is no file, and not stored in {store}"
            names = [profile.fingerprint() for profile in matching or stored]
            valid = did_you_mean(asked, names) if names else "valid: galvatron profile first"
            raise DescriptionError(f"--profile {asked} {kind}; {valid}")
        return matching[0], 0
    fitting = [profile for profile in stored if measured_model(model, profile) is not None]
    if not fitting:
        raise DescriptionError(
            f"--cluster: missing, and profile directory {store} holds no profile of model {model.name} at "
            f"sequence length {model.seq_length}; valid: --cluster FILE, or "
            f"{_how_to_measure(arguments, job)} first"
        )
    if job is not None:
        differing = [differing_switches(profile, job.arguments) for profile in fitting]
        fitting = [profile for profile, names in zip(fitting, differing, strict=True) if not names]
        if not fitting:
            raise DescriptionError(
                f"profile directory {store}: holds profiles of model {model.name}, but none under "
                f"{', '.join(min(differing, key=len))}; valid: {_how_to_measure(arguments, job)} first, or "
                "--profile FINGERPRINT to do with one of them"
            )
    complete = [profile for profile in fitting if profile.steps and profile.speeds]
    return (complete or fitting)[0], len(fitting) - 1


def _refuse_unmeasured(
    arguments: argparse.Namespace,
    decided: Mapping[str, tuple[str, object]],
    profile: Profile,
    costs: MeasuredCostModel,
) -> None:
    """Refuses decisions made by hand that the profile has no price for."""
    points = [point for point in profile.parts if not point.failure]
    tps = {point.tp for point in points}
    measured: dict[str, set] = {
        "tp": tps,
        "cp": {1},
        "ep": {1},
        # Measured experts are split like the rest of a layer.
        "etp": {1} if "tp" not in decided else {decided["tp"][1]},
        "sequence_parallel": {point.sequence_parallel.value for point in points},
        "recompute": {point.recompute.value for point in points},
        "zero": {zero for zero in range(HIGHEST_ZERO + 1) if costs.has_optimizer(zero)},
        "offload": {kind.value for kind in Offload if costs.prices_offloading},
    }
    asked = dict(decided)
    if getattr(arguments, "offload", None) is not None:
        asked["offload"] = ("--offload", arguments.offload)
    for name, (flag, value) in asked.items():
        if value not in measured.get(name, {value}):
            valid = ", ".join(map(str, sorted(measured[name]))) or "leave it out"
            raise SearchError(
                f"{flag} {value}: not measured in profile {profile.fingerprint()}; valid: {valid}"
            )
