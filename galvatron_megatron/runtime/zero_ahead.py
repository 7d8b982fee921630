"""Parameters that ZeRO 3 shards, gathered ahead of their use, whatever classes they are of.

DeepSpeed looks ahead in a trace of one engine's whole training step, which Megatron's schedules do not repeat
pass by pass and which knows nothing of other classes. Here every forward and every backward pass through a
model chunk is a sequence of its own, learned in the first pass of its kind; schedules may mix passes at will.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

FORWARD, BACKWARD = "forward", "backward"

Use = tuple[Any, torch.nn.Module, bool]
"""An engine's coordinator, a module that needs parameters of it, and whether for a forward computation."""


class GatherAhead:
    """Starts gathering what a model chunk needs next while it computes.

    At most the parameters of the part (planned layer, or other module with parameters) that computes and of the
    part behind it are whole at a time. All ranks of a group decide alike, as they run the same modules in one
    order. Each use still gathers once: the number and bytes of collectives are as without.
    """

    def __init__(self, layers: Iterable[torch.nn.Module]) -> None:
        """Looks at nothing yet, see ``add``.

        Args:
            layers: parts of the chunk that are gathered as one; any other module is a part of its own.
        """
        self.enabled = True
        """Off, everything is gathered when it is used."""
        self._part = {id(module): layer for layer in layers for module in layer.modules()}
        self._coordinators: list[Any] = []
        self._known: dict[str, list[Use]] = {}
        self._kind: str | None = None
        self._uses: list[Use] = []
        self._follows = False

    def add(self, engine: Any) -> None:
        """Lets an engine's parameters be gathered ahead.

        Args:
            engine: of ZeRO stage 3.
        """
        coordinator = engine.parameter_offload.get_param_coordinator()
        coordinator.fetch_sub_module = partial(self._fetch, coordinator, coordinator.fetch_sub_module)
        self._coordinators.append(coordinator)

    def begin(self, kind: str) -> None:
        """A pass through the chunk begins.

        Args:
            kind: ``FORWARD`` or ``BACKWARD``.
        """
        self._kind, self._uses = kind, []
        self._follows = self.enabled

    def end(self) -> None:
        """The pass is over; what was gathered in vain is let go."""
        if self._kind is None:
            return
        if self._uses != self._known.get(self._kind):
            self._known[self._kind] = self._uses
            for coordinator in self._coordinators:
                coordinator._clean_inflight_param_registry()
        self._kind, self._uses = None, []

    def _fetch(self, coordinator: Any, fetch: Any, module: torch.nn.Module, forward: bool) -> None:
        """DeepSpeed is about to compute with a module: it gathers what is not there and waits for the rest."""
        fetch(module, forward=forward)
        if self._kind is None or not _parameters(module):
            return
        use = (coordinator, module, forward)
        known, place = self._known.get(self._kind, []), len(self._uses)
        self._uses.append(use)
        self._follows = self._follows and place < len(known) and known[place] == use
        if self._follows:
            self._look_ahead(known, place)

    def _look_ahead(self, known: list[Use], place: int) -> None:
        """Gathers for the rest of the part that computes and for all of the next one."""
        parts = [self._part_of(known[place][1])]
        for coordinator, module, forward in known[place + 1 :]:
            part = self._part_of(module)
            if part is not parts[-1]:
                parts.append(part)
                if len(parts) > 2:
                    return
            # Only what is neither there nor on its way; noted where DeepSpeed waits for it.
            coordinator._PartitionedParameterCoordinator__all_gather_params(_parameters(module), forward)

    def _part_of(self, module: torch.nn.Module) -> torch.nn.Module:
        return self._part.get(id(module), module)


def _parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What DeepSpeed gathers for a module: its own, and those registered as another's."""
    external = [parameter for _, parameter in module.ds_external_parameters()]
    return list(dict.fromkeys([*module.parameters(recurse=False), *external]))
