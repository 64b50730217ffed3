"""A pack that was killed, interrupted, cut into parts or short of disk goes on, and the bytes stay the same."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools import shards
from data_tools.files import partial_path, sweep_partials
from data_tools.formats import coco_panoptic
from data_tools.pack import PackOptions, finish_pack, plan_pack
from data_tools.scan import ShardScan
from data_tools.shards import pack_shard
from data_tools.sidecar import sidecar_path
from mf_scale.data.index import Index
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary
from tests.unit.packing import ROOT, SAMPLE, VOCABULARY, copy_of, files_of, pack, start_pack, wait_until


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """One sample a shard."""
    target = tmp_path_factory.mktemp("packed") / "val"
    assert pack(target, "--shard-size", "1") == 0
    names = {f"val-{number:06d}.tar" for number in range(13)}
    assert {path.name for path in target.iterdir()} == names | {"index.json", "samples.arrow", "pack.json"}
    return target


def test_a_killed_pack_is_not_taken_for_finished_and_goes_on(single, tmp_path, monkeypatch):
    target = tmp_path / "killed"
    process = start_pack(target, "--shard-size", "1", "--workers", "2", slow=True)
    wait_until(lambda: len(list(target.glob("*.tar"))) >= 3, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    done = {path: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    assert 3 <= len(done) < 13 and all(sidecar_path(path).exists() for path in done)
    assert list(target.glob("*.partial"))
    with pytest.raises(UserError, match="no index"):
        Index.open(target)
    read: list[str | None] = []
    scan = shards.scan_shard

    def remember(path: Path, num_classes: int, name: str | None = None) -> object:
        read.append(name)
        return scan(path, num_classes, name=name)

    monkeypatch.setattr(shards, "scan_shard", remember)
    assert pack(target, "--shard-size", "1") == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(read) == 13 - len(done) and not {path.name for path in done} & set(read)  # finished ones are not read
    assert files_of(target) == files_of(single)


def test_a_shard_without_its_sidecar_is_read_again(single, tmp_path):
    target = tmp_path / "copy"
    shutil.copytree(single, target)
    for name in ("index.json", "samples.arrow", "val-000004.tar"):
        (target / name).unlink()
    sidecar_path(target / "val-000002.tar").write_bytes(b"cut short")
    (target / "val-000003.tar").write_bytes((single / "val-000003.tar").read_bytes()[:2000])
    assert pack(target, "--shard-size", "1") == 0
    assert files_of(target) == files_of(single)


def test_a_shard_removed_later_is_packed_again(single, tmp_path, capsys):
    target = copy_of(single, tmp_path / "copy")
    (target / "val-000007.tar").unlink()
    assert pack(target, "--shard-size", "1") == 0
    assert "packed 13 samples" in capsys.readouterr().out and files_of(target) == files_of(single)


def test_parts_at_once_give_the_same_bytes_and_the_last_writes_the_index(single, tmp_path):
    """Four commands: three parts, the second of them twice."""
    target = tmp_path / "parts"
    runs = [start_pack(target, "--shard-size", "1", "--workers", "1", "--part", f"{i}/3") for i in (0, 1, 2, 1)]
    said = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0, 0], said
    assert any("packed 13 samples" in out for out, _ in said)
    assert files_of(target) == files_of(single)


def test_a_part_killed_and_started_again_completes_the_pack(single, tmp_path, capsys):
    target = tmp_path / "parts"
    assert pack(target, "--shard-size", "1", "--part", "1/2") == 0
    assert "7 of its shards, of parts 0, are still to come" in capsys.readouterr().out
    process = start_pack(target, "--shard-size", "1", "--part", "0/2", slow=True)
    wait_until(lambda: len(list(target.glob("*.tar"))) > 7, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (target / "index.json").exists()
    assert pack(target, "--shard-size", "1", "--part", "0/2") == 0
    assert "part 0 of 2 of this pack is done; it was the last" in capsys.readouterr().out
    assert files_of(target) == files_of(single)
    assert pack(target, "--shard-size", "1", "--part", "1/2") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_two_that_write_the_index_at_once_are_harmless(single, tmp_path):
    target = tmp_path / "both"
    shutil.copytree(single, target)
    for name in ("index.json", "samples.arrow"):
        (target / name).unlink()
    runs = [start_pack(target, "--shard-size", "1", "--workers", "1", "--part", f"{i}/4") for i in range(4)]
    said = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0] * 4, said
    assert files_of(target) == files_of(single)


def test_a_part_that_comes_too_late_finds_the_pack_finished_and_leaves_nothing(single, tmp_path, monkeypatch):
    """Another has written the index and swept up while this one still looked at a shard."""
    target = tmp_path / "late"
    shutil.copytree(single, target)
    source = coco_panoptic.open_source(SAMPLE, "val", Vocabulary.load(VOCABULARY))
    packing = plan_pack(source, target, PackOptions("coco_panoptic", "val", "1", 0, "none", "none"))
    assert isinstance(pack_shard(packing.jobs[3]), ShardScan) and sidecar_path(packing.jobs[3].path).exists()
    packed = finish_pack(packing)
    assert packed is not None and packed.head["samples"] == 13 and files_of(target) == files_of(single)

    def swept(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(shards, "save_rows", swept)
    assert isinstance(pack_shard(packing.jobs[4]), ShardScan)
    (target / "val-000005.tar").unlink()
    with pytest.raises(UserError):
        pack_shard(packing.jobs[5])
    assert not list(target.glob("*.partial"))


def test_more_parts_than_shards_and_parts_that_overwrite(single, tmp_path, capsys):
    assert pack(tmp_path / "few", "--part", "5/9") == 0
    assert "1 of its shards, of parts 0, are still to come" in capsys.readouterr().out
    before = files_of(single)
    assert pack(single, "--shard-size", "1", "--part", "0/2", "--overwrite") == 2
    assert "would remove what other parts have written" in capsys.readouterr().err and files_of(single) == before


def test_parts_of_different_packs_do_not_mix(tmp_path, capsys):
    assert pack(tmp_path / "parts", "--shard-size", "3", "--part", "0/2") == 0
    before = files_of(tmp_path / "parts")
    assert pack(tmp_path / "parts", "--shard-size", "4", "--part", "1/3") == 2
    assert "other arguments or input" in capsys.readouterr().err and files_of(tmp_path / "parts") == before


def test_a_part_may_start_while_another_writes_the_plan(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "pack.json.elsewhere.17.partial").write_text("{")
    assert pack(tmp_path / "parts", "--part", "3/4") == 0


def test_what_a_killed_process_left_is_swept_and_what_others_write_is_not(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait(timeout=30)
    here = partial_path(tmp_path / "a.tar").name.removesuffix(f".{os.getpid()}.partial").removeprefix("a.tar.")
    names = {
        "dead": f"a.tar.{here}.{dead.pid}.partial",
        "living": f"a.tar.{here}.{os.getpid()}.partial",
        "elsewhere": f"a.tar.other-host.{dead.pid}.partial",
        "old": "samples.arrow.other-host.5.partial",
        "foreign": "film.partial",
    }
    hour, two_days = time.time() - 3600, time.time() - 2 * 86400
    for what, name in names.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (two_days, two_days) if what == "old" else (hour, hour))
    (tmp_path / f"b.tar.{here}.{dead.pid}.partial").touch()  # dead, but perhaps alive in another container: not yet
    sweep_partials(tmp_path, finished=False)
    left = {names[what] for what in ("living", "elsewhere", "foreign")} | {f"b.tar.{here}.{dead.pid}.partial"}
    assert {path.name for path in tmp_path.iterdir()} == left
    sweep_partials(tmp_path, finished=True)
    assert {path.name for path in tmp_path.iterdir()} == {names["foreign"]}


def test_a_full_disk_is_one_paragraph(tmp_path):
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "data_tools",
            "pack",
            "coco_panoptic",
            str(SAMPLE),
            str(tmp_path / "x"),
            "--split",
            "val",
        ],
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "nothing more can be written" in run.stderr and "run the same command again" in run.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_pack_goes_on_once_there_is_room(single, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        full = start_pack(folder / "out", "--shard-size", "1", "--workers", "2")
        assert "nothing more can be written" in full.communicate(timeout=60)[1] and full.returncode == 2
        assert not list((folder / "out").glob("*.tar.*.partial"))  # they would only take up room
        subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True, timeout=30)
        assert pack(folder / "out", "--shard-size", "1") == 0
        assert files_of(folder / "out") == files_of(single)
    finally:
        subprocess.run(["umount", str(folder)], check=False, timeout=30)


@pytest.mark.parametrize("whole_group", [True, False], ids=["Ctrl-C", "kill -INT"])
def test_an_interrupted_pack_goes_on(tmp_path, whole_group):
    target = tmp_path / "interrupted"
    process = start_pack(target, "--shard-size", "3", "--workers", "2", slow=True)
    wait_until(lambda: list(target.glob("*.tar")), process)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "interrupted; the same command goes on where it stopped"
    assert "Traceback" not in said and not (target / "index.json").exists()
    done = {path: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    assert done and len(done) < 5 and not list(target.glob("*.partial"))
    assert pack(target, "--shard-size", "3") == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert Index.open(target).samples == 13


def test_a_killed_worker_is_told_and_the_pack_goes_on(single, tmp_path):
    target = tmp_path / "worker"
    process = start_pack(target, "--shard-size", "1", "--workers", "2", slow=True)
    wait_until(lambda: list(target.glob("*.tar.*.partial")), process)
    worker = next(target.glob("*.tar.*.partial")).name.split(".")[-2]
    os.kill(int(worker), signal.SIGKILL)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 75 and "a process of this command was killed" in said and "Traceback" not in said
    assert pack(target, "--shard-size", "1") == 0
    assert files_of(target) == files_of(single)
