"""What is gathered ahead, and kept, at every place of a pass that is known."""

import pytest
import torch

from galvatron_megatron.runtime.zero_ahead import BACKWARD, FORWARD, NEEDED_AGAIN, GatherAhead


class Parameter(torch.nn.Parameter):
    """With the set in which DeepSpeed notes who is using it."""

    def __init__(self, data):
        self.ds_active_sub_modules = set()


class Module(torch.nn.Module):
    """With a parameter of its own unless it borrows."""

    def __init__(self, borrows=None):
        super().__init__()
        self.borrows = [] if borrows is None else [("borrowed", borrows)]
        if borrows is None:
            self.weight = Parameter(torch.zeros(1))

    def ds_external_parameters(self):
        return self.borrows


class PartitionedParameterCoordinator:
    """Notes what DeepSpeed's would be asked to do, in order; named like it, for its private methods."""

    def __init__(self):
        self.asked = []

    def get_param_coordinator(self):
        return self

    @property
    def parameter_offload(self):
        return self

    def fetch_sub_module(self, module, forward):
        self.asked.append(("fetch", module))

    def _clean_inflight_param_registry(self):
        self.asked.append(("clean", None))

    def __all_gather_params(self, parameters, forward):
        self.asked.append(("gather", *parameters))

    def __release_param(self, parameter):
        self.asked.append(("release", parameter))


@pytest.fixture
def chunk():
    """Two layers of two modules and a head of its own; what gathers ahead, and the coordinator."""
    layers = [torch.nn.Sequential(Module(), Module()) for _ in range(2)]
    ahead, coordinator = GatherAhead(layers), PartitionedParameterCoordinator()
    ahead.add(coordinator)
    return layers, Module(), ahead, coordinator


def run(ahead, coordinator, kind, *uses):
    coordinator.asked.clear()
    ahead.begin(kind)
    for module, forward in uses:
        coordinator.fetch_sub_module(module, forward=forward)
    ahead.end()
    return list(coordinator.asked)


def test_a_part_is_gathered_while_the_part_in_front_computes(chunk):
    ((a, b), (c, d)), head, ahead, coordinator = chunk
    uses = [(module, True) for module in (a, b, c, d, head)]
    first = run(ahead, coordinator, FORWARD, *uses)
    assert first == [*(("fetch", module) for module, _ in uses), ("clean", None)]
    gathers = {module: ("gather", module.weight) for module in (a, b, c, d, head)}
    assert run(ahead, coordinator, FORWARD, *uses) == [
        *(gathers[a], gathers[b], ("fetch", a), gathers[c], gathers[d], ("fetch", b)),
        *(gathers[c], gathers[d], ("fetch", c), gathers[head], ("fetch", d)),
        *(gathers[head], ("fetch", head)),
    ]
    # Backward passes are sequences of their own.
    assert run(ahead, coordinator, BACKWARD, (d, False)) == [("fetch", d), ("clean", None)]


def test_what_a_layer_needs_again_stays_until_its_last_use(chunk):
    ((a, b), _), _, ahead, coordinator = chunk
    seen = []
    fetch = coordinator.fetch_sub_module

    def watched(module, forward):
        fetch(module, forward=forward)
        seen.append([NEEDED_AGAIN in part.weight.ds_active_sub_modules for part in (a, b)])

    coordinator.fetch_sub_module = watched
    computed_again = [(a, True), (b, True), (b, False), (a, False)]
    run(ahead, coordinator, BACKWARD, *computed_again)
    assert not any(any(each) for each in seen)
    seen.clear()
    run(ahead, coordinator, BACKWARD, *computed_again)
    assert seen == [[True, False], [True, True], [True, False], [False, False]]
    # A pass that ends otherwise leaves nothing behind.
    assert run(ahead, coordinator, BACKWARD, (a, True))[-1] == ("release", a.weight)
    assert NEEDED_AGAIN not in a.weight.ds_active_sub_modules


def test_a_borrowed_parameter_is_gathered_with_its_own_module(chunk):
    (layer, _), _, ahead, coordinator = chunk
    borrower = Module(borrows=layer[1].weight)
    ahead._part[id(borrower)] = layer
    uses = [(borrower, True), (layer[1], True)]
    run(ahead, coordinator, FORWARD, *uses)
    asked = run(ahead, coordinator, FORWARD, *uses)
    assert asked[:3] == [("gather", layer[1].weight)] * 2 + [("fetch", borrower)]
    module_order = ahead._places[FORWARD][0].part
    assert [use.module for use in module_order] == [layer[1], borrower]
