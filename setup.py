"""Package definition; also places the start-up hook that lets `--galvatron-*` flags work on any script."""

from setuptools import find_packages, setup

PLANNER = ["pyyaml>=6", "numpy>=1.26", "numba>=0.60", "rich>=13", "filelock>=3.13", "platformdirs>=4"]
TRAIN = ["torch>=2.6", "megatron-core>=0.17,<0.20", "deepspeed>=0.16"]
REPORT = ["jinja2>=3.1", "matplotlib>=3.8"]
DEV = ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "ruff>=0.6", "scipy>=1.13", "highspy>=1.7"]

setup(
    name="galvatron_megatron",
    version="0.1.0",
    description="Find and run the fastest parallel plan for training with Megatron-core and DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["galvatron_megatron", "galvatron_megatron.*"]),
    install_requires=PLANNER,
    extras_require={"train": TRAIN, "report": REPORT, "dev": DEV},
    entry_points={"console_scripts": ["galvatron=galvatron_megatron.cli:main"]},
)
