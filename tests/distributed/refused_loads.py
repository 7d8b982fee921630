"""Jobs that must not begin from the checkpoint that they are given; on ranks only."""

from runtime_job import run_case

from galvatron_megatron.errors import PlanError
from galvatron_megatron.runtime.checkpoint import ReshardableOptimizer
from galvatron_megatron.runtime.data_parallel import PlannedDataParallel


def refused(rank, world_size, cases):
    """Runs cases; what each is refused with on this rank, and what was taken over before."""
    return [_refused(case) for case in cases]


def _refused(case):
    taken = []

    def noting(original):
        def load(self, *given, **named):
            taken.append(type(self).__name__)
            return original(self, *given, **named)

        return load

    originals = [(each, each.load_state_dict) for each in (PlannedDataParallel, ReshardableOptimizer)]
    for owner, original in originals:
        owner.load_state_dict = noting(original)
    try:
        run_case(case)
    except PlanError as error:
        return str(error), taken
    finally:
        for owner, original in originals:
            owner.load_state_dict = original
    return "not refused", taken
