"""A person's mistakes: exit code 2, one paragraph with what, where and what to do, no traceback, nothing harmed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.__main__ import main as tools
from mf_scale.cli import main
from mf_scale.errors import EXIT_FAULT
from tests.integration.program import LARGER, SMALL, Run

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """`train` installs signal handlers in this process: put the old ones back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def train(tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The paragraph that `mf-scale train` says about a mistake, in one process."""
    sources = [f"data.train={packed}/train", f"data.val={packed}/val", f"run_dir={tmp_path}/run", "train.steps=2"]
    arguments = ["train", str(ROOT / "configs/base.yaml"), *SMALL, *sources, "--processes", "1", *overrides]
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    paragraphs = [line for line in text.splitlines() if line.startswith("mf-scale: ")]
    assert len(paragraphs) == 1, text
    return paragraphs[0]


def test_a_typo_in_a_key(tmp_path, packed, capsys):
    assert "Did you mean train.steps?" in train(tmp_path, packed, capsys, "trian.steps=5")
    assert not (tmp_path / "run").exists()


def test_a_source_that_is_not_there(tmp_path, packed, capsys):
    text = train(tmp_path, packed, capsys, f"data.train={tmp_path}/nowhere")
    assert f"{tmp_path}/nowhere" in text
    assert "data_tools" in text


def test_no_source_at_all(tmp_path, packed, capsys):
    assert "data.train is not set" in train(tmp_path, packed, capsys, "data.train=null")


def test_missing_and_changed_shards_are_found_before_training(tmp_path, packed, capsys):
    source = tmp_path / "train"
    shutil.copytree(packed / "train", source)
    shard = next(source.glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    assert shard.name in train(tmp_path, packed, capsys, f"data.train={source}")
    shard.unlink()
    assert shard.name in train(tmp_path, packed, capsys, f"data.train={source}")
    assert not list((tmp_path / "run").glob("metrics*"))


def test_wrong_class_count(tmp_path, packed, capsys):
    text = train(tmp_path, packed, capsys, "model.num_classes=150")
    assert "model.num_classes = 150" in text
    assert "133 classes" in text


def test_an_unknown_backbone_names_its_neighbours(tmp_path, packed, capsys):
    assert "resnet50" in train(tmp_path, packed, capsys, "model.backbone.name=resnet_50")


def test_somebody_elses_folder_is_left_alone(tmp_path, packed, capsys):
    theirs = tmp_path / "run/checkpoints/best/model.pt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    assert "no run of this program" in train(tmp_path, packed, capsys)
    assert theirs.read_text() == "precious"


def test_a_vocabulary_in_another_order_is_refused_on_resume(tmp_path, packed):
    run = Run(tmp_path / "run", packed)
    assert run.train("train.steps=2", processes=1).returncode == 0
    source = tmp_path / "turned"
    shutil.copytree(packed / "train", source)
    turned = json.loads((ROOT / "data_tools/vocabularies/coco_panoptic_133.json").read_text())
    turned["classes"].reverse()
    (tmp_path / "turned.json").write_text(json.dumps(turned))
    (source / "index.json").unlink()
    assert tools(["index", str(source), "--vocabulary", str(tmp_path / "turned.json")]) in (0, None)
    more = [f"data.train={source}", "data.val=null", "train.steps=4"]
    done = run.train(*more, processes=1)
    assert done.returncode == 2
    assert "the first class that differs is 'person'" in done.stderr
    done = run.train(*more, f"run_dir={tmp_path}/new", f"train.init_from={run.folder}", processes=1)
    assert done.returncode == 0, done.stderr  # rows go over by name, so that the order does not matter
    assert "133 of 133 classes take their rows" in done.stdout + done.stderr


def test_a_refused_resume_changes_nothing(tmp_path, packed):
    run = Run(tmp_path / "run", packed)
    assert run.train("train.steps=2", processes=1).returncode == 0
    before = (run.folder / "config.yaml").read_text()
    done = run.train("train.steps=4", "model.decoder.queries=7")
    assert done.returncode == 2
    assert done.stderr.count("mf-scale: ") == 1, done.stderr
    assert (run.folder / "config.yaml").read_text() == before


def test_metrics_that_cannot_be_written_end_all_ranks_in_one_paragraph(tmp_path, packed):
    run = Run(tmp_path / "run", packed)
    (run.folder / "metrics.jsonl").mkdir(parents=True)
    (run.folder / ".lock").write_text("")
    done = run.train("train.steps=4")
    assert done.returncode == 2
    assert done.stderr.count("mf-scale: ") == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_a_shard_cut_short_in_mid_run_ends_all_ranks_and_loses_nothing(tmp_path, packed):
    source = tmp_path / "train"
    shutil.copytree(packed / "train", source)
    run = Run(tmp_path / "run", packed)
    overrides = [f"data.train={source}", "train.steps=300", "data.buffer_mib=1", "data.shuffle=full"]
    child = subprocess.Popen(run.command(*overrides), stderr=subprocess.PIPE, text=True)
    try:
        while run.last_step() < 2 and child.poll() is None:
            time.sleep(0.05)
        os.truncate(next(source.glob("*.tar")), 20_000)
        _, output = child.communicate(timeout=90)
    finally:
        child.kill()
    assert child.returncode in (2, 75), output
    assert output.count("mf-scale: ") == 1, output
    assert "Traceback" not in output
    assert run.state(run.last_step())["step"] == run.last_step()


def test_batch_that_cannot_be_cut(tmp_path, packed, capsys):
    told = train(tmp_path, packed, capsys, "train.global_batch=4", "--processes", "3")
    assert "train.global_batch = 4 cannot be shared by 3 ranks" in told


def test_a_run_directory_in_use(tmp_path, packed, capsys):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.lock").open("w") as lock:
        lock.write("4711 node7\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "4711 node7" in train(tmp_path, packed, capsys)


def test_a_run_directory_that_cannot_be_made(tmp_path, packed, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot write" in train(tmp_path, packed, capsys, f"run_dir={tmp_path}/file/run")


def test_all_ranks_hear_of_it_and_one_speaks(tmp_path, packed):
    """Once where rank 0 looked alone, once where every rank fell over it."""
    for mistake in (f"data.train={tmp_path}/nowhere", "model.backbone.name=resnet_50"):
        done = Run(tmp_path / "run", packed).train(mistake)
        assert done.returncode == 2
        assert done.stderr.count("mf-scale: ") == 1, done.stderr
        assert "Traceback" not in done.stderr


def test_too_many_bad_samples_stop_the_run_with_3(tmp_path, packed):
    """One image of forty does not decode: it is quarantined, and with 2.5 % bad the guard ends the run."""
    source = tmp_path / "train"
    shutil.copytree(packed / "train", source)
    spoil_one_image(source)
    run = Run(tmp_path / "run", packed)
    done = run.train(f"data.train={source}", "train.steps=12")
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "could not be decoded" in done.stderr
    assert any(r["event"] == "quarantine" for r in run.records())
    tolerated = Run(tmp_path / "tolerated", packed)
    done = tolerated.train(f"data.train={source}", "train.steps=12", "data.max_bad_fraction=0.5")
    assert done.returncode == 0, done.stderr
    event = next(r for r in tolerated.records() if r["event"] == "quarantine")
    assert event["key"] != event["replaced_by"] and event["source"] == str(source)
    command = [sys.executable, "-m", "mf_scale.cli", "data", "samples", str(tolerated.folder)]
    said = subprocess.run(
        [*command, "--step", str(event["step"])], capture_output=True, text=True, timeout=60, check=True
    )
    assert f"{event['key']}  (" in said.stdout
    assert f"quarantined: {event['replaced_by']} was trained instead" in said.stdout


def spoil_one_image(source: Path) -> None:
    """Cut the first image short in place (zeros), and bring size and checksums of the index up to date."""
    shard = next(source.glob("*.tar"))
    with tarfile.open(shard) as tar:
        member = next(m for m in tar if m.name.endswith(".jpg"))
    data = bytearray(shard.read_bytes())
    middle = member.offset_data + member.size // 2
    data[middle : member.offset_data + member.size] = bytes(member.offset_data + member.size - middle)
    shard.write_bytes(data)
    vocabulary = ROOT / "data_tools/vocabularies/coco_panoptic_133.json"
    (source / "index.json").unlink()
    assert tools(["index", str(source), "--vocabulary", str(vocabulary)]) in (0, None)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_leaves_the_run_alive_and_the_older_checkpoints_intact(tmp_path, packed):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        run = Run(folder / "run", packed)
        done = run.train("train.steps=4", "tracking.wandb=disabled", LARGER)
        assert done.returncode == 0, done.stderr
        free = shutil.disk_usage(folder).free
        (folder / "ballast").write_bytes(bytes(free - 6 * 2**20))
        full = run.train("train.steps=10", "tracking.wandb=disabled", LARGER)
        assert full.returncode == EXIT_FAULT, full.stderr  # space may come back: worth another start
        assert "Traceback" not in full.stderr
        assert "the run goes on" in full.stderr
        assert "Free some space" in full.stderr
        assert full.stderr.count("mf-scale: ") == 1
        assert run.last_step() == 10
        (folder / "ballast").unlink()
        again = run.train("train.steps=10", "tracking.wandb=disabled", LARGER)
        assert again.returncode == 0, again.stderr
        assert "at step 4" in again.stderr
        assert list(run.series("step", "loss")) == list(range(1, 11))
    finally:
        subprocess.run(["umount", str(folder)], check=False)
