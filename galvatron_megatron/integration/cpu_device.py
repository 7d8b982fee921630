"""CPU ranks: Megatron's CUDA-only training loop on the CPU, over gloo.

Megatron asks for CUDA by name everywhere. This back end answers in CUDA's place: while it is installed, a
tensor asked for on ``cuda`` is made on the CPU, and ``torch.cuda`` answers from ``cpu_stand_ins``. Nothing of
Megatron is edited and the numbers are the CPU's own, so real jobs of every parallel kind (tensor and sequence
parallel, pipelined, interleaved, recomputed, with the distributed optimizer) can be run, tested and profiled
where there is no GPU.

    from galvatron_megatron.integration import cpu_device
    cpu_device.install()                   # once per rank, before or after megatron is imported
    ...
    cpu_device.configure(args)             # Megatron's parsed arguments, before validate_args

or, for a while only, ``with cpu_device.CpuDevice(): ...``. ``--galvatron-device cpu`` does both for a job.

What it cannot do: CUDA graphs, Transformer Engine, fused kernels, NCCL. They are switched off by ``configure``.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration.cpu_megatron import configure, megatron_patches
from galvatron_megatron.integration.cpu_stand_ins import MemoryCounters, stand_ins
from galvatron_megatron.integration.patches import Patches

__all__ = ["CpuDevice", "configure", "install", "uninstall"]


def _names_cuda(device: object) -> bool:
    """True for every way to say "a CUDA device": an index, ``"cuda:1"``, ``torch.device("cuda")``."""
    if isinstance(device, bool):
        return False
    if isinstance(device, int):
        return True
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


_VARIABLES = {"TORCHDYNAMO_DISABLE": "1", "DS_ACCELERATOR": "cpu"}
"""Set while installed: for what is imported later. DeepSpeed would take the stand-ins for a device."""

_REDIRECTED = frozenset(
    (torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.to, torch.Tensor.type, torch.Tensor.backward)
)
"""What can mean CUDA without an argument given by name."""


class _CudaMeansCpu(TorchFunctionMode):
    """Sends whatever is asked of CUDA to the CPU; every other call passes unchanged."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not kwargs and function not in _REDIRECTED:
            # Nearly every call of a training step; a tenth of a small model's time is saved here.
            return function(*args)
        kwargs = dict(kwargs or {})
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        if function is torch.Tensor.cuda or function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers tell CUDA parameters by this name.
            return function(*args).replace("torch.", "torch.cuda.", 1)
        if function is torch.Tensor.backward:
            # PyTorch leaves the mode around this call; gradient functions that allocate need it.
            with self:
                return torch.autograd.backward(args[0], kwargs.pop("gradient", None), **kwargs)
        return function(*args, **kwargs)


class CpuDevice:
    """The back end; installs itself on entry and removes itself on exit of a ``with`` block.

    Args:
        even_with_gpu: load also where a GPU is visible.

    Raises:
        GalvatronError: on ``install``, where a GPU is visible and ``even_with_gpu`` is not set.
    """

    def __init__(self, *, even_with_gpu: bool = False) -> None:
        self._even_with_gpu = even_with_gpu
        self._patches = Patches()
        self._mode: _CudaMeansCpu | None = None
        self.memory: MemoryCounters | None = None
        """Memory of this process while installed."""

    def install(self) -> "CpuDevice":
        """Makes CUDA mean CPU in this process and thread; does nothing where it already does.

        Only the calling thread's tensor calls are redirected (PyTorch keeps such modes per thread).

        Returns:
            Itself.
        """
        if self._mode is not None:
            return self
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus and not self._even_with_gpu:
            raise GalvatronError(
                f"device cpu: {gpus} GPU(s) are visible and would stay unused; valid: --galvatron-device cuda, "
                "or --galvatron-ignore-gpus beside --galvatron-device cpu"
            )
        # torch.compile would trace through the redirection, and compiling costs more than it gives here.
        self._disable_compile()
        self._set_variables()
        self.memory = MemoryCounters()
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
        for name, value in stand_ins(max(ranks_here, 1), self.memory).items():
            self._patches.set(torch.cuda, name, value)
        self._patches.set(torch.cuda.random, "get_rng_state", torch.cuda.get_rng_state)
        self._patches.set(torch.cuda.random, "set_rng_state", torch.cuda.set_rng_state)
        for name in ("range_push", "range_pop", "mark"):
            self._patches.set(torch.cuda.nvtx, name, lambda *args, **kwargs: None)
        # PyTorch's own machinery (data loader, process groups) must go on seeing that there is no accelerator.
        self._patches.set(torch.accelerator, "is_available", lambda *args, **kwargs: False)
        self._patches.set(torch.accelerator, "current_accelerator", lambda *args, **kwargs: None)
        self._patches.set(torch.accelerator, "current_device_index", lambda: 0)
        # Its check would run gradient functions outside the mode (recomputation calls torch.autograd.backward).
        self._patches.set(torch.autograd, "has_torch_function", lambda *args: False)
        for owner, name, value in megatron_patches():
            self._patches.set(owner, name, value)
        self._mode = _CudaMeansCpu()
        self._mode.__enter__()
        return self

    def _disable_compile(self) -> None:
        # Megatron's modules may be imported already, and their functions wrapped; a wrapped function asks for
        # the stance first, while dynamo.config.disable is looked at behind tables that know torch's own names.
        self._stance = torch.compiler.set_stance("force_eager")

    def _set_variables(self) -> None:
        self._variables = {name: os.environ.get(name) for name in _VARIABLES}
        os.environ |= _VARIABLES

    def _restore_variables(self) -> None:
        for name, value in self._variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def uninstall(self) -> None:
        """Puts everything back; does nothing where it is not installed."""
        if self._mode is None:
            return
        self._mode.__exit__(None, None, None)
        self._mode = None
        self._patches.undo()
        self._restore_variables()
        self._stance.__exit__(None, None, None)

    def __enter__(self) -> "CpuDevice":
        return self.install()

    def __exit__(self, *exception: object) -> None:
        self.uninstall()


_installed: CpuDevice | None = None


def install(*, even_with_gpu: bool = False) -> CpuDevice:
    """Installs the back end for the rest of the process; a second call returns the first one's.

    Args:
        even_with_gpu: load also where a GPU is visible.

    Returns:
        The installed back end.

    Raises:
        GalvatronError: a GPU is visible and ``even_with_gpu`` is not set.
    """
    global _installed
    if _installed is None:
        _installed = CpuDevice(even_with_gpu=even_with_gpu).install()
    return _installed


def installed() -> CpuDevice | None:
    """The back end of this process, or None."""
    return _installed


def uninstall() -> None:
    """Removes what ``install`` installed; does nothing where nothing was."""
    global _installed
    if _installed is not None:
        _installed.uninstall()
        _installed = None
