"""The house holds: arrows one way, each heavy library in one file, start-up without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOOR = {
    "errors",
    "faults",
    "vocabulary",
    "rundir",
    "file_locks",
    "fragments",
    "fingerprint",
    "config",
    "kernels",
    "unify",
    "user_cache",
    "models.outputs",
    "data.batch",
}
MIDDLE = {"data", "models", "matching", "losses", "distributed", "tracking"}
ONE_FILE = (
    "deepspeed",
    "webdataset",
    "wandb",
    "xformers",
    "timm",
    "triton",
    "matplotlib",
    "jinja2",
    "omegaconf",
    "faster_coco_eval",
)
ALLOWED = {("losses", "matching")}
"""The only arrow between rooms of the middle."""


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def room(module: str) -> str:
    """`mf_scale.data.batch` -> `data.batch` on the floor, else the first part after the package."""
    parts = module.split(".")[1:]
    short = ".".join(parts[:2])
    return short if short in FLOOR else (parts[0] if parts else "")


@pytest.mark.parametrize("file", files("mf_scale"), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_one_way(file: Path) -> None:
    here = room(".".join(file.relative_to(ROOT).with_suffix("").parts))
    for name in imports(file):
        assert not name.startswith(("data_tools", "tests")), name
        there = room(name) if name.startswith("mf_scale.") else ""
        if there in ("", "__version__", here) or (there in FLOOR and here not in FLOOR):
            continue
        if here in FLOOR:
            assert there in FLOOR, f"{here} -> {there}"
        elif here in MIDDLE:
            assert (here, there) in ALLOWED, f"{here} -> {there}"
        elif here in ("training", "evaluation"):
            assert there in MIDDLE, f"{here} -> {there}"


def test_each_heavy_library_is_imported_in_one_file() -> None:
    for library in ONE_FILE:
        users = [f for f in files("mf_scale") if any(n == library or n.startswith(f"{library}.") for n in imports(f))]
        assert len(users) <= 1 or library == "matplotlib", f"{library}: {users}"
        if library == "matplotlib":
            assert {f.parent.name for f in users} <= {"tracking", "report"}


def test_help_loads_no_torch() -> None:
    code = (
        "import sys, mf_scale.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip().endswith("False")
    assert "train" in run.stdout


def test_no_file_is_a_god_module() -> None:
    long = [
        f for package in ("mf_scale", "data_tools") for f in files(package) if len(f.read_text().splitlines()) > 300
    ]
    assert not long
