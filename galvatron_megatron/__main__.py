"""``python -m galvatron_megatron``: the command line, or a launcher for a Megatron script.

    python -m galvatron_megatron search --model ...
    python -m galvatron_megatron pretrain_gpt.py ARGS --galvatron-auto

The second form does what the start-up hook does, where Python does not run such hooks (``python -S``, ``-I``,
or a package that is only on ``PYTHONPATH``). Under a launcher:

    torchrun ... -m galvatron_megatron pretrain_gpt.py ARGS --galvatron-auto
"""

import sys
from pathlib import Path


def run() -> int:
    """Runs a script where the first word is one, else a command.

    Returns:
        Exit code.
    """
    if len(sys.argv) > 1 and sys.argv[1].endswith(".py"):
        return _run_script()
    from galvatron_megatron.cli import main

    return main()


def _run_script() -> int:
    import runpy

    from galvatron_megatron.errors import EXIT_CODE
    from galvatron_megatron.integration.start_up import arm

    script = Path(sys.argv[1])
    if not script.is_file():
        print(f"galvatron: script {script}: no such file; valid: a Megatron training script", file=sys.stderr)
        return EXIT_CODE
    del sys.argv[0]
    # As if Python had started the script itself.
    sys.path[0] = str(script.parent.absolute())
    arm()
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(run())
