"""Prediction in parts: lists, tars and sources, going on after a stop, COCO's files, quarantine, what is refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mf_scale.data.storage import Storage
from mf_scale.data.tars import tar_images
from mf_scale.errors import FaultError, StoppedOnRequest, UserError
from mf_scale.evaluation.prediction import parts as module
from mf_scale.evaluation.prediction.parts import predict_images
from mf_scale.evaluation.prediction.plan import remove_prediction
from mf_scale.evaluation.prediction.words import Options, Share
from mf_scale.rundir import RunDir
from tests.unit.painted import painted_source
from tests.unit.predicting import IMAGES, contents, lines, predicted, small_run, tar_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of five bundled images, one of them as a url, and an entry that is no image."""
    file = tmp_path_factory.mktemp("list") / "images.txt"
    broken = file.with_name("broken.jpg")
    broken.write_bytes(IMAGES[0].read_bytes()[:3000])
    named = [str(IMAGES[0]), f"file://{IMAGES[1]}", "# a comment", "", *map(str, IMAGES[2:4]), str(broken)]
    file.write_text("\n".join([*named, str(IMAGES[4])]) + "\n")
    return file


@pytest.fixture(scope="module")
def whole(run: str, listed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed prediction of the list by one process, parts of two."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert predicted([listed], run, out, part_size=2) == 2
    return out


def ids_of(png: bytes) -> np.ndarray:
    """Ids of a COCO panoptic PNG, as panopticapi's rgb2id reads them."""
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode == "RGB"
        return np.asarray(image).astype(np.int64) @ [1, 256, 65536]


def test_panoptic_parts_are_as_panopticapi_reads_them(whole: Path) -> None:
    merged = json.loads((whole / "panoptic.json").read_text())
    assert [(c["id"], c["name"], c["isthing"]) for c in merged["categories"]] == [
        (1, "cat", 1), (2, "dog", 1), (3, "sky", 0), (4, "grass", 0)
    ]  # fmt: skip
    assert [image["id"] for image in merged["images"]] == [1, 2, 3, 4, 6]
    assert merged["images"][1]["file_name"] == f"file://{IMAGES[1]}"
    pngs: dict[str, bytes] = {}
    for part in sorted(whole.glob("part-*.tar")):
        with tarfile.open(part) as tar:
            pngs |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert sorted(pngs) == [f"{i:012d}.map.png" for i in (1, 2, 3, 4, 6)], "no overlays of millions"
    for image, annotation in zip(merged["images"], merged["annotations"], strict=True):
        ids = ids_of(pngs[annotation["file_name"]])
        assert ids.shape == (image["height"], image["width"]) and annotation["image_id"] == image["id"]
        counted = {int(i): int(n) for i, n in zip(*np.unique(ids, return_counts=True), strict=True) if i}
        assert counted == {s["id"]: s["area"] for s in annotation["segments_info"]}
        for segment in annotation["segments_info"]:
            rows, columns = np.nonzero(ids == segment["id"])
            x, y = int(columns.min()), int(rows.min())
            assert segment["bbox"] == [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y]
            assert segment["iscrowd"] == 0 and segment["category_id"] in (1, 2, 3, 4)


def test_what_cannot_be_read_is_listed_with_its_reason(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (entry,) = lines(whole / "quarantine.jsonl")
    assert entry["image_id"] == 5 and entry["image"].endswith("broken.jpg")
    assert "no image that can be read" in entry["reason"]
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["images"], summary["quarantined"], summary["merged"]) == (6, 1, ["panoptic.json"])


def test_instances_are_coco_results(run: str, listed: Path, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    assert predicted([listed], run, tmp_path, "instance", part_size=3) == 2
    truth = coco.COCO(str(tmp_path / "images.json"))
    results = truth.loadRes(str(tmp_path / "instances.json"))
    assert len(results.anns) == len(json.loads((tmp_path / "instances.json").read_text())) > 5
    for annotation in list(results.anns.values())[:20]:
        mask = results.annToMask(annotation)
        assert mask.sum() == annotation["area"] > 0 and 0 < annotation["score"] <= 1
        assert mask.shape == tuple(truth.imgs[annotation["image_id"]][side] for side in ("height", "width"))


def test_the_results_do_not_depend_on_the_processes(
    run: str, listed: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = [predicted([listed], run, tmp_path, share=Share(i, 3), part_size=2) for i in range(3)]
    assert codes == [0, 0, 2], "the last one tells of all"
    assert contents(tmp_path) == contents(whole)
    assert "share 0 of" in capsys.readouterr().out


def test_ranks_of_shares_take_each_part_once() -> None:
    taken = [p for i in range(3) for r in range(2) for p in Share(i, 3, r, 2).take(range(25))]
    assert sorted(taken) == list(range(25))


def test_a_stop_leaves_whole_parts_and_the_same_command_goes_on(
    run: str, listed: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = module.answer

    def counted(*arguments: object) -> object:
        asked.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "answer", counted)
    with pytest.raises(StoppedOnRequest):
        predict_images([str(listed)], run, str(tmp_path), Options(part_size=2), stop=lambda: len(asked) >= 4)
    done = {path.name for path in tmp_path.glob("part-*.json")}
    assert 0 < len(done) < 3 and not list(tmp_path.glob(".part-*")), "nothing half written stays"
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in done}
    asked.clear()
    assert predicted([listed], run, tmp_path, part_size=2) == 2
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in done} == before
    left = [json.loads(path.read_text()) for path in whole.glob("part-*.json") if path.name not in done]
    assert len(asked) == sum(part["images"] - part["quarantined"] for part in left)
    assert contents(tmp_path) == contents(whole)
    asked.clear()
    assert predicted([listed], run, tmp_path, part_size=2) == 2 and not asked, "told again, not done again"


def test_it_goes_on_with_the_checkpoint_it_began_with(
    run: str, listed: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, mine)
    assert predicted([listed], str(mine), out, share=Share(0, 2), part_size=2) == 0
    small_run(mine, step=9)
    assert predicted([listed], str(mine), out, part_size=2) == 2
    assert "going on with step-00000003: 2 of 3 parts" in capsys.readouterr().out
    assert contents(out) == contents(whole)
    assert predicted([listed], str(mine), out, part_size=2) == 2
    assert "predicted before, with step-00000003, and the run has step-00000009 by now" in capsys.readouterr().out
    (out / "part-000001.json").unlink()
    shutil.rmtree(RunDir(mine).checkpoint(3))
    with pytest.raises(UserError, match="checkpoint with which this prediction began is not there any more"):
        predicted([listed], str(mine), out, part_size=2)


def test_a_folder_that_holds_something_else_is_refused(run: str, whole: Path, listed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another prediction: --task was panoptic, now semantic"):
        predicted([listed], run, whole, "semantic", part_size=2)
    with pytest.raises(UserError, match="--part-size was 2, now 3"):
        predicted([listed], run, whole, part_size=3)
    with pytest.raises(UserError, match="it is of 6 images, this input of 1 image "):
        predicted(IMAGES[:1], run, whole, part_size=2)
    other = small_run(tmp_path / "other")
    with pytest.raises(UserError, match=r"--run was .*, now "):
        predicted([listed], other, whole, part_size=2)
    (tmp_path / "out").mkdir()
    precious = tmp_path / "out" / f"{IMAGES[0].stem}.json"
    precious.write_text("mine")
    with pytest.raises(UserError, match="files with the names of results, but no prediction: "):
        predicted(IMAGES[:1], run, tmp_path / "out")
    assert precious.read_text() == "mine"


def test_overwriting_removes_a_prediction_and_nothing_else(run: str, tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"x")
    assert predicted(IMAGES[:2], run, tmp_path) == 0
    assert len(list(tmp_path.glob("*.overlay.png"))) == 2
    (tmp_path / f"{IMAGES[0].stem}.txt").write_text("mine too")
    remove_prediction(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{IMAGES[0].stem}.txt", "mine.png"]
    remove_prediction(tmp_path)
    assert predicted(IMAGES[:1], run, tmp_path, "semantic") == 0


def test_a_source_is_read_in_its_order(run: str, tmp_path: Path) -> None:
    index = painted_source(tmp_path / "painted")
    assert predicted([index.source], run, tmp_path / "out", "semantic", part_size=2, image_ids="names") == 0
    named = [(r["image"], r["image_id"]) for part in range(3) for r in lines(tmp_path / f"out/part-{part:06d}.jsonl")]
    assert [name for name, _ in named] == [index.sample(i).key for i in range(5)]
    assert all(int(name) == number for name, number in named)
    record = lines(tmp_path / "out/part-000000.jsonl")[0]
    with tarfile.open(tmp_path / "out/part-000000.tar") as tar, Image.open(tar.extractfile(record["map"])) as image:  # type: ignore[arg-type]
        assert image.mode == "L" and image.size == (record["width"], record["height"])
        values = set(np.unique(np.asarray(image)).tolist())
    assert values == {s["id"] for s in record["segments"]} == {s["label"] + 1 for s in record["segments"]}


def test_plain_tars_with_all_that_may_be_wrong_in_them(run: str, tmp_path: Path) -> None:
    pictures = [image.read_bytes() for image in IMAGES[:4]]
    tar_of(tmp_path / "a.tar", {
        "x/one.jpg": pictures[0], "x/one.json": b"{}", "x/one.seg.png": b"not the image", "__meta__/x.jpg": b"",
        "two.txt": b"no image", "three.jpg": b"broken", "four.JPG": pictures[1], "../five.jpg": pictures[2],
        "six.jpg": b"",
    })  # fmt: skip
    cut = tar_of(tmp_path / "b.tar", {"seven.jpg": pictures[2], "eight.jpg": pictures[3]})
    cut.write_bytes(cut.read_bytes()[: 512 + len(pictures[2]) + 2000])
    assert predicted([tmp_path / "a.tar", cut], run, tmp_path / "out", "semantic") == 2
    done = [r["image"] for part in range(2) for r in lines(tmp_path / f"out/part-{part:06d}.jsonl")]
    assert done == ["x/one", "four", "seven"]
    reasons = {r["image"]: r["reason"] for r in lines(tmp_path / "out/quarantine.jsonl")}
    assert list(reasons) == ["two", "three", "../five", "six", "eight", str(cut)]
    assert "needs one image" in reasons["two"] and "no kind that is read" in reasons["three"]
    assert "leaves the shard" in reasons["../five"] and "empty" in reasons["six"]
    assert "cannot be read to its end" in reasons[str(cut)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tar: tar[: 2 * 512], "ends without an end block"),
        (lambda tar: tar[: 2 * 512] + b"x" * 512 + tar[2 * 512 :], "the header at byte 1024 is broken"),
        (lambda tar: tar + tar, "it goes on behind its end"),
        (lambda tar: b"\x1f\x8b" + tar, "cannot be read to its end"),
    ],
)
def test_tars_that_do_not_end_as_they_should(tmp_path: Path, change: Callable[[bytes], bytes], told: str) -> None:
    path = tar_of(tmp_path / "a.tar", {"one.jpg": b"1"})
    path.write_bytes(change(path.read_bytes()))
    found = list(tar_images(Storage(str(tmp_path)), "a.tar", path.stat().st_size))
    assert found[-1].key == "" and told in found[-1].fault
    assert [(sample.key, sample.image) for sample in found[:-1]] in ([("one", b"1")], [])


def test_images_and_ids_that_cannot_be(run: str, tmp_path: Path) -> None:
    flat = tmp_path / "flat.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(flat)
    data = bytearray(flat.read_bytes())
    data[16:20] = bytes(4)  # the width in its header
    flat.write_bytes(data)
    with pytest.raises(UserError, match=r"flat\.png"):
        predicted([flat], run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.copy(IMAGES[0], tmp_path / "7.jpg")
    (tmp_path / "b").mkdir()
    shutil.copy(IMAGES[0], tmp_path / "b" / "07.jpg")
    with pytest.raises(UserError, match="names of several images, such as 7"):
        predicted([tmp_path / "7.jpg", tmp_path / "b"], run, tmp_path / "out", image_ids="names")
    with pytest.raises(UserError, match="name 'flat' is no number"):
        predicted([tmp_path], run, tmp_path / "out", image_ids="names")
    assert predicted([tmp_path / "7.jpg"], run, tmp_path / "out", image_ids="names") == 0
    assert json.loads((tmp_path / "out" / "panoptic.json").read_text())["images"][0]["id"] == 7


def test_inputs_that_name_nothing_that_is_read(run: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "notes.md").write_text("x")
    tar_of(tmp_path / "mixed.tar", {})
    shutil.copy(IMAGES[0], tmp_path)
    for word, told in {
        "empty.txt": "the list names no image",
        "gone.txt": "the file does not exist",
        "notes.md": "this is not an image",
        ".": "holds 1 images and 1 tars",
    }.items():
        with pytest.raises(UserError, match=told):
            predicted([tmp_path / word], run, tmp_path / "out")
    with pytest.raises(UserError, match="holds credentials or a query") as caught:
        predict_images(["https://me:hunter2@host/a.jpg"], run, str(tmp_path / "out"), Options())
    assert "hunter2" not in str(caught.value)
    with pytest.raises(UserError, match="the input is images and tars"):
        predicted([IMAGES[0], tmp_path / "mixed.tar"], run, tmp_path / "out")
    with pytest.raises(UserError, match=r"no class 'dgo'.*Did you mean dog\?"):
        predicted([IMAGES[0]], run, tmp_path / "out", classes=("dgo",))
    assert not (tmp_path / "out").exists()


def test_a_secret_in_a_list_is_not_told(run: str, tmp_path: Path) -> None:
    file = tmp_path / "urls.txt"
    file.write_text(f"https://me:hunter2@host/a.jpg\nhttps://host/b.jpg?X-Amz-Signature=hunter2\n{IMAGES[0]}\n")
    assert predicted([file], run, tmp_path / "out") == 2
    assert not any(b"hunter2" in content for content in contents(tmp_path / "out").values())
    assert len(lines(tmp_path / "out/quarantine.jsonl")) == 2


def test_a_network_that_is_down_is_a_fault(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a million quarantined images."""

    def fails(*_: object) -> bytes:
        raise FaultError("reading failed 9 times", where="https://host")

    monkeypatch.setattr("mf_scale.data.single.SingleFiles.read", fails)
    file = tmp_path / "urls.txt"
    file.write_text("\n".join(f"https://host/{i}.jpg" for i in range(30)))
    with pytest.raises(FaultError, match="20 images in a row could not be reached"):
        predicted([file], run, tmp_path / "out", part_size=50)
    assert not list((tmp_path / "out").glob("*part-*"))


def test_overlays_show_the_classes_asked_for(run: str, tmp_path: Path) -> None:
    for name, classes in {"all": (), "cats": ("cat",)}.items():
        assert predicted([IMAGES[1]], run, tmp_path / name, "instance", classes=classes, overlay=True) == 0
    assert predicted([IMAGES[1]], run, tmp_path / "none", "instance", overlay=False) == 0
    files = {name: contents(tmp_path / name) for name in ("all", "cats", "none")}
    overlay, data = f"{IMAGES[1].stem}.overlay.png", f"{IMAGES[1].stem}.map.png"
    assert overlay not in files["none"] and files["all"][overlay] != files["cats"][overlay]
    assert files["all"][data] == files["cats"][data] == files["none"][data]
