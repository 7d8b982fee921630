"""The planner starts without torch, and imports run one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import galvatron_megatron

PACKAGE = Path(galvatron_megatron.__file__).parent
HEAVY = ("torch", "megatron", "deepspeed")
LIGHT = ("plan", "describe", "cost", "search", "report", "commands", "cli", "errors")
MAY_IMPORT = {
    "errors": set(),
    "plan": {"errors"},
    "describe": {"plan", "errors"},
    "cost": {"describe", "plan", "errors"},
    "search": {"cost", "describe", "plan", "errors"},
    "report": {"search", "cost", "describe", "plan", "errors"},
    "device": set(),
    "host_adam": {"errors", "device"},
    "runtime": {"plan", "errors", "device", "host_adam"},
    # The stand-ins under which Megatron's layers can be built without a GPU live with the CPU back end.
    "profiler": {
        "cost",
        "describe",
        "plan",
        "errors",
        "device",
        "host_adam",
        "integration.cpu_device",
        "integration.local_hybrid_spec",
        # What is measured under Ulysses is the attention that the runtime runs.
        "runtime.rotary",
        "runtime.ulysses",
        # And the engines of ZeRO are the runtime's.
        "runtime.zero",
        "runtime.zero_ahead",
    },
}
"""What a package may import of this project besides itself; one that is not listed may import anything."""


def modules(name: str) -> list[Path]:
    folder = PACKAGE / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{name}.py"]


def imported_names(path: Path, *, inside_functions: bool) -> set[str]:
    """Full names of the modules that a file imports; relative imports are not used in this project."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if inside_functions else _outside_functions(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _outside_functions(node: ast.AST) -> list[ast.AST]:
    found = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found += [child, *_outside_functions(child)]
    return found


def test_planner_imports_nothing_heavy() -> None:
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for package in LIGHT
        for path in modules(package)
    ]
    assert len(names) > 20
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", [name for name in LIGHT if name != "commands"])
def test_planner_never_imports_heavy_packages_not_even_late(package: str) -> None:
    for path in modules(package):
        heavy = {name for name in imported_names(path, inside_functions=True) if name.split(".")[0] in HEAVY}
        assert not heavy, f"{path} imports {heavy}"


def test_commands_import_heavy_packages_late_only() -> None:
    for path in modules("commands"):
        early = {name for name in imported_names(path, inside_functions=False) if name.split(".")[0] in HEAVY}
        assert not early, f"{path} imports {early}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package: str) -> None:
    for path in modules(package):
        for name in imported_names(path, inside_functions=True):
            parts = name.split(".")
            if parts[0] != "galvatron_megatron" or len(parts) == 1:
                continue
            if not (PACKAGE / parts[1]).is_dir() and not (PACKAGE / f"{parts[1]}.py").is_file():
                continue  # A name of the package itself, such as its version.
            allowed = MAY_IMPORT[package] | {package}
            is_allowed = {parts[1], ".".join(parts[1:3])} & allowed
            assert is_allowed, f"{path} imports {name}; {package} may import {sorted(allowed)}"
