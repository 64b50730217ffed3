"""`index` on shards that other programs made: our sample layout, or an image and one PNG of values."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.__main__ import main
from data_tools.problems import Problems
from data_tools.scan import scan_shard
from data_tools.source import open_reader
from mf_scale.data.ids import IdMeaning, LabelMember
from mf_scale.data.index import HEAD, Index
from tests.sources import jpeg, make_source, sample_members, write_shard
from tests.unit.packing import VOCABULARY, files_of, pack

CLASSES = {
    "name": "three",
    "classes": [{"name": name, "thing": False, "source_id": i} for i, name in enumerate(("sky", "road", "tree"), 1)],
}


def make_tar(path: Path, members: Mapping[str, bytes], **settings) -> None:
    with tarfile.open(path, "w", **settings) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def label_map(number: int, dtype: type = np.uint8) -> np.ndarray:
    """Classes 1 and `number` % 3 + 1, a background of 0, an edge of 255."""
    values: np.ndarray = np.zeros((40, 56), dtype)
    values[:10], values[10:20], values[:, -4:] = 1, number % 3 + 1, 255
    return values


def labelled(keys: list[str], suffix: str = "png", dtype: type = np.uint8) -> dict[str, bytes]:
    members = {}
    for number, key in enumerate(keys):
        members[f"{key}.jpg"] = jpeg(number, 40, 56)
        members[f"{key}.{suffix}"] = png(label_map(number, dtype))
        members[f"{key}.cls"] = b"7"  # what else there is, is left alone
    return members


def index(folder: Path, *options: str, ids: dict | None = None) -> int:
    vocabulary = folder.parent / "classes.json"
    vocabulary.write_text(json.dumps({**CLASSES, **({"ids": ids} if ids is not None else {})}))
    return main(["index", str(folder), "--vocabulary", str(vocabulary), "--workers", "1", *options])


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made"


LONG = "folder/" + "x" * 120
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "PAX": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_images_with_label_maps_become_samples(folder, capsys, kind, dtype):
    keys = ["a", "./b", "Straße/日本"] + ([] if kind == "ustar" else [LONG])
    make_tar(folder / "one.tar", labelled(keys, "Mask.PNG", dtype), format=FORMATS[kind])
    make_tar(folder / "two.tar", labelled(["z"], "mask.png", dtype), format=FORMATS[kind])
    assert index(folder, "--labels", ".mask.png", ids={"ignore": [255], "background": [0]}) == 0
    said = capsys.readouterr().out
    assert "3 of 3 classes found; ignored 7.1%, background 46.4%" in said
    assert f"indexed {len(keys) + 1} samples (semantic) of 2 shards" in said
    made = Index.open(folder)
    assert made.kind == "semantic" and made.labels is not None and made.labels.ids.ignore == (255,)
    assert [made.sample(i).key for i in range(made.samples)] == [*keys, "z"]
    reader = open_reader(made)
    for i, key in enumerate(keys):
        record, sample = made.sample(i), reader.load_exact(i)
        labels = sorted({0, i % 3})
        assert sample.key == key and record.class_ids == sample.labels.tolist() == labels
        assert (record.segments, record.height, record.width) == (len(labels), 40, 56)
        values = label_map(i)
        assert (sample.stored_map[0] == 255).sum() == (values == 255).sum()
        assert (sample.stored_map[0] == labels.index(i % 3)).sum() == (values == i % 3 + 1).sum()
    assert main(["verify", str(folder), "--workers", "1"]) == 0
    assert main(["stats", str(folder), "--workers", "1"]) == 0
    assert "46.4 % of pixels without a segment, 7.1 % ignored" in capsys.readouterr().out


def test_what_values_mean_can_be_told_on_the_command_line(folder):
    make_tar(folder / "one.tar", labelled(["a", "b", "c"]))
    meaning = ["--labels", "png", "--ignore", "255,254", "--background", "0"]
    assert index(folder, *meaning, ids={"ignore": [7], "offset": 5}) == 2  # the file's offset would still hold
    assert index(folder, *meaning, "--offset", "0", ids={"ignore": [7], "offset": 5}) == 0
    assert Index.open(folder).labels == LabelMember("png", IdMeaning((255, 254), (0,), 0))


def test_values_that_were_not_declared_are_refused_with_counts(folder, capsys):
    make_tar(folder / "one.tar", labelled(["a", "b", "c"]))
    assert index(folder, "--labels", "png", ids={"ignore": [255]}) == 2
    said = capsys.readouterr().err
    assert "0 (3,120 pixels in 3 of 3 maps" in said and not (folder / HEAD).exists()
    assert index(folder, "--labels", "png", ids={"ignore": [255, 1], "background": [0]}) == 2
    assert "the ignore value 1 is also that of class 'sky'" in capsys.readouterr().err


def test_ids_that_look_shifted_are_refused_until_accepted(folder, capsys):
    members: dict[str, bytes] = {}
    for number in range(3):
        values = np.full((40, 56), number, np.uint8)
        members |= {f"{number}.jpg": jpeg(number, 40, 56), f"{number}.png": png(values)}
    make_tar(folder / "one.tar", members)
    declared = ["--labels", "png", "--background", "0"]
    assert index(folder, *declared) == 2
    assert "the ids look one off" in capsys.readouterr().err
    assert index(folder, *declared, "--accept-ids") == 0
    assert "accepted: the ids look one off" in capsys.readouterr().out


def test_label_maps_that_do_not_fit_are_told(folder, capsys):
    members = labelled(["a", "b", "c", "d"])
    members["b.png"] = png(np.zeros((10, 10), np.uint8))
    members["c.png"] = b"no png"
    members["d.jpg"] = b""
    del members["a.png"]
    make_tar(folder / "one.tar", members)
    assert index(folder, "--labels", "png", ids={"ignore": [255], "background": [0]}) == 2
    said = capsys.readouterr().err
    assert "samples that are incomplete or wrong: 4" in said and "Traceback" not in said
    assert "a in one.tar: it needs one image and one png" in said and not (folder / HEAD).exists()


def test_shards_made_elsewhere_are_indexed_as_packed(tmp_path):
    assert pack(tmp_path / "packed", "--shard-size", "5") == 0
    (tmp_path / "copy").mkdir()
    for shard in (tmp_path / "packed").glob("*.tar"):
        shutil.copy(shard, tmp_path / "copy")
    assert main(["index", str(tmp_path / "copy"), "--vocabulary", str(VOCABULARY), "--workers", "2"]) == 0
    packed = files_of(tmp_path / "packed")
    del packed["pack.json"]
    assert files_of(tmp_path / "copy") == packed
    again = ["index", str(tmp_path / "copy"), "--vocabulary", str(VOCABULARY), "--kind", "instance", "--overwrite"]
    assert main(again) == 0 and Index.open(tmp_path / "copy").kind == "instance"


def problems_of(path: Path) -> str:
    found = scan_shard(path, 6)
    assert isinstance(found, Problems)
    return "; ".join(found.lines())


def split_members(number: int, key: str) -> tuple[dict, dict]:
    members = sample_members(number, key)
    image = {"__key__": key, "jpg": members.pop("jpg")}
    return image, members


def test_broken_samples_are_told_together(tmp_path):
    image, rest = split_members(0, "a")
    outside, federated = sample_members(1, "d"), sample_members(1, "e")
    meta = json.loads(outside["json"])
    federated["json"] = json.dumps({**meta, "federated": {"negative": [17], "not_exhaustive": []}}).encode()
    meta["segments"][0]["label"] = 6
    outside["json"] = json.dumps(meta).encode()
    alone = {"__key__": "c", "jpg": image["jpg"]}
    write_shard(tmp_path / "x.tar", [image, sample_members(1, "b"), rest, alone, outside, federated])
    said = problems_of(tmp_path / "x.tar")
    assert "keys whose members stand apart: 1 (a in x.tar)" in said
    assert "c in x.tar: it needs one image and one json" in said
    assert "label 6 is outside the vocabulary of 6 classes" in said and "label 17 is outside" in said


def test_everything_wrong_in_all_shards_is_told_at_once(folder, capsys):
    image, _ = split_members(0, "a")
    write_shard(folder / "1.tar", [sample_members(0, "a"), image])
    write_shard(folder / "2.tar", [image])
    write_shard(folder / "3.tar", [sample_members(0, "good")])
    assert index(folder, "--workers", "2") == 2
    said = capsys.readouterr().err
    assert "1.tar: member a.jpg stands twice" in said and "a in 2.tar: it needs one image" in said


def test_keys_in_two_shards_are_refused(folder, capsys):
    for name in ("1.tar", "2.tar"):
        make_tar(folder / name, labelled(["same", name[0], f"{name[0]}x"]))
    assert index(folder, "--labels", "png", ids={"ignore": [255], "background": [0]}) == 2
    assert "keys in two shards: 1 (same in 1.tar and 2.tar)" in capsys.readouterr().err


def test_cut_joined_and_damaged_tars_are_refused(tmp_path):
    write_shard(tmp_path / "whole.tar", [sample_members(i, f"k{i}") for i in range(3)])
    data = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        member, middle = tar.getmember("k1.jpg"), tar.getmember("k1.jpg").offset_data + 100
    (tmp_path / "bad.tar").write_bytes(data[:middle])
    assert "tars that cannot be read: 1 (bad.tar" in problems_of(tmp_path / "bad.tar")
    header = member.offset
    (tmp_path / "bad.tar").write_bytes(data[: header + 20] + b"\x7f" * 30 + data[header + 50 :])
    assert f"the header at byte {header} is broken" in problems_of(tmp_path / "bad.tar")
    (tmp_path / "bad.tar").write_bytes(data + data)
    assert "goes on behind its end" in problems_of(tmp_path / "bad.tar")
    for zeros in (0, 300):
        (tmp_path / "bad.tar").write_bytes(data[:header] + bytes(zeros))
        assert "it ends without an end block" in problems_of(tmp_path / "bad.tar")
    (tmp_path / "bad.tar").write_bytes(gzip.compress(data))
    assert "it is compressed (gzip)" in problems_of(tmp_path / "bad.tar")
    (tmp_path / "bad.tar").write_bytes(b"")
    assert "empty file" in problems_of(tmp_path / "bad.tar")
    (tmp_path / "bad.tar").write_bytes(bytes(10240))
    assert "tars without a sample: 1 (bad.tar)" in problems_of(tmp_path / "bad.tar")


def test_a_name_of_thousands_of_headers_is_told(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = b"L", 4
    block = header.tobuf(tarfile.GNU_FORMAT) + b"abc\0".ljust(512, b"\0")
    (tmp_path / "x.tar").write_bytes(block * 5000)
    assert "tars that cannot be read: 1 (x.tar: thousands of headers" in problems_of(tmp_path / "x.tar")


def test_links_strange_names_and_folders(tmp_path):
    members = {name: value for name, value in sample_members(0, "a").items() if isinstance(value, bytes)}
    names = {f"./in/a.{suffix}": value for suffix, value in members.items()}
    make_tar(tmp_path / "x.tar", names)
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        folder = tarfile.TarInfo("./in")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    scan = scan_shard(tmp_path / "x.tar", 6)
    assert not isinstance(scan, Problems) and scan.rows["key"].to_pylist() == ["./in/a"]
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert "member b.jpg is a link, a device or sparse" in problems_of(tmp_path / "x.tar")
    make_tar(tmp_path / "y.tar", {"caf\udce9.jpg": b""}, encoding="utf-8", errors="surrogateescape", format=0)
    assert "is not UTF-8" in problems_of(tmp_path / "y.tar")


def test_compressed_shards_are_refused_with_a_remedy(folder, capsys):
    make_tar(folder / "a.tar", labelled(["a"]))
    subprocess.run(["gzip", "-k", str(folder / "a.tar")], check=True, timeout=30)
    assert index(folder, "--labels", "png") == 2
    said = capsys.readouterr().err
    assert "1 shards are compressed (a.tar.gz)" in said and "gunzip" in said


def test_oddly_named_shards_are_refused_before_they_are_read(folder, capsys):
    for name in ("train (1).tar", "straße.tar", ".hidden.tar", "good.tar"):
        (folder / name).write_bytes(b"would be refused, too, if it were read")
    assert index(folder) == 2
    said = capsys.readouterr().err
    assert "shards whose names are not plain: 3 (.hidden.tar, straße.tar, train (1).tar)" in said
    assert "letters, digits, _ . + = , @ -" in said and "cannot be read" not in said


def test_an_index_does_not_depend_on_the_number_of_processes(tmp_path):
    made = make_source(tmp_path / "made", [2, 3, 1])
    vocabulary = tmp_path / "v.json"
    vocabulary.write_text(json.dumps(made.vocabulary.to_dict()))
    before = files_of(tmp_path / "made")
    command = ["index", str(tmp_path / "made"), "--vocabulary", str(vocabulary), "--overwrite", "--workers", "3"]
    assert main(command) == 0 and files_of(tmp_path / "made") == before
