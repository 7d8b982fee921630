"""Parameters that ZeRO 3 shards, gathered ahead of their use, whatever classes they are of.

DeepSpeed looks ahead in a trace of one engine's whole training step, which Megatron's schedules do not repeat
pass by pass and which knows nothing of other classes. Here every forward and every backward pass through a
model chunk is a sequence of its own, learned in the first pass of its kind; schedules may mix passes at will.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch

FORWARD, BACKWARD = "forward", "backward"

NEEDED_AGAIN = "needed again"
"""Stands among the modules that are using a parameter which the part that computes has yet another use of."""


@dataclass(kw_only=True, frozen=True, slots=True, eq=False)
class _Use:
    """A module that computes with parameters."""

    coordinator: Any
    """Of the engine that gathers for it."""
    module: torch.nn.Module
    forward: bool
    """Whether for a forward computation; layers that are computed again have such ones in backward passes."""
    parameters: list[torch.nn.Parameter]

    def is_of(self, coordinator: Any, module: torch.nn.Module, forward: bool) -> bool:
        return self.module is module and self.forward is forward and self.coordinator is coordinator


@dataclass(kw_only=True, slots=True)
class _Place:
    """What there is to do where a use stands in its pass."""

    part: list[_Use]
    """Where a part begins, all of its uses."""
    following: list[_Use]
    """And those of the next part."""
    keeps: list[torch.nn.Parameter]
    """These are needed again in the same part."""
    lets_go: list[torch.nn.Parameter]
    """Of these this is the last use in the part, and not the first."""


class GatherAhead:
    """Starts gathering what a model chunk needs next while it computes.

    At most the parameters of the part (planned layer, or other module with parameters) that computes and of the
    part behind it are whole at a time. All ranks of a group decide alike, as they run the same modules in one
    order. A part gathers each parameter once in a pass, even where it is computed again there; without, and in
    the first pass of each kind, as often as a module uses it.
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
        self._known: dict[str, list[_Use]] = {}
        self._places: dict[str, list[_Place]] = {}
        self._kind: str | None = None
        self._uses: list[_Use] = []
        self._follows = False
        self._kept: dict[torch.nn.Parameter, Any] = {}

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
        known = self._known.get(self._kind, [])
        if len(self._uses) != len(known) or any(a is not b for a, b in zip(self._uses, known, strict=True)):
            self._known[self._kind] = self._uses
            self._places[self._kind] = self._plan(self._uses)
            for coordinator in self._coordinators:
                coordinator._clean_inflight_param_registry()
        self._let_go(list(self._kept))
        self._kind, self._uses = None, []

    def _fetch(self, coordinator: Any, fetch: Any, module: torch.nn.Module, forward: bool) -> None:
        """DeepSpeed is about to compute with a module: it gathers what is not there and waits for the rest."""
        if self._kind is None:
            fetch(module, forward=forward)
            return
        known, number = self._known.get(self._kind, []), len(self._uses)
        if number < len(known) and known[number].is_of(coordinator, module, forward):
            use = known[number]
        else:
            parameters = _parameters(module)
            if not parameters:
                fetch(module, forward=forward)
                return
            self._follows = False
            use = _Use(coordinator=coordinator, module=module, forward=forward, parameters=parameters)
        self._uses.append(use)
        if not self._follows:
            fetch(module, forward=forward)
            return
        place = self._places[self._kind][number]
        _gather(place.part)
        fetch(module, forward=forward)
        _gather(place.following)
        for parameter in place.keeps:
            parameter.ds_active_sub_modules.add(NEEDED_AGAIN)
            self._kept[parameter] = use.coordinator
        for parameter in place.lets_go:
            # The module that is using it now lets it go.
            parameter.ds_active_sub_modules.discard(NEEDED_AGAIN)
            self._kept.pop(parameter, None)

    def _let_go(self, parameters: list[torch.nn.Parameter]) -> None:
        """Lets go what was kept for a use that did not come."""
        for parameter in parameters:
            parameter.ds_active_sub_modules.discard(NEEDED_AGAIN)
            self._kept.pop(parameter)._PartitionedParameterCoordinator__release_param(parameter)

    def _plan(self, uses: list[_Use]) -> list[_Place]:
        """What to do at every place of a pass that goes as this one did."""
        parts = [list(group) for _, group in groupby(uses, key=lambda use: id(self._part_of(use.module)))]
        ordered = [*map(_owners_first, parts), []]
        places = []
        for number, part in enumerate(parts):
            last = {parameter: place for place, use in enumerate(part) for parameter in use.parameters}
            seen: set[torch.nn.Parameter] = set()
            for place, use in enumerate(part):
                again = [parameter for parameter in use.parameters if last[parameter] > place]
                ended = [p for p in use.parameters if last[p] == place and p in seen]
                here, following = (ordered[number], ordered[number + 1]) if place == 0 else ([], [])
                places.append(_Place(part=here, following=following, keeps=again, lets_go=ended))
                seen.update(again)
        return places

    def _part_of(self, module: torch.nn.Module) -> torch.nn.Module:
        return self._part.get(id(module), module)


def _owners_first(uses: list[_Use]) -> list[_Use]:
    """Uses in an order that gathers parameters with the others of their own module, not by who borrows them."""
    return sorted(uses, key=lambda use: next(use.module.parameters(recurse=False), None) is None)


def _gather(uses: list[_Use]) -> None:
    """Starts gathering what is neither there nor on its way; noted where DeepSpeed waits for it."""
    for use in uses:
        use.coordinator._PartitionedParameterCoordinator__all_gather_params(use.parameters, use.forward)


def _parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What DeepSpeed gathers for a module: its own, and those registered as another's."""
    external = [parameter for _, parameter in module.ds_external_parameters()]
    return list(dict.fromkeys([*module.parameters(recurse=False), *external]))
