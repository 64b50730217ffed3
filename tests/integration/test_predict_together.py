"""The same prediction by several real processes at once: both end well, and nothing that is committed is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.unit.predicting import IMAGES, contents, small_run

pytestmark = pytest.mark.integration
PARTS = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More images than a process reads ahead, small ones, each of them several times."""
    file = tmp_path_factory.mktemp("list") / "images.txt"
    small = [file.with_name(path.name) for path in IMAGES]
    for path, one in zip(IMAGES, small, strict=True):
        with Image.open(path) as image:
            image.resize((64, 48)).save(one)
    file.write_text("\n".join(str(small[i % len(small)]) for i in range(10 * PARTS)))
    return file


@pytest.fixture(scope="module")
def whole(run: str, listed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    alone = start(listed, run, out)
    said = alone.communicate(timeout=200)[0]
    assert alone.returncode == 0, said
    return contents(out)


def start(listed: Path, run: str, out: Path) -> subprocess.Popen[str]:
    words = [str(listed), "--run", run, "--out", str(out), "--part-size", "10"]
    return subprocess.Popen(
        [sys.executable, "-m", "mf_scale.cli", "predict", *words],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


def test_two_at_once_end_well(run: str, listed: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    both = [start(listed, run, tmp_path) for _ in range(2)]
    try:
        said = [process.communicate(timeout=200)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    assert any("80 of 80 images predicted" in text for text in said), said
    assert contents(tmp_path) == whole


def test_one_that_was_overtaken_deletes_nothing(
    run: str, listed: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    first = start(listed, run, tmp_path)
    try:
        wait_until(lambda: any(tmp_path.glob(".part-*.tar.*")), first)
        os.kill(first.pid, signal.SIGSTOP)
        second = start(listed, run, tmp_path)
        said = second.communicate(timeout=200)[0]
        assert second.returncode == 0 and "being made by another process" in said, said
        done = {path.name: path.read_bytes() for path in tmp_path.glob("part-*")}
        assert 0 < len(done) < 3 * PARTS
        os.kill(first.pid, signal.SIGCONT)
        time.sleep(0.1)
    finally:
        first.kill()
        first.communicate(timeout=30)
    after = contents(tmp_path)
    assert done.items() <= after.items(), "what was committed is there"
    again = start(listed, run, tmp_path)
    said = again.communicate(timeout=200)[0]
    assert again.returncode == 0 and "80 of 80 images predicted" in said, said
    assert contents(tmp_path) == whole
