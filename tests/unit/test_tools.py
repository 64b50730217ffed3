"""The command line: mistakes in one paragraph, interrupts in one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import commands
from data_tools.__main__ import main
from tests.unit.packing import ROOT, SAMPLE, VOCABULARY, files_of, pack


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "val"
    assert pack(target, "--shard-size", "5") == 0
    return target


def test_errors_of_the_command_line(tmp_path, capsys):
    assert main(["pack", "nothing", ".", str(tmp_path), "--split", "x"]) == 2
    assert pack(tmp_path / "x", source=tmp_path) == 2
    assert main(["verify", str(tmp_path)]) == 2
    assert main(["preview", str(tmp_path), "x.jpg"]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 4 and "Traceback" not in said
    assert main(["verify", str(tmp_path), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


VAL = ["pack", "coco_panoptic", str(SAMPLE), "{tmp}/out", "--split", "val", "--workers", "1"]
MISTAKES = {
    "target is a file": (["pack", "coco_panoptic", str(SAMPLE), "{tmp}/file", "--split", "val"], "{tmp}/file"),
    "target below a file": (["pack", "coco_panoptic", str(SAMPLE), "{tmp}/file/x", "--split", "val"], "{tmp}/file/x"),
    "target to overwrite is a file": ([*VAL[:3], "{tmp}/file", "--split", "val", "--overwrite"], "{tmp}/file"),
    "target under /proc": ([*VAL[:3], "/proc/x", "--split", "val"], "/proc/x"),
    "name too long": ([*VAL[:3], "{tmp}/" + "x" * 300, "--split", "val"], "File name too long"),
    "split is a file": (["pack", "coco_panoptic", "{tmp}/cut", "{tmp}/out", "--split", "val"], "{tmp}/cut/val"),
    "seed": ([*VAL, "--seed", "-1"], "--seed: '-1' is not a whole number of 0 or more"),
    "workers": ([*VAL, "--workers", "0"], "--workers: '0' is not a whole number of 1 or more"),
    "part": ([*VAL, "--part", "3/3"], "--part: '3/3' is not i/n, the first of n parts being 0/n"),
    "part of nothing": ([*VAL, "--part", "0/0"], "--part: '0/0'"),
    "maps to check": ([*VAL, "--check-maps", "0"], "--check-maps: '0' is neither a whole number"),
    "split with a folder": ([*VAL[:4], "--split", "../val"], "../val"),
    "ids without labels": (
        ["index", "{packed}", "--vocabulary", str(VOCABULARY), "--ignore", "255", "--overwrite"],
        "--ignore says what values of label maps mean",
    ),
    "kind of a label map": (
        ["index", "{packed}", "--vocabulary", str(VOCABULARY), "--labels", "png", "--kind", "panoptic", "--overwrite"],
        "cannot be panoptic",
    ),
    "values": (["index", "{packed}", "--vocabulary", str(VOCABULARY), "--ignore", "a"], "'a' is not a list of values"),
    "no folder for the report": (["verify", "{packed}", "--json", "{tmp}/none/r.json"], "{tmp}/none/r.json"),
    "no folder for the counts": (["stats", "{packed}", "--json", "{tmp}/none/r.json"], "{tmp}/none/r.json"),
    "picture of stats": (["stats", "{packed}", "--picture", "{tmp}/s.jpg"], "{tmp}/s.jpg"),
    "vocabulary is a folder": ([*VAL, "--vocabulary", "{tmp}"], "{tmp}"),
    "vocabulary of index is a folder": (["index", "{packed}", "--vocabulary", "{tmp}", "--overwrite"], "{tmp}"),
    "index of a file": (["index", "{tmp}/file", "--vocabulary", str(VOCABULARY)], "{tmp}/file"),
    "no folder for the picture": (["preview", "{packed}", "{tmp}/none/s.png"], "{tmp}/none/s.png"),
    "picture is a folder": (["preview", "{packed}", "{tmp}/folder.png"], "{tmp}/folder.png"),
    "count": (["preview", "{packed}", "{tmp}/s.png", "--count", "-3"], "--count: '-3' is not a whole number of 1"),
    "count is a word": (["preview", "{packed}", "{tmp}/s.png", "--count", "all"], "--count: 'all' is not"),
    "no command": ([], "COMMAND"),
    "verify of a file": (["verify", "{tmp}/file"], "{tmp}/file"),
    "stats of nothing": (["stats", "/proc/x"], "/proc/x"),
}


@pytest.mark.parametrize("arguments, named", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_paragraph(packed, tmp_path, capsys, arguments, named):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "cut").mkdir()
    shutil.copytree(SAMPLE / "annotations", tmp_path / "cut" / "annotations")
    (tmp_path / "cut" / "val").write_text("no folder")
    before = files_of(packed)
    assert main([a.format(tmp=tmp_path, packed=packed) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert named.format(tmp=tmp_path) in said
    assert (tmp_path / "file").read_text() == "mine" and files_of(packed) == before
    assert not (tmp_path / "s.png").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["pack", "index", "verify", "stats", "preview"])
def test_an_interrupt_is_one_line(packed, tmp_path, capsys, monkeypatch, command):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    place = {
        "pack": "shards.encode_sample",
        "index": "index.scan_shard",
        "verify": "verify.decoded",
        "stats": "stats.decoded_run",
        "preview": "preview.draw_segments",
    }
    monkeypatch.setattr(f"data_tools.{place[command]}", interrupt)
    shards = Path(shutil.copytree(packed, tmp_path / "shards"))
    arguments = {
        "pack": [a.format(tmp=tmp_path) for a in VAL],
        "index": ["index", str(shards), "--vocabulary", str(VOCABULARY), "--overwrite"],
        "preview": ["preview", str(packed), str(tmp_path / "s.png")],
    }
    assert main(arguments.get(command, [command, str(packed)])) == 130
    lines = capsys.readouterr().err.splitlines()
    goes_on = "; the same command goes on where it stopped" if command == "pack" else ""
    assert lines[-1] == f"interrupted{goes_on}" and "Traceback" not in "".join(lines)


FAULTS = {"EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENETDOWN", "ENETUNREACH", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH",
          "ESHUTDOWN", "EAGAIN"}  # fmt: skip


@pytest.mark.parametrize("name", [*sorted(FAULTS), "ENOSPC", "EDQUOT", "EACCES", "ENAMETOOLONG"])
def test_a_fault_of_the_file_system_is_75_and_what_a_person_must_mend_is_2(capsys, monkeypatch, name):
    def fail(_):
        raise OSError(getattr(errno, name), "said", "/lustre/a.jpg")

    monkeypatch.setattr(commands, "verify", fail)
    assert main(["verify", "x"]) == (75 if name in FAULTS else 2)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "/lustre/a.jpg" in said
    assert ("Check the file system" in said) == (name in FAULTS)


@pytest.mark.parametrize("command", ["stats", "pack"])
def test_a_reader_that_leaves_changes_nothing(packed, tmp_path, command):
    """As in `stats SRC | head`: the work is done, and nobody is told."""
    arguments = ["stats", str(packed), "--json", str(tmp_path / "counts.json")]
    if command == "pack":
        arguments = [a.format(tmp=tmp_path) for a in VAL] + ["--shard-size", "5"]
    left, right = os.pipe()
    os.close(left)
    run = subprocess.run(
        [sys.executable, "-m", "data_tools", *arguments],
        stdout=right, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT, timeout=120,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )  # fmt: skip
    os.close(right)
    assert run.returncode == 0 and "rror" not in run.stderr, run.stderr
    if command == "pack":
        assert files_of(tmp_path / "out") == files_of(packed)
    else:
        assert json.loads((tmp_path / "counts.json").read_text())["samples"] == 13


def test_a_report_may_hold_half_a_surrogate_pair(tmp_path):
    """JSON can carry it, UTF-8 cannot: it is written as JSON does."""
    commands._write_json(tmp_path / "r.json", {"reason": "caf\ud800 \N{SNOWMAN}"})
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == {"reason": "caf\ud800 \N{SNOWMAN}"}
