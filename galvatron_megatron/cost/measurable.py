"""Which jobs measured prices hold for, whoever asks: a live job, or a command line read elsewhere."""

from galvatron_megatron.cost.options import RunOptions
from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.plan.constraints import Constraints


def check_measured_experts(fixed: Constraints) -> None:
    """Refuses layouts of experts that are not measured.

    Args:
        fixed: what a Megatron command line fixes.

    Raises:
        GalvatronError: names the flag and what is valid.
    """
    if fixed.expert_parallel not in (None, 1):
        raise GalvatronError(
            f"--expert-model-parallel-size {fixed.expert_parallel}: a job measures layers with all experts "
            "on every rank; valid: 1, or a plan of galvatron search by --galvatron-plan FILE"
        )
    if fixed.expert_tensor_parallel not in (None, fixed.tp or 1):
        raise GalvatronError(
            f"--expert-tensor-parallel-size {fixed.expert_tensor_parallel}: a job measures experts split "
            f"like the rest of a layer; valid: {fixed.tp or 1}, or leave it out"
        )


def check_measured_optimizer(options: RunOptions) -> None:
    """Refuses optimizers that are not measured.

    Args:
        options: of the job.

    Raises:
        GalvatronError: names the flag and what is valid.
    """
    if options.optimizer_instances > 1:
        raise GalvatronError(
            f"--num-distributed-optimizer-instances {options.optimizer_instances}: a job "
            "measures optimizers sharded over all replicas; valid: 1"
        )
