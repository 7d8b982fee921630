"""The last lines of ``make demo``: plan, predicted and measured figures, and the loss, from a job's report."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from galvatron_megatron.plan.line import plan_line
from galvatron_megatron.plan.serialization import plan_from_dict

MOST_STEPS = 10


def main(path: Path) -> int:
    """Prints the table.

    Args:
        path: what ``--galvatron-report`` wrote.

    Returns:
        0 where the loss fell, else 1.
    """
    report = json.loads(path.read_text())
    losses = [(step, values["lm loss"]) for step, values in report["losses"]]
    table = Table(title="galvatron demo", show_header=False, title_justify="left")
    table.add_row("plan", plan_line(plan_from_dict(report["plan"])))
    predicted, measured = report["step_seconds"], report["measured_step_seconds"]
    table.add_row("step time", f"predicted {predicted * 1e3:.0f} ms, measured {measured * 1e3:.0f} ms")
    for rank, (expected, found) in enumerate(
        zip(report["memory_bytes"], report["measured_memory_bytes"], strict=True)
    ):
        text = f"predicted {expected / 2**20:.0f} MiB, measured {found / 2**20:.0f} MiB"
        table.add_row(f"memory of pipeline rank {rank}", text)
    stride = max(1, len(losses) // MOST_STEPS)
    shown = [*losses[::stride], losses[-1]] if (len(losses) - 1) % stride else losses[::stride]
    table.add_row(f"loss over {losses[-1][0]} iterations", "  ".join(f"{loss:.3f}" for _, loss in shown))
    Console().print(table)
    if losses[-1][1] >= losses[0][1]:
        print("demo: the loss did not fall", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
