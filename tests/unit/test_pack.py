"""python -m data_tools: pack, verify, stats, preview, index, on the embedded sample and on broken copies of it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.__main__ import main
from data_tools.source import open_reader
from mf_scale.data.index import Index
from mf_scale.errors import UserError

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_tools" / "sample" / "coco_panoptic"
VOCABULARY = ROOT / "data_tools" / "vocabularies" / "coco_panoptic_133.json"


def pack(target: Path, *options: str, source: Path = SAMPLE, split: str = "val") -> int:
    return main(["pack", "coco_panoptic", str(source), str(target), "--split", split, "--workers", "1", *options])


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "val"
    assert pack(target, "--shard-size", "5") == 0
    return target


def test_the_embedded_sample_is_whole():
    counts = {split: len(list((SAMPLE / split).glob("*.jpg"))) for split in ("train", "val")}
    assert counts == {"train": 40, "val": 13}
    stuff = SAMPLE.parent / "coco_stuff"
    assert len(list(stuff.glob("*/*.jpg"))) == 49
    files = [f for f in SAMPLE.parent.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 6_000_000
    attributed = (SAMPLE.parent / "ATTRIBUTION.md").read_text()
    for image in SAMPLE.parent.rglob("*.jpg"):
        assert f"| {image.relative_to(SAMPLE.parent)} | http" in attributed
    for listing in SAMPLE.parent.rglob("annotations/*.json"):
        assert {image["license"] for image in json.loads(listing.read_text())["images"]} <= {4, 5, 7}


def test_what_is_packed_is_what_was_annotated(packed):
    index = Index.open(packed)
    listing = json.loads((SAMPLE / "annotations" / "panoptic_val.json").read_text())
    of_key = {Path(a["file_name"]).stem: a for a in listing["annotations"]}
    label_of = index.vocabulary.index_of_source_id()
    assert [s.samples for s in index.shards] == [5, 5, 3]
    reader = open_reader(index)
    keys = []
    for i in range(index.samples):
        sample = reader.load_exact(i)
        keys.append(sample.key)
        annotation = of_key[sample.key]
        with Image.open(SAMPLE / "annotations" / "panoptic_val" / annotation["file_name"]) as png:
            colours = np.asarray(png).astype(int) @ np.array([1, 256, 65536])
        with Image.open(SAMPLE / "val" / f"{sample.key}.jpg") as image:
            assert (np.asarray(image.convert("RGB")) == sample.image).all()
        for number, segment in enumerate(annotation["segments_info"]):
            assert ((sample.stored_map[0] == number) == (colours == segment["id"])).all()
            assert sample.labels[number] == label_of[segment["category_id"]]
            assert sample.crowd[number] == bool(segment["iscrowd"])
        assert ((sample.stored_map[0] == 254) == (colours == 0)).all()
    assert sorted(keys) == sorted(of_key) and keys != sorted(keys)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_input_gives_the_same_bytes(packed, tmp_path):
    assert pack(tmp_path / "two", "--shard-size", "5", "--workers", "2") == 0
    assert files_of(tmp_path / "two") == files_of(packed)
    assert pack(tmp_path / "seed", "--shard-size", "5", "--seed", "1") == 0
    assert Index.open(tmp_path / "seed").digest != Index.open(packed).digest


def test_shards_can_be_cut_by_size(tmp_path):
    assert pack(tmp_path / "mib", "--shard-size", "1MiB") == 0
    assert len(Index.open(tmp_path / "mib").shards) == 1
    assert pack(tmp_path / "bad", "--shard-size", "1GB") == 2


def test_a_finished_pack_is_left_alone_and_another_one_refused(packed, capsys):
    before = files_of(packed)
    assert pack(packed, "--shard-size", "5") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert pack(packed, "--shard-size", "5", "--crowd", "ignore") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert files_of(packed) == before


def test_overwrite_replaces_and_foreign_files_stay(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert pack(tmp_path) == 2
    assert "notes.txt" in capsys.readouterr().err
    for folder, options in (
        (tmp_path / "a", ["--shard-size", "2"]),
        (tmp_path / "a", ["--crowd", "ignore", "--overwrite"]),
    ):
        assert pack(folder, *options) == 0
    index = Index.open(tmp_path / "a")
    assert index.crowd == "ignore" and len(list((tmp_path / "a").glob("*.tar"))) == len(index.shards) == 1


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert pack(tmp_path / "dry", "--dry-run") == 0
    assert "13 samples, 1 shards, 133 classes" in capsys.readouterr().out and not (tmp_path / "dry").exists()


def test_a_killed_pack_is_not_taken_for_finished_and_goes_on(packed, tmp_path):
    target = tmp_path / "killed"
    command = [sys.executable, "-m", "data_tools", "pack", "coco_panoptic", str(SAMPLE), str(target)]
    options = ["--split", "val", "--shard-size", "1", "--workers", "2"]
    process = subprocess.Popen([*command, *options], start_new_session=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(target.glob("*.tar"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    done = {path: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    assert len(done) >= 2
    if not (target / "index.json").exists():  # it may have been faster than this loop
        with pytest.raises(UserError, match="no index"):
            Index.open(target)
    assert pack(target, "--shard-size", "1") == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert pack(tmp_path / "fresh", "--shard-size", "1") == 0
    assert files_of(target) == files_of(tmp_path / "fresh")


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


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(SAMPLE, tmp_path / "copy"))


def edit(source: Path, change) -> None:
    path = source / "annotations" / "panoptic_val.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_everything_wrong_in_the_lists_is_told_at_once(copy, tmp_path, capsys):
    def change(data):
        data["annotations"][0]["segments_info"][0]["category_id"] = 999
        data["annotations"][1]["image_id"] = 1
        data["annotations"][2]["segments_info"][0]["id"] = 0
        data["annotations"].append(data["annotations"][3])

    edit(copy, change)
    images = sorted((copy / "val").iterdir())
    images[5].unlink()
    (copy / "annotations" / "panoptic_val" / images[6].with_suffix(".png").name).unlink()
    assert pack(tmp_path / "out", source=copy) == 2
    said = capsys.readouterr().err
    for part in ("category 999", "without an image entry: 1", "without annotation: 1", "ids repeat or are 0: 1",
                 "annotated twice: 1", "missing images", images[5].name, "missing maps"):  # fmt: skip
        assert part in said, part
    assert "Traceback" not in said and not (tmp_path / "out").exists()


def test_everything_wrong_in_the_files_is_told_and_a_repaired_source_packs(copy, tmp_path, capsys):
    names = sorted(path.stem for path in (copy / "val").iterdir())
    maps = copy / "annotations" / "panoptic_val"
    data = (copy / "val" / f"{names[0]}.jpg").read_bytes()
    (copy / "val" / f"{names[0]}.jpg").write_bytes(data[: len(data) // 2])
    Image.open(maps / f"{names[1]}.png").crop((0, 0, 50, 50)).save(maps / f"{names[1]}.png")
    Image.new("RGB", Image.open(maps / f"{names[2]}.png").size, (1, 2, 3)).save(maps / f"{names[2]}.png")
    (maps / f"{names[3]}.png").write_bytes(b"no png")

    def change(data):
        of_name = {a["file_name"][:-4]: a for a in data["annotations"]}
        extra = {**of_name[names[4]]["segments_info"][0], "id": 77}
        of_name[names[4]]["segments_info"].append(extra)

    edit(copy, change)
    assert pack(tmp_path / "out", "--shard-size", "4", source=copy) == 2
    said = capsys.readouterr().err
    assert "5 samples cannot be packed" in said
    kinds = ("do not decode or have", "size is not that", "does not list", "maps that do not decode", "lack ids")
    for kind, name in zip(kinds, names, strict=False):
        assert kind in said and name in said, kind
    assert not (tmp_path / "out" / "index.json").exists()
    assert pack(tmp_path / "out") == 2
    assert pack(tmp_path / "out", "--overwrite") == 0


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

    place = {"pack": "pack.encode_sample", "index": "index.scan_shard", "preview": "preview.draw_segments"}
    monkeypatch.setattr(f"data_tools.{place.get(command, 'source.open_reader')}", interrupt)
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


@pytest.mark.parametrize("whole_group", [True, False], ids=["Ctrl-C", "kill -INT"])
def test_an_interrupted_pack_goes_on(packed, tmp_path, whole_group):
    target = tmp_path / "interrupted"
    slow = (
        "import sys, time, data_tools.pack as pack; from data_tools.__main__ import main; encode = pack.encode_sample;"
        "pack.encode_sample = lambda *a: time.sleep(0.3) or encode(*a); sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["pack", "coco_panoptic", str(SAMPLE), str(target), "--split", "val", "--shard-size", "3"]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments, "--workers", "2"],
        start_new_session=True, cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(target.glob("*.tar")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "interrupted; the same command goes on where it stopped"
    assert "Traceback" not in said and not (target / "index.json").exists()
    done = {path: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    assert done and len(done) < 5
    assert pack(target, "--shard-size", "3") == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not list(target.glob("*.partial")) and Index.open(target).samples == 13


def test_verify_finds_what_is_wrong(packed, tmp_path, capsys):
    assert main(["verify", str(packed)]) == 0
    assert "3 shards and 13 samples are sound" in capsys.readouterr().out
    broken = Path(shutil.copytree(packed, tmp_path / "broken"))
    path = broken / "val-000001.tar"
    record = Index.open(broken).sample(6)
    data = bytearray(path.read_bytes())
    data[record.offset + 520 : record.offset + 600] = bytes(80)
    path.chmod(0o644)
    path.write_bytes(data)
    assert main(["verify", str(broken)]) == 2
    assert "val-000001.tar has another checksum" in capsys.readouterr().err
    # indexed as it is now, the checksum fits and the image is found not to decode
    assert main(["index", str(broken), "--vocabulary", str(VOCABULARY)]) == 2
    assert main(["index", str(broken), "--vocabulary", str(VOCABULARY), "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["verify", str(broken)]) == 2
    assert f"1 of 13 samples are not sound: samples that do not decode: 1 ({record.key} in" in capsys.readouterr().err


def test_shards_made_elsewhere_are_indexed_as_packed(packed, tmp_path):
    for shard in packed.glob("*.tar"):
        shutil.copy(shard, tmp_path)
    assert main(["index", str(tmp_path), "--vocabulary", str(VOCABULARY)]) == 0
    assert Index.open(tmp_path).digest == Index.open(packed).digest


def test_stats_count_classes(packed, capsys):
    assert main(["stats", str(packed), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    listing = json.loads((SAMPLE / "annotations" / "panoptic_val.json").read_text())
    people = [s for a in listing["annotations"] for s in a["segments_info"] if s["category_id"] == 1]
    row = next(row for row in counts["classes"] if row["name"] == "person")
    assert row["segments"] == len(people) and row["pixels"] == sum(s["area"] for s in people)
    assert sum(r["pixels"] for r in counts["classes"]) + counts["unlabelled_pixels"] == counts["pixels"]
    assert main(["stats", str(packed)]) == 0
    assert "person" in capsys.readouterr().out


def test_preview_draws_a_sheet(packed, tmp_path):
    assert main(["preview", str(packed), str(tmp_path / "sheet.png"), "--count", "3"]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (1280, 640) and len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 1000
