"""The question of a training job and how it is answered, the same on live ranks and for a command line."""

from collections.abc import Callable

from galvatron_megatron.cost.analytic import AnalyticCostModel
from galvatron_megatron.cost.measured import MeasuredCostModel
from galvatron_megatron.cost.protocol import CostModel
from galvatron_megatron.describe.model import Model
from galvatron_megatron.plan.constraints import Constraints
from galvatron_megatron.plan.layer_kind import LayerKind
from galvatron_megatron.plan.strategy import Offload
from galvatron_megatron.search.engine import Progress, search
from galvatron_megatron.search.host_memory import search_within_hosts
from galvatron_megatron.search.request import UNIFORM_MARGIN, SearchRequest
from galvatron_megatron.search.reranking import rerank
from galvatron_megatron.search.result import SearchResult


def can_interleave(model: Model) -> bool:
    """Whether Megatron has an interleaved schedule for a model; for hybrid models it has none."""
    return any(layer.kind in (LayerKind.BLOCK, LayerKind.MOE_BLOCK) for layer in model.layers)


def job_request(
    model: Model,
    *,
    world_size: int,
    devices_per_node: int,
    memory_bytes: int,
    global_batch_size: int,
    constraints: Constraints,
    uniform: bool,
    offload: Offload,
    max_zero: int,
) -> SearchRequest:
    """The question of a job under ``--galvatron-auto``, within what a profile can hold prices of.

    Args:
        model: what to train.
        world_size: ranks of the job.
        devices_per_node: ranks of a node.
        memory_bytes: that a plan may use on one device.
        global_batch_size: samples of a step.
        constraints: what the command line fixes by hand.
        uniform: only plans that run every layer alike.
        offload: the most that may be kept in host memory.
        max_zero: highest ZeRO stage.

    Raises:
        SearchError: names the value that is wrong.
    """
    return SearchRequest(
        model=model,
        world_size=world_size,
        devices_per_node=devices_per_node,
        memory_bytes=memory_bytes,
        global_batch_size=global_batch_size,
        constraints=constraints,
        offloads=offload.and_less,
        layerwise=not uniform,
        max_zero=max_zero,
        # Not measured.
        allow_cp=False,
        allow_expert_parallel=False,
        allow_interleaving=can_interleave(model),
        uniform_margin=UNIFORM_MARGIN,
    )


def find_plan(
    request: SearchRequest,
    cost_model: CostModel,
    host_bytes: int | None,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[SearchResult, str | None]:
    """Searches within device and host memory, and chooses among the best by their simulated schedules.

    Args:
        request: the question.
        cost_model: the prices; tables without terms (Hetu-Galvatron's) are not simulated.
        host_bytes: what a node has for offloaded states; None where that is not known.
        progress: told how far the search is.

    Returns:
        The answer, and a line about what does not fit in host memory.

    Raises:
        SearchError: nothing fits.
    """

    def find(asked: SearchRequest) -> SearchResult:
        found = search(asked, cost_model, progress=progress)
        has_terms = isinstance(cost_model, AnalyticCostModel | MeasuredCostModel)
        return rerank(found, asked, cost_model) if has_terms else found

    return search_within_hosts(request, cost_model, host_bytes, find)
