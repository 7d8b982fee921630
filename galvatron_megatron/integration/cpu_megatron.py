"""What Megatron itself must be told to run on CPU ranks: arguments, norms and the dataset helper."""

import copy
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial, partialmethod
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any

from galvatron_megatron.errors import GalvatronError

SETTINGS: dict[str, Any] = {
    "transformer_impl": "local",
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "attention_backend": "unfused",
    "use_flash_attn": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "cross_entropy_loss_fusion": False,
    "apply_rope_fusion": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "no_persist_layer_norm": True,
    "tp_comm_overlap": False,
    "cuda_graph_impl": "none",
    "num_workers": 0,
}
"""Megatron's arguments on CPU ranks: no kernel that exists only on CUDA, gloo instead of NCCL, and the data
loader in the rank's own process (forking one that already computes with threads can lock up)."""

HYBRID_SPEC = ["galvatron_megatron.integration.local_hybrid_spec", "hybrid_stack_spec"]
"""``--spec`` of hybrid models on CPU ranks: the same layers from Megatron's local modules."""


def configure(args: Namespace) -> dict[str, tuple[Any, Any]]:
    """Sets the arguments that CPU ranks need.

    Args:
        args: Megatron's parsed arguments, before ``validate_args``; changed in place.

    Returns:
        What changed: argument name to (value before, value now).

    Raises:
        GalvatronError: the arguments ask for something that exists on CUDA only.
    """
    for name in ("fp8", "fp4"):
        if getattr(args, name, None):
            raise GalvatronError(f"device cpu: --{name}-format needs Transformer Engine; valid: leave it out")
    wanted = {name: value for name, value in SETTINGS.items() if hasattr(args, name)}
    backend_enum = import_module("megatron.core.transformer.enums").AttnBackend
    wanted["attention_backend"] = backend_enum[SETTINGS["attention_backend"]]
    if getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None):
        wanted["spec"] = HYBRID_SPEC
    changed = {}
    for name, value in wanted.items():
        before = getattr(args, name)
        if before != value:
            changed[name] = (before, value)
            setattr(args, name, value)
    return changed


def megatron_patches() -> Iterator[tuple[object, str, Any]]:
    """What to replace in megatron-core on CPU ranks.

    Yields:
        Owner, attribute and new value.
    """
    norm = import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    build = staticmethod(partial(_build_norm, norm.__new__))
    yield norm, "__new__", build
    core = import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    yield core, "__init__", partialmethod(_build_core_attention, core.__init__)
    engine = import_module("megatron.core.extensions.transformer_engine")
    # The hybrid stack builds its final norm from this class whatever spec it is given.
    yield engine.TENorm, "__new__", build
    # Compiles fused kernels on random numbers, which on CUDA come from a generator of its own: here they would
    # move the one that initialises the weights, by an amount that depends on the tensor-parallel degree.
    yield import_module("megatron.training.initialize"), "_warmup_jit_function", lambda *args, **kwargs: None
    dispatcher = import_module("megatron.core.transformer.moe.token_dispatcher")
    yield dispatcher, "maybe_move_tensor_to_cpu", counts_on_the_host
    package = import_module("megatron.core.datasets")
    yield package, "__path__", [*package.__path__, *_compiled_helper_places()]
    datasets = import_module("megatron.core.datasets.utils")
    yield datasets, "compile_helpers", partial(compile_helpers, datasets.compile_helpers)


def counts_on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What Megatron's experts do to numbers of tokens on a GPU: as arrays, which an all-to-all takes as sizes.

    Megatron leaves tensors that are on the host already as they are, and an all-to-all does not take those.
    """
    return tensor.numpy() if as_numpy and hasattr(tensor, "numpy") else tensor


def _build_norm(
    original: Callable[..., Any],
    cls: type,
    config: Any,
    hidden_size: int,
    eps: float = 1e-5,
    **options: Any,
) -> Any:
    """Builds a torch norm also under sequence parallelism, which Megatron's wrapper refuses.

    The computation is the same on a slice of the sequence; what sequence parallelism adds is that the weight's
    gradient must be summed over the tp group, which Megatron does for parameters marked ``sequence_parallel``.
    """
    norm_class = import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    options.pop("has_residual", None)
    plain = config
    if config.sequence_parallel:
        plain = copy.copy(config)
        plain.sequence_parallel = False
    norm = original(norm_class, plain, hidden_size, eps, **options)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


def _build_core_attention(
    core: Any,
    original: Callable[..., None],
    *args: Any,
    k_channels: int | None = None,
    v_channels: int | None = None,
    **options: Any,
) -> None:
    """Builds the local core attention also for multi-latent attention, whose heads have widths of their own.

    Megatron says these widths to every core attention, and only Transformer Engine's takes them. The local one
    computes with any; it only needs to know how wide its output is.
    """
    original(core, *args, **options)
    if v_channels is not None:
        core.hidden_size_per_partition = core.num_attention_heads_per_partition * v_channels


def _compiled_helper_places() -> list[str]:
    """Where the installed megatron-core has its compiled dataset helper, for a checkout that has none."""
    if find_spec("megatron.core.datasets.helpers_cpp") is not None:
        return []
    try:
        files = distribution("megatron-core").files or []
    except PackageNotFoundError:
        return []
    return [str(file.locate().parent) for file in files if file.name.startswith("helpers_cpp.")]


def compile_helpers(original: Callable[[], None]) -> None:
    """Compiles Megatron's dataset helper unless it is there already.

    The wheel has the compiled helper but not the Makefile that ``original`` runs, and a checkout has the
    Makefile but often not what it needs.
    """
    try:
        import_module("megatron.core.datasets.helpers_cpp")
    except ImportError:
        original()
