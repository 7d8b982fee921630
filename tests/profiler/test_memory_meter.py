"""What is read as memory in use on CPU ranks."""

import threading
import time

import torch

from galvatron_megatron.integration.cpu_device import CpuDevice
from galvatron_megatron.profiler.memory import MemoryMeter


def test_what_another_thread_is_about_to_let_go_is_not_in_use():
    with CpuDevice(even_with_gpu=True), MemoryMeter() as meter:
        kept = torch.zeros(1000)
        held = [torch.zeros(500)]

        def lets_go():
            time.sleep(0.002)
            held.clear()

        thread = threading.Thread(target=lets_go)
        thread.start()
        assert meter.read() == (4000, 6000)
        thread.join()
        assert meter.read() == (4000, 4000)
        del kept
        assert meter.read() == (0, 4000)
