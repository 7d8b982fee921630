import os
import re
import time
from argparse import Namespace

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module

from galvatron_megatron.errors import GalvatronError
from galvatron_megatron.integration import cpu_device, local_hybrid_spec
from galvatron_megatron.integration.cpu_device import CpuDevice
from galvatron_megatron.integration.cpu_megatron import counts_on_the_host
from galvatron_megatron.integration.cpu_stand_ins import Event, MemoryCounters, stand_ins

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def test_cuda_means_cpu_inside_and_nothing_stays_behind():
    before = dict(vars(torch.cuda))
    accelerator = dict(vars(torch.accelerator))
    names = ("TORCHDYNAMO_DISABLE", "DS_ACCELERATOR")
    variables = [os.environ.get(name) for name in names]
    with CpuDevice():
        assert torch.cuda.is_available() and torch.cuda.current_device() == 0
        assert [os.environ[name] for name in names] == ["1", "cpu"]
        for device in ("cuda", "cuda:0", 0, torch.device("cuda", 0), torch.cuda.current_device()):
            assert torch.ones(2, device=device).device.type == "cpu"
            assert torch.ones(2).to(device).device.type == "cpu"
        ones = torch.ones(2)
        assert ones.cuda() is ones and ones.pin_memory() is ones
        assert torch.empty(2, pin_memory=True, device="cpu").shape == (2,)
        assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
        assert torch.nn.Parameter(ones).type() == "torch.cuda.FloatTensor"
        assert ones.to(torch.float64).dtype is torch.float64
        torch.cuda.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3, device="cuda")
        torch.cuda.set_rng_state(state)
        assert torch.equal(first, torch.rand(3))
        # An index that is no device stays an index.
        assert torch.arange(3)[1] == 1 and torch.sum(torch.ones(2, 3), 0).shape == (3,)
    # Torch itself may have imported more of its modules.
    assert {name: vars(torch.cuda).get(name) for name in before} == before
    assert dict(vars(torch.accelerator)) == accelerator
    assert [os.environ.get(name) for name in names] == variables
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(2, device="cuda")


def test_what_was_wrapped_by_the_compiler_before_runs_as_it_is(monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    compiled = []

    def compiler(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def double(values):
        return 2 * values

    wrapped = torch.compile(double, backend=compiler)
    with CpuDevice():
        assert torch.equal(wrapped(torch.ones(2)), torch.full((2,), 2.0))
        assert torch.compile(double, backend=compiler)(torch.ones(()) + 1) == 4
    assert not compiled
    wrapped(torch.ones(2))
    assert compiled


def test_it_is_installed_once_and_can_be_removed():
    assert cpu_device.installed() is None
    try:
        device = cpu_device.install()
        assert cpu_device.install() is device is cpu_device.installed()
    finally:
        cpu_device.uninstall()
    cpu_device.uninstall()
    assert cpu_device.installed() is None and not torch.cuda.is_available()


def test_a_visible_gpu_is_refused_unless_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(GalvatronError, match=r"3 GPU\(s\) are visible.*--galvatron-ignore-gpus"):
        CpuDevice().install()
    with CpuDevice(even_with_gpu=True):
        assert torch.ones(1, device="cuda").device.type == "cpu"


def test_events_keep_real_time():
    start, end = Event(enable_timing=True), Event(enable_timing=True)
    with pytest.raises(RuntimeError, match="recorded"):
        start.elapsed_time(end)
    start.record()
    time.sleep(0.02)
    end.record()
    assert 20 <= start.elapsed_time(end) < 2000


def test_memory_counters_see_what_is_held_and_what_was_held():
    counters = MemoryCounters()
    counters.restart()
    size = 200 << 20
    held = torch.ones(size, dtype=torch.uint8)
    assert 0.9 * size < counters.allocated() < 1.5 * size
    del held
    counters.release_unused()
    assert counters.allocated() < size / 2
    # The peak remembers, until it is reset.
    assert counters.peak() > 0.9 * size
    counters.reset_peak()
    assert counters.peak() < size / 2
    free, total = counters.info()
    assert 0 < free <= total


def test_every_stand_in_replaces_something_that_torch_has():
    unknown = [name for name in stand_ins(1, MemoryCounters()) if not hasattr(torch.cuda, name)]
    assert unknown == []


def test_configure_sets_what_the_cpu_needs_and_tells():
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    args = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args([])
    with CpuDevice():
        missing = [name for name in cpu_device.configure.__globals__["SETTINGS"] if not hasattr(args, name)]
        changed = cpu_device.configure(args)
        assert missing == []
        assert args.distributed_backend == "gloo" and args.transformer_impl == "local"
        assert changed["distributed_backend"] == ("nccl", "gloo")
        assert cpu_device.configure(args) == {}
        args.hybrid_layer_pattern = "*-"
        assert cpu_device.configure(args).keys() == {"spec"}
    with pytest.raises(GalvatronError, match="fp8"):
        cpu_device.configure(Namespace(fp8="hybrid"))


def test_numbers_of_tokens_are_sizes_that_an_all_to_all_takes():
    counts = torch.tensor([3, 1])
    assert counts_on_the_host(counts) is counts
    assert list(counts_on_the_host(counts, as_numpy=True)) == [3, 1]
    assert not torch.is_tensor(counts_on_the_host(counts, as_numpy=True))
    assert counts_on_the_host(None, as_numpy=True) is None


@pytest.mark.parametrize(("layer", "symbol"), [("mamba_layer", "M"), ("mla_layer", "+")])
def test_layers_that_are_not_there_are_not_built_as_layers_that_do_nothing(layer, symbol):
    submodules = local_hybrid_spec.hybrid_stack_spec.submodules
    with pytest.raises(GalvatronError, match=re.escape(f"--hybrid-layer-pattern has {symbol} (")):
        build_module(getattr(submodules, layer), config=None, layer_number=1)
