"""Plans a job on its live ranks: profile, search, and what is kept of both."""

import contextlib
import copy
import io
import math
import os
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from galvatron_megatron import __version__
from galvatron_megatron.cost.host_memory import free_host_bytes
from galvatron_megatron.cost.measurable import check_measured_experts, check_measured_optimizer
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.options import RunOptions, run_options
from galvatron_megatron.describe.cluster import Cluster
from galvatron_megatron.describe.megatron_args import plan_constraints
from galvatron_megatron.describe.model import Model
from galvatron_megatron.describe.plan_check import check_plan
from galvatron_megatron.describe.profile import Profile
from galvatron_megatron.describe.profile_store import check_directory, default_directory
from galvatron_megatron.errors import GalvatronError, SearchError, UnsupportedPlanError
from galvatron_megatron.integration.channel import Channel
from galvatron_megatron.integration.decision import Decision, DecisionStore
from galvatron_megatron.integration.job_model import job_model
from galvatron_megatron.integration.options import Options
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.line import plan_line
from galvatron_megatron.plan.megatron_arguments import megatron_arguments, runs_on_stock_megatron
from galvatron_megatron.plan.plan import Fingerprints, Plan
from galvatron_megatron.plan.runnable import HIGHEST_STOCK_ZERO, HIGHEST_ZERO
from galvatron_megatron.plan.serialization import read_plan
from galvatron_megatron.plan.strategy import Offload
from galvatron_megatron.profiler.needs import ProfileNeeds, tensor_degrees
from galvatron_megatron.profiler.session import profile_live_ranks
from galvatron_megatron.profiler.switches import switches_of
from galvatron_megatron.profiler.topology import facts_of_this_rank, software_versions
from galvatron_megatron.runtime.support import CHANGING_BATCH
from galvatron_megatron.search.decision_tree import Space
from galvatron_megatron.search.host_memory import offloads
from galvatron_megatron.search.job import find_plan, job_request
from galvatron_megatron.search.request import UNIFORM_MARGIN, SearchRequest
from galvatron_megatron.search.result import SearchResult

_RECOMPUTE_ARGUMENTS = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
)


def _needs_deepspeed(plan: Plan) -> bool:
    """True where some states are kept as DeepSpeed alone does it."""
    return offloads(plan) or any(
        strategy.zero > HIGHEST_STOCK_ZERO for strategy in (plan.base, *plan.strategies)
    )


def _searched(
    request: SearchRequest, costs: MeasuredCostModel, left_out: Sequence[str]
) -> tuple[SearchResult, str | None]:
    """Searches; where nothing is found, the error names what was left out as well.

    Returns:
        The answer, and a line about what does not fit in host memory.
    """
    host_bytes = free_host_bytes(costs.cluster, costs.profile, request.memory_bytes)
    try:
        return find_plan(request, costs, host_bytes)
    except SearchError as error:
        could = host_bytes and request.layerwise and request.offloads == (Offload.NONE,) and not left_out
        more = ("states may lie in host memory by --galvatron-offload optimizer",) if could else left_out
        raise SearchError("; ".join((str(error), *more))) from None


class JobPlanner:
    """Finds the plan of one job; the same object is made on every rank.

    Args:
        args: Megatron's parsed arguments, before its validation.
        defaults: the script's ``args_defaults``.
        options: our flags.
        words: the command line behind the script's name.
        channel: to the other ranks.
        validate: Megatron's own ``validate_args``.

    Raises:
        GalvatronError: the command line does not describe a job that can be planned.
    """

    def __init__(
        self,
        args: Namespace,
        defaults: Mapping[str, Any],
        options: Options,
        words: Sequence[str],
        channel: Channel,
        validate: Callable[..., Any],
    ) -> None:
        self.args = args
        self.defaults = dict(defaults)
        self.options = options
        self.channel = channel
        self._validate = validate
        self.constraints: Constraints = plan_constraints(words)
        if options.plan_file is None:
            check_measured_experts(self.constraints)
        check_measured_optimizer(self._run_options())
        for name in CHANGING_BATCH:
            if getattr(args, name, None):
                flag = f"--{name.replace('_', '-')}"
                raise GalvatronError(f"{flag}: is not planned for; valid: a fixed --global-batch-size")
        if args.global_batch_size is None:
            raise GalvatronError(
                "--global-batch-size: missing; a plan is made for a batch; valid: an integer >= 1"
            )
        if options.offload is not Offload.NONE and find_spec("deepspeed") is None:
            raise GalvatronError(
                f"--galvatron-offload {options.offload.value}: deepspeed, which keeps states in host memory, "
                "is not installed; valid: pip install deepspeed, or none"
            )
        self.model: Model = job_model(args, self.defaults)

    def decide(self) -> Decision:
        """Finds the plan; every rank calls this.

        Returns:
            The decision, equal on every rank.

        Raises:
            GalvatronError: no plan can be made.
        """
        if self.options.plan_file is not None:
            return self._shared(self._from_file)
        directory = Path(self.channel.share(lambda: str(self._directory())))
        kept = self.channel.share(lambda: self._kept(directory))
        if kept["decision"] is not None:
            found = Decision.from_dict(kept["decision"])
            return replace(found, profile_seconds=0.0, search_seconds=0.0, source=kept["source"])
        # An impossible request is refused before anything is measured.
        self.channel.share(lambda: Space(request=self._request()).outers() and None)
        notes = (kept["note"],) if kept["note"] else ()
        started = time.perf_counter()
        profile, cluster = profile_live_ranks(
            self.model,
            self.args,
            self._needs(),
            directory,
            args_defaults=self.defaults,
            memory_gb=self.options.memory_gb,
            again=self.options.again,
        )
        profile_seconds = time.perf_counter() - started
        decision = self._shared(lambda: self._search(profile, cluster, profile_seconds, notes))
        return self._shared(lambda: self._keep(directory, decision))

    def arguments(self, plan: Plan) -> dict[str, object]:
        """Megatron's arguments for a plan; for one whose layers differ, those of its base layout."""
        is_stock = runs_on_stock_megatron(plan)
        found = megatron_arguments(plan, self.model, sharding_by_runtime=not is_stock)
        if not is_stock:
            found |= dict.fromkeys(_RECOMPUTE_ARGUMENTS)
        return found

    def apply(self, plan: Plan, args: Namespace) -> None:
        """Sets Megatron's arguments to a plan."""
        for name, value in self.arguments(plan).items():
            if not hasattr(args, name):
                if value not in (None, False):
                    raise GalvatronError(
                        f"plan: needs --{name.replace('_', '-')}, which this Megatron does not have; "
                        "valid: a newer megatron-core"
                    )
                continue
            setattr(args, name, value)
        args._is_global_batch_size_explicitly_specified = True

    # What the job is.

    def _job(self) -> dict[str, object]:
        """Everything that decides the plan, as JSON values."""
        facts = facts_of_this_rank()
        constraints = {name: value for name, value in asdict(self.constraints).items() if value is not None}
        return {
            "version": __version__,
            "model": self.model.fingerprint(),
            "world_size": self.channel.world_size,
            "ranks_per_node": os.environ.get("LOCAL_WORLD_SIZE", ""),
            "device": facts.device,
            "memory_bytes": facts.memory_bytes,
            "processors": len(facts.processors),
            "software": software_versions(),
            "backend": self.args.distributed_backend,
            "global_batch_size": self.args.global_batch_size,
            "constraints": constraints,
            "memory_gb": self.options.memory_gb,
            "uniform": self.options.uniform,
            "offload": self.options.offload.value,
            "max_zero": self._max_zero(),
            "ulysses": self._ulysses_degrees(),
            "run_options": asdict(self._run_options()),
            "switches": switches_of(self.args),
            "margin": UNIFORM_MARGIN,
        }

    def _run_options(self) -> RunOptions:
        return run_options(vars(self.args))

    def _max_zero(self) -> int:
        """The highest ZeRO stage that this job could train with."""
        return HIGHEST_STOCK_ZERO if self.options.uniform or self._without_deepspeed() else HIGHEST_ZERO

    def _without_deepspeed(self) -> str:
        """Why DeepSpeed shards nothing, or ""."""
        if self.options.zero_backend == "megatron":
            return "as --galvatron-zero-backend megatron asks for"
        return "deepspeed is not installed" if find_spec("deepspeed") is None else ""

    # What is kept.

    def _directory(self) -> Path:
        given = self.options.profile_directory
        # A read-only store that holds everything serves as it is; measuring checks again.
        return check_directory(given or default_directory(), create=given is None, write=False).absolute()

    def _kept(self, directory: Path) -> dict[str, object]:
        store, job = DecisionStore(directory), self._job()
        if self.options.again:
            return {"decision": None, "note": "", "source": ""}
        decision, note = store.read(job)
        found = None if decision is None else decision.to_dict()
        return {"decision": found, "note": note, "source": f"kept in {store.path(job)}"}

    def _keep(self, directory: Path, decision: Decision) -> Decision:
        """Keeps a plan for the next job; where it cannot be kept, this job trains under it all the same."""
        try:
            DecisionStore(directory).write(self._job(), decision)
        except GalvatronError as error:
            note = f"this plan is not kept, the next job searches again: {error}"
            return replace(decision, notes=(*decision.notes, note))
        return decision

    # How a plan is found.

    def _shared(self, work: Callable[[], Decision]) -> Decision:
        return Decision.from_dict(self.channel.share(lambda: work().to_dict()))

    def _from_file(self) -> Decision:
        path = self.options.plan_file
        plan = read_plan(path)
        check_plan(
            plan,
            model=self.model,
            world_size=self.channel.world_size,
            global_batch_size=self.args.global_batch_size,
            where=str(path),
        )
        self.constraints.check(plan)
        return Decision(plan=plan, source=f"read from {path}")

    def _needs(self) -> ProfileNeeds:
        """What to measure: whatever is fixed by hand narrows it."""

        def only(value: object) -> tuple | None:
            return None if value is None else (value,)

        fixed = self.constraints
        return ProfileNeeds.for_job(
            self.model,
            self.channel.world_size,
            self.args.global_batch_size,
            tps=only(fixed.tp),
            micro_batch_sizes=self._micro_batch_sizes(),
            sequence_parallel=only(fixed.sequence_parallel),
            ulysses=self._ulysses_degrees(),
            zeros=only(fixed.zero),
            host_step=self.options.offload is not Offload.NONE,
        )

    def _ulysses_degrees(self) -> tuple[int, ...]:
        """Degrees of Ulysses that the search will ask for."""
        return Space(request=self._request()).ulysses_degrees()

    def _micro_batch_sizes(self) -> list[int] | None:
        """Sizes that a layer can meet where the micro-batch is fixed by hand; None for all.

        A layer with another tp than the base layout has another dp, so it sees another share of the samples.
        """
        size = self.constraints.micro_batch_size
        if size is None:
            return None
        if self.options.uniform or self.constraints.tp is not None:
            return [size]
        degrees = tensor_degrees(self.model, self.channel.world_size)
        return sorted({size * a // b for a in degrees for b in degrees if size * a % b == 0})

    def _request(self) -> SearchRequest:
        """The question to the search, before devices and memory are measured."""
        world_size = self.channel.world_size
        return job_request(
            self.model,
            world_size=world_size,
            devices_per_node=int(os.environ.get("LOCAL_WORLD_SIZE") or world_size),
            memory_bytes=1 << 60,
            global_batch_size=self.args.global_batch_size,
            constraints=self.constraints,
            uniform=self.options.uniform,
            offload=self.options.offload,
            max_zero=self._max_zero(),
        )

    def _search(
        self, profile: Profile, cluster: Cluster, profile_seconds: float, notes: tuple[str, ...]
    ) -> Decision:
        started = time.perf_counter()
        costs = MeasuredCostModel(self.model, cluster, profile, self._run_options())
        request = replace(
            self._request(),
            devices_per_node=cluster.devices_per_node,
            memory_bytes=math.floor(cluster.memory_bytes),
        )
        left_out: tuple[str, ...] = ()
        if not self.options.uniform and (why := self._without_deepspeed()):
            left_out = (f"only ZeRO 0 and 1: {why}",)
        result, note = _searched(request, costs, left_out)
        # What the runtime refuses is left out: what DeepSpeed would do first, then layers that differ.
        on_device = {"offloads": (Offload.NONE,)}
        stock = on_device | {"max_zero": HIGHEST_STOCK_ZERO}
        for words, concerns, changes in (
            ("nothing is offloaded", offloads, on_device),
            ("only ZeRO 0 and 1", _needs_deepspeed, stock),
            ("only plans that run every layer alike", lambda plan: True, stock | {"layerwise": False}),
        ):
            if runs_on_stock_megatron(result.plan) or not concerns(result.plan):
                continue
            if problem := self._runtime_problem(result.plan):
                left_out = (*left_out, f"{words}: {problem}")
                request = replace(request, **changes)
                result, note = _searched(request, costs, left_out)
        seconds = time.perf_counter() - started
        notes = (*notes, *left_out, *([note] if note else []))
        return self._decision(result, profile, cluster, profile_seconds, seconds, notes)

    def _decision(
        self,
        result: SearchResult,
        profile: Profile,
        cluster: Cluster,
        profile_seconds: float,
        search_seconds: float,
        notes: tuple[str, ...],
    ) -> Decision:
        marks = Fingerprints(
            model=self.model.fingerprint(), cluster=cluster.fingerprint(), profile=profile.fingerprint()
        )
        return Decision(
            plan=replace(result.plan, fingerprints=marks),
            step_seconds=result.step_seconds,
            memory_bytes=tuple(result.memory_bytes),
            profile_seconds=profile_seconds,
            search_seconds=search_seconds,
            runners_up=tuple((plan_line(plan), seconds) for plan, seconds in result.runners_up),
            source="searched",
            notes=notes,
        )

    def _runtime_problem(self, plan: Plan) -> str:
        """Why the runtime cannot run a plan whose layers differ under the job's other arguments, or ""."""
        from galvatron_megatron.runtime.support import check_supported

        trial = copy.deepcopy(self.args)
        self.apply(plan, trial)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._validate(trial, dict(self.defaults))
            check_supported(plan, trial)
        except (AssertionError, ValueError, RuntimeError, UnsupportedPlanError) as error:
            return str(error).strip() or type(error).__name__
        return ""
