"""`mf-scale bench save`: what it prints and writes, and that it leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mf_scale import faults
from mf_scale.cli import main


def test_three_ways_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk, file = tmp_path / "disk", tmp_path / "numbers.json"
    disk.mkdir()
    assert main(["bench", "save", "--millions=2", "--repeats=1", f"--folder={disk}", f"--json={file}"]) == 0
    numbers = json.loads(file.read_text())
    assert numbers["bytes"] == 2 * 1024**2 * 12
    results = numbers["results"]
    assert list(results) == ["asynchronous", "synchronous", "save_file"]
    assert 0 < results["asynchronous"]["stall"] < results["asynchronous"]["seconds"]
    for name in ("synchronous", "save_file"):
        assert results[name]["stall"] == results[name]["seconds"]
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[2:5]] == list(results)
    assert list(disk.iterdir()) == []


def test_a_disk_that_refuses_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(faults.VARIABLE, "full save.part")
    assert main(["bench", "save", "--millions=1", f"--folder={tmp_path}"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["bench", "save", f"--folder={tmp_path}/nowhere"]) == 2
    assert "no such folder" in capsys.readouterr().err
