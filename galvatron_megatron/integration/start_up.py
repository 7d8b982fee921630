"""Makes the ``--galvatron-*`` flags work on scripts that know nothing of them.

A line in a ``.pth`` file, which Python runs at every start, looks for such a flag on the command line. Only
where there is one does it call ``arm``, and all that does is wait for Megatron's argument parser to be
imported. A process that never imports it (``torchrun``, ``deepspeed``, anything else) goes on untouched.

This module imports the standard library only: it runs in front of everything else.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

FLAG_PREFIX = "--galvatron-"
TARGET = "megatron.training.arguments"
"""The module that holds Megatron's argument parser."""
DEEPSPEED_TARGET = "megatron.arguments"
"""The one of Megatron-DeepSpeed, where the package called megatron is its own."""

_LAUNCHERS = frozenset({"torchrun", "deepspeed", "deepspeed.pt", "ds", "accelerate", "srun", "mpirun"})
_LAUNCHER_MODULES = frozenset(
    {
        "torch.distributed.run",
        "torch.distributed.launch",
        "deepspeed.launcher.launch",
        "deepspeed.launcher.launcher_helper",
        "deepspeed.launcher.runner",
    }
)


class _Loader(Loader):
    """Runs the real loader, then what is to follow."""

    def __init__(self, real: Loader, then: Callable[[ModuleType], None]) -> None:
        self._real = real
        self._then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # What the module sees of itself is its own loader.
        module.__spec__.loader = module.__loader__ = self._real
        self._real.exec_module(module)
        self._then(module)


class Watch(MetaPathFinder):
    """Waits for one module; a finder that finds nothing else and leaves once it has been found."""

    def __init__(self, target: str, then: Callable[[ModuleType], None]) -> None:
        self._target = target
        self._then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Lets the other finders find the module and adds what is to follow to its loader."""
        if fullname != self._target:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader, self._then)
        return spec


def attach(module: ModuleType) -> None:
    """Adds the flags to Megatron's freshly imported argument parser."""
    from galvatron_megatron.integration.arguments import attach as attach_arguments

    attach_arguments(module)


def attach_deepspeed(module: ModuleType) -> None:
    """Lets Megatron-DeepSpeed's freshly imported argument parser read plans."""
    from galvatron_megatron.integration.megatron_deepspeed import attach as attach_arguments

    attach_arguments(module)


def is_launcher(words: Sequence[str]) -> bool:
    """Whether a command line starts ranks instead of being one.

    Args:
        words: ``sys.orig_argv``: the interpreter, its options, then script or ``-m`` module.
    """
    for index, word in enumerate(words[1:], start=1):
        if word == "-m":
            return words[index + 1 : index + 2] != [] and words[index + 1] in _LAUNCHER_MODULES
        if word in ("-W", "-X", "--check-hash-based-pycs"):
            continue
        if not word.startswith("-") and words[index - 1] not in ("-W", "-X", "--check-hash-based-pycs"):
            return word.rsplit("/", 1)[-1] in _LAUNCHERS
    return False


def arm() -> None:
    """Waits for Megatron's argument parser; does nothing in a launcher's own process or where armed already."""
    if is_launcher(sys.orig_argv):
        return
    for target, then in ((TARGET, attach), (DEEPSPEED_TARGET, attach_deepspeed)):
        if target in sys.modules:
            then(sys.modules[target])
            return
    if not any(isinstance(finder, Watch) for finder in sys.meta_path):
        sys.meta_path[:0] = [Watch(TARGET, attach), Watch(DEEPSPEED_TARGET, attach_deepspeed)]
