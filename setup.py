"""Package definition; also places the start-up hook that lets `--galvatron-*` flags work on any script."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

PLANNER = ["pyyaml>=6", "numpy>=1.26", "numba>=0.60", "rich>=13", "filelock>=3.13", "platformdirs>=4"]
TRAIN = ["torch>=2.6", "megatron-core>=0.17,<0.20", "deepspeed>=0.16"]
REPORT = ["jinja2>=3.1", "matplotlib>=3.8"]
DEV = ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "ruff>=0.6", "scipy>=1.13", "highspy>=1.7"]

# The shipped descriptions travel inside the package; in a checkout they lie beside it.
CONFIGS = "galvatron_megatron.configs"

# Python runs this line at every start, after the finder of an editable install (whose file name sorts first).
# It does nothing unless the command line has one of the package's flags.
HOOK_FILE = "galvatron_megatron_start_up.pth"
HOOK_LINE = (
    'import sys; any(word.startswith("--galvatron-") for word in getattr(sys, "argv", ())) and '
    '__import__("galvatron_megatron.integration.start_up", fromlist=["arm"]).arm()\n'
)


class BuildWithHook(build_py):
    """Puts the hook beside the package in an ordinary wheel."""

    def run(self):
        super().run()
        if not self.editable_mode:
            Path(self.build_lib).mkdir(parents=True, exist_ok=True)
            Path(self.build_lib, HOOK_FILE).write_text(HOOK_LINE)

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib, HOOK_FILE))]


class EditableWithHook(editable_wheel):
    """Puts the hook into the wheel of an editable install."""

    def _select_strategy(self, name, tag, build_lib):
        strategy = super()._select_strategy(name, tag, build_lib)

        class WithHook:
            def __enter__(self):
                strategy.__enter__()
                return self

            def __exit__(self, *exception):
                return strategy.__exit__(*exception)

            def __call__(self, wheel, files, mapping):
                strategy(wheel, files, mapping)
                wheel.writestr(HOOK_FILE, HOOK_LINE)

        return WithHook()


setup(
    name="galvatron_megatron",
    version="0.1.0",
    description="Find and run the fastest parallel plan for training with Megatron-core and DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=[
        *find_packages(include=["galvatron_megatron", "galvatron_megatron.*"]),
        "galvatron_megatron.configs",
    ],
    package_dir={"galvatron_megatron.configs": "configs"},
    package_data={"galvatron_megatron": ["data/**/*"], "galvatron_megatron.configs": ["**/*.yaml"]},
    install_requires=PLANNER,
    extras_require={"train": TRAIN, "report": REPORT, "dev": DEV},
    entry_points={"console_scripts": ["galvatron=galvatron_megatron.cli:main"]},
    cmdclass={"build_py": BuildWithHook, "editable_wheel": EditableWithHook},
)
