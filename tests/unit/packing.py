"""The embedded COCO panoptic sample, packed by the program: what the tests of the tools share."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.__main__ import main

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_tools" / "sample" / "coco_panoptic"
VOCABULARY = ROOT / "data_tools" / "vocabularies" / "coco_panoptic_133.json"
SLOW = (
    "import sys, time, data_tools.shards as shards; from data_tools.__main__ import main; "
    "encode = shards.encode_sample; shards.encode_sample = lambda *a: time.sleep(0.3) or encode(*a); "
    "sys.exit(main(sys.argv[1:]))"
)
"""The program with a third of a second more for each sample."""


def pack(target: Path, *options: str, source: Path = SAMPLE, split: str = "val") -> int:
    """Exit code of packing the sample here, with one process."""
    return main(["pack", "coco_panoptic", str(source), str(target), "--split", split, "--workers", "1", *options])


def start_pack(target: Path, *options: str, slow: bool = False) -> subprocess.Popen[str]:
    """The same in a process group of its own."""
    program = ["-c", SLOW] if slow else ["-m", "data_tools"]
    return subprocess.Popen(
        [sys.executable, *program, "pack", "coco_panoptic", str(SAMPLE), str(target), "--split", "val", *options],
        start_new_session=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until(reached: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copy_of(source: Path, target: Path) -> Path:
    """A copy whose files can be changed."""
    shutil.copytree(source, target)
    for path in target.iterdir():
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


def edit_list(source: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the annotation list of the split `val`."""
    path = source / "annotations" / "panoptic_val.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
