"""The folder of a pack: one plan, nothing touched before the ids are checked, and what is no longer whole is seen."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import target
from data_tools.__main__ import main
from data_tools.formats import coco_panoptic
from data_tools.pack import Packing, PackOptions, plan_pack
from data_tools.problems import Problems
from data_tools.scan import ShardScan
from data_tools.shards import pack_shard, rows_of
from data_tools.target import PLAN, look_at, prepare
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary
from tests.unit.packing import SAMPLE, VOCABULARY, copy_of, files_of, pack


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Five samples a shard: 5, 5 and 3."""
    made = tmp_path_factory.mktemp("packed") / "val"
    assert pack(made, "--shard-size", "5") == 0
    return made


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    return copy_of(packed, tmp_path / "copy")


def planned(folder: Path, seed: int = 0) -> Packing:
    source = coco_panoptic.open_source(SAMPLE, "val", Vocabulary.load(VOCABULARY))
    return plan_pack(source, folder, PackOptions("coco_panoptic", "val", "5", seed, "none", "none"))


def cut_at_a_sample(path: Path, keep: int) -> None:
    """Leave the first samples of a shard: without its end block it is still a tar."""
    with tarfile.open(path) as tar:
        offsets: dict[str, int] = {}
        for member in tar:
            offsets.setdefault(member.name.split(".")[0], member.offset)
    os.truncate(path, list(offsets.values())[keep])


def end(path: Path) -> None:
    """Add the end block, as a program that copies samples would."""
    with path.open("ab") as file:
        file.write(bytes(1024))


def test_of_two_packs_that_start_at_once_one_finds_the_other(tmp_path, monkeypatch):
    first, second = planned(tmp_path / "out"), planned(tmp_path / "out", seed=1)
    link = os.link

    def late(*names: Path) -> None:
        (first.folder / PLAN).write_text(json.dumps(first.plan))  # while the second believes the folder to be empty
        link(*names)

    monkeypatch.setattr(target.os, "link", late)
    with pytest.raises(UserError, match="other arguments or input"):
        prepare(second.folder, second.plan, overwrite=False)
    assert json.loads((tmp_path / "out" / PLAN).read_text()) == first.plan
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PLAN]
    assert look_at(first.folder, first.plan).state == "begun"


def test_a_file_system_without_links_holds_one_plan_too(tmp_path, monkeypatch):
    def refuse(*_: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links")

    monkeypatch.setattr(target.os, "link", refuse)
    first, second = planned(tmp_path / "out"), planned(tmp_path / "out", seed=1)
    prepare(first.folder, first.plan, overwrite=False)
    assert files_of(tmp_path / "out")[PLAN].endswith(b"}\n") and look_at(first.folder, first.plan).state == "begun"
    target._write_plan(second.folder, second.plan)
    assert look_at(first.folder, first.plan).state == "begun"


def test_a_shard_of_another_pack_is_not_taken(tmp_path):
    """The same samples, other classes: only the plan in the sidecar tells."""
    job = planned(tmp_path).jobs[0]
    foreign = replace(job, plan="another")
    assert isinstance(pack_shard(foreign), ShardScan) and rows_of(foreign) is not None
    written = job.path.stat().st_ino
    assert rows_of(job) is None
    assert isinstance(pack_shard(job), ShardScan)
    assert job.path.stat().st_ino != written and rows_of(job) is not None and rows_of(foreign) is None


@pytest.mark.parametrize("ended", [True, False], ids=["with end block", "without"])
def test_a_shard_cut_between_samples_is_written_again(packed, copy, capsys, ended):
    for name in ("index.json", "samples.arrow"):
        (copy / name).unlink()
    cut_at_a_sample(copy / "val-000001.tar", 2)
    if ended:
        end(copy / "val-000001.tar")
    assert pack(copy, "--shard-size", "5") == 0
    assert "packed 13 samples" in capsys.readouterr().out and files_of(copy) == files_of(packed)


def test_a_sidecar_of_fewer_samples_is_not_believed(tmp_path):
    job = planned(tmp_path).jobs[0]
    fewer = replace(job, records=job.records[:2])
    assert isinstance(pack_shard(fewer), ShardScan)
    assert rows_of(fewer) is not None and rows_of(job) is None
    scan = pack_shard(job)
    assert isinstance(scan, ShardScan) and scan.shard.samples == 5


def test_a_shard_that_does_not_read_back_as_written_is_told(tmp_path):
    job = planned(tmp_path).jobs[0]
    unreadable = replace(job, records=[*job.records[:-1], replace(job.records[-1], key="__a__/b")])
    found = pack_shard(unreadable)
    assert isinstance(found, Problems) and "do not read back as the samples written to them: 1" in found.lines()[0]
    assert not list(tmp_path.iterdir())


DAMAGE = {
    "cut": ("val-000001.tar", lambda path: cut_at_a_sample(path, 2), "val-000001.tar has "),
    "missing": ("val-000002.tar", Path.unlink, "val-000002.tar is missing"),
    "columns": ("samples.arrow", Path.unlink, "samples.arrow is missing"),
    "head": ("index.json", lambda path: path.write_text("{"), "index.json cannot be read"),
}


@pytest.mark.parametrize("name, damage, told", DAMAGE.values(), ids=DAMAGE)
def test_a_finished_pack_that_is_no_longer_whole_is_completed(packed, copy, capsys, name, damage, told):
    damage(copy / name)
    assert pack(copy, "--shard-size", "5") == 0
    said = capsys.readouterr().out
    assert f"is no longer whole: {told}" in said and "packed 13 samples" in said
    assert files_of(copy) == files_of(packed)


@pytest.fixture
def made(tmp_path) -> Path:
    """A folder of images with label maps whose ids are all declared."""
    source = tmp_path / "made"
    for folder in ("images", "labels"):
        (source / folder).mkdir(parents=True)
    for name in "abc":
        Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(source / "images" / f"{name}.png")
        Image.fromarray(np.eye(20, 30, dtype=np.uint8)).save(source / "labels" / f"{name}.png")
    data = {"name": "two", "classes": [{"name": n, "thing": False, "source_id": i} for i, n in enumerate("xy")]}
    (source / "classes.json").write_text(json.dumps({**data, "ids": {}}))
    return source


def test_a_refused_pack_leaves_the_folder_as_it_was(made, tmp_path, capsys):
    command = ["pack", "folder", str(made), str(tmp_path / "out"), "--split", "all", "--workers", "1"]
    good = (made / "labels" / "b.png").read_bytes()
    Image.fromarray(np.full((20, 30), 77, np.uint8)).save(made / "labels" / "b.png")
    assert main(command) == 2
    assert not (tmp_path / "out").exists()
    (made / "labels" / "b.png").write_bytes(good)
    assert main(command) == 0
    before = files_of(tmp_path / "out")
    Image.fromarray(np.full((20, 30), 77, np.uint8)).save(made / "labels" / "b.png")
    assert main([*command, "--overwrite"]) == 2
    assert "77 (600 pixels" in capsys.readouterr().err and files_of(tmp_path / "out") == before


def test_overwrite_goes_on_beside_foreign_files(made, tmp_path):
    command = ["pack", "folder", str(made), str(tmp_path / "out"), "--split", "all", "--workers", "1"]
    assert main(command) == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main([*command, "--seed", "1", "--overwrite"]) == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "out" / PLAN).read_text())["options"]["seed"] == 1


def test_text_that_cannot_be_stored_is_told(tmp_path):
    job = planned(tmp_path).jobs[0]
    first, second, *rest = job.records
    records = [replace(first, origin={"file": "caf\udce9.jpg"}), replace(second, key="caf\udce9"), *rest]
    found = pack_shard(replace(job, records=records))
    assert isinstance(found, Problems)
    assert found.found["samples with names or text that cannot be UTF-8"] == [first.key, "caf\udce9"]


def test_a_part_completes_what_was_cut(packed, copy):
    cut_at_a_sample(copy / "val-000001.tar", 1)
    assert pack(copy, "--shard-size", "5", "--part", "0/2") == 0
    assert files_of(copy) == files_of(packed)
