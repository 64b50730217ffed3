"""Fixtures of all tests: the embedded sample, packed once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time, so that a red test is red for everybody; `make soak` looks for new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("soak", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

os.environ.setdefault("WANDB_SILENT", "true")
# A developer's key must never send a test's run anywhere.
os.environ.pop("WANDB_API_KEY", None)

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "data_tools/sample/coco_panoptic"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", type=int, default=20, help="faults of a soak schedule")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Soak tests run only when asked for by `-m soak`; GPU tests only where there is one."""
    soak = "soak" in (config.option.markexpr or "")
    for item in items:
        if "soak" in item.keywords and not soak:
            item.add_marker(pytest.mark.skip(reason="a long schedule: make soak"))
        if "gpu" in item.keywords and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded COCO panoptic sample as two sources: packed/train (40 samples) and packed/val (13)."""
    from data_tools.__main__ import main

    folder = tmp_path_factory.mktemp("packed")
    for split in ("train", "val"):
        assert main(["pack", "coco_panoptic", str(SAMPLE), str(folder / split), "--split", split]) in (0, None)
    return folder
