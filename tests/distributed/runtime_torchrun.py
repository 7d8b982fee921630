"""A training job under torchrun: ``torchrun runtime_torchrun.py CASE.json``."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from galvatron_megatron.integration import cpu_device

if __name__ == "__main__":
    case = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    cpu_device.install()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    from runtime_job import run_case

    run_case(case)
