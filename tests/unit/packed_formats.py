"""Packing a source in some format with the program, and what a test reads back of it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.__main__ import main
from data_tools.source import open_reader
from mf_scale.data.decode import StoredSample
from mf_scale.data.index import Index

SAMPLE = Path(__file__).parents[2] / "data_tools" / "sample"
VOCABULARIES = SAMPLE.parent / "vocabularies"


def pack(name: str, source: Path, target: Path, split: str, *options: str) -> int:
    """Exit code of `python -m data_tools pack`, with one process."""
    return main(["pack", name, str(source), str(target), "--split", split, "--workers", "1", *options])


def read_samples(target: Path) -> dict[str, StoredSample]:
    """Samples of a packed source by key."""
    index = Index.open(target)
    reader = open_reader(index)
    return {sample.key: sample for sample in map(reader.load_exact, range(index.samples))}


def read_metas(target: Path) -> dict[str, dict[str, Any]]:
    """KEY.json of every sample by key."""
    metas = {}
    for path in target.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    metas[member.name.removesuffix(".json")] = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
    return metas


def mask_of(sample: StoredSample, number: int) -> np.ndarray:
    """Pixels of a segment, bool [H,W]."""
    return (sample.stored_map == number).any(axis=0)
