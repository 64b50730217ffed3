"""Who makes a part of a prediction, when a part is done, and what --overwrite and a changed image lead to."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from mf_scale import cli
from mf_scale.errors import UserError
from mf_scale.evaluation.prediction import claims as module
from mf_scale.evaluation.prediction.claims import Claims, refuse_held, writer_mark
from mf_scale.evaluation.prediction.commits import committed_parts
from mf_scale.evaluation.prediction.parts import predict_images
from mf_scale.evaluation.prediction.plan import host_mark
from mf_scale.evaluation.prediction.words import FILES, PARTS, Options
from mf_scale.tracking import pictures
from tests.unit.predicting import IMAGES, contents, predicted, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_run(tmp_path_factory.mktemp("run"))


def part_of(books: Path, part: int, counts: dict[str, int], *endings: str) -> None:
    (books / f"part-{part:06d}.json").write_text(json.dumps(counts))
    for ending in endings:
        (books / f"part-{part:06d}.{ending}").write_text("")


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_part_has_one_owner_at_a_time(tmp_path: Path) -> None:
    one, other = Claims(tmp_path, PARTS), Claims(tmp_path, PARTS)
    assert one.take(0) and one.alone(0) and not other.take(0) and other.take(1)
    with pytest.raises(UserError, match="another process is predicting into this folder"):
        refuse_held(tmp_path)
    one.release(0)
    assert other.take(0)
    other.close()
    assert not list(tmp_path.iterdir()) and not other.take(2), "a closed one takes none"
    part_of(tmp_path, 0, {"images": 1, "quarantined": 0}, "jsonl", "tar")
    assert not one.take(0) and one.take(1)
    one.close()
    (tmp_path / ".part-000007.lock").write_text("")  # of a killed process
    refuse_held(tmp_path)
    assert one.take(0) is False and Claims(tmp_path, PARTS).take(7)


def test_a_lock_whose_name_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, place = fcntl.flock, tmp_path / ".part-000003.lock"
    seen: list[int] = []

    def late(handle: int, how: int) -> None:
        seen.append(handle)
        if len(seen) == 1:
            place.unlink()  # its owner ended between our opening and our locking
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    claims = Claims(tmp_path, PARTS)
    assert claims.take(3) and len(seen) == 2 and place.exists()
    claims.close()


def test_a_part_counts_with_all_its_files_only(tmp_path: Path) -> None:
    full, refused = {"images": 2, "quarantined": 1}, {"images": 2, "quarantined": 2}
    part_of(tmp_path, 0, full, "jsonl", "tar")
    part_of(tmp_path, 1, full, "jsonl")
    part_of(tmp_path, 2, full, "tar")
    part_of(tmp_path, 3, refused, "jsonl")
    assert committed_parts(tmp_path, PARTS) == {0, 3}
    shutil.copytree(tmp_path, tmp_path / ".parts")
    assert committed_parts(tmp_path, FILES) == {0, 1, 3}


def test_a_part_that_lost_a_file_is_made_again(run: str, tmp_path: Path) -> None:
    assert predicted(IMAGES[:4], run, tmp_path, part_size=2) == 0
    whole = contents(tmp_path)
    for name in ("part-000000.tar", "part-000001.jsonl"):
        (tmp_path / name).unlink()
    (tmp_path / ".part-000009.lock").write_text("")  # a process was killed right behind its commit
    assert predicted(IMAGES[:4], run, tmp_path, part_size=2) == 0
    assert contents(tmp_path) == whole


def test_what_another_process_makes_is_left_to_it(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Claims(tmp_path, PARTS)
    assert other.take(1)
    live = tmp_path / ".part-000001.tar.there"
    live.write_bytes(b"being written")
    assert predicted(IMAGES[:6], run, tmp_path, part_size=2) == 0
    assert "1 part of 3 is being made by another process" in capsys.readouterr().out
    assert live.exists() and committed_parts(tmp_path, PARTS) == {0, 2} and not (tmp_path / "summary.json").exists()
    with pytest.raises(UserError, match="another process is predicting"):
        predict_images(list(map(str, IMAGES[:2])), run, str(tmp_path), Options(), overwrite=True)
    other.close()
    assert predicted(IMAGES[:6], run, tmp_path, part_size=2) == 0
    assert "6 of 6 images predicted" in capsys.readouterr().out and not list(tmp_path.glob(".*"))


def test_without_locks_only_what_is_dead_is_removed(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert predicted(IMAGES[:2], run, tmp_path / "whole", part_size=2) == 0
    monkeypatch.setattr(fcntl, "flock", no_locks)
    out, here = tmp_path / "out", host_mark()
    out.mkdir()
    parent = f"{here}.{os.getppid()}.{module._start_of(os.getppid())}"
    kept = [f".part-000000.tar.{mark}" for mark in (parent, "elsewhere.1.1")]
    gone = [f".part-000000.tar.{mark}" for mark in (f"{here}.{os.getppid()}.1", f"{here}.4194305.1", "123.456.789")]
    for name in (*kept, *gone):
        (out / name).write_bytes(b"x")
    past = time.time() - module.OLD_SECONDS - 60
    os.utime(out / gone[-1], (past, past))
    assert predicted(IMAGES[:2], run, out, part_size=2) == 0
    assert sorted(path.name for path in out.glob(".*")) == sorted(kept)
    for name in kept:
        (out / name).unlink()
    assert contents(out) == contents(tmp_path / "whole")


def test_without_locks_the_faster_one_counts(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slower process that comes to its commit finds one there, and leaves it."""
    assert predicted(IMAGES[:2], run, tmp_path / "whole", part_size=2) == 0
    monkeypatch.setattr(fcntl, "flock", no_locks)
    out, real = tmp_path / "out", Claims.clean

    def overtaken(self: Claims, part: int) -> None:
        real(self, part)
        for path in (tmp_path / "whole").glob("part-*"):
            shutil.copy2(path, out)

    monkeypatch.setattr(Claims, "clean", overtaken)
    assert predicted(IMAGES[:2], run, out, part_size=2) == 0
    assert contents(out) == contents(tmp_path / "whole")
    stamp = "part-000000.tar"
    assert (out / stamp).stat().st_mtime_ns == (tmp_path / "whole" / stamp).stat().st_mtime_ns


def test_overwriting_is_refused_before_anything_is_removed(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predicted(IMAGES[:2], run, out) == 0
    before = contents(out)
    command = ["predict", "--run", run, "--out", str(out), "--overwrite"]
    for words in (
        ["nope.jpg"],
        ["nope.jpg", "--processes", "1"],
        [str(IMAGES[0]), "--classes", "dgo"],
        [str(IMAGES[0]), "--set", "eval.short_side=nine"],
        [str(IMAGES[0]), str(IMAGES[1]), *["--part-size", "1", "--processes", "2", "--classes", "dgo"]],
    ):
        assert cli.main([*command[:1], *words, *command[1:]]) == 2, words
        assert contents(out) == before, words
    with pytest.raises(UserError):
        predict_images([str(IMAGES[0])], str(tmp_path / "norun"), str(out), Options(), overwrite=True)
    precious = out / f"{IMAGES[2].stem}.json"
    precious.write_text("mine")
    with pytest.raises(UserError, match="files with the names of results"):
        predict_images([str(IMAGES[2])], run, str(out), Options(), overwrite=True)
    precious.unlink()
    assert contents(out) == before
    assert predict_images([str(IMAGES[1])], run, str(out), Options("semantic"), overwrite=True) == 0
    assert len(list(out.glob("*.map.png"))) == 1 and (out / "semantic.json").exists()
    assert not (out / "panoptic.json").exists()


def test_a_changed_image_is_another_input(run: str, tmp_path: Path) -> None:
    image, listed = tmp_path / "a.jpg", tmp_path / "list.txt"
    shutil.copy(IMAGES[0], image)
    listed.write_text(f"{image}\n")
    for words, out in (([image], "one"), ([listed], "listed")):
        assert predicted(words, run, tmp_path / out) == 0
    shutil.copy(IMAGES[1], image)
    with pytest.raises(UserError, match="it is of 1 other image, or of images that have changed since"):
        predicted([image], run, tmp_path / "one")
    assert predicted([listed], run, tmp_path / "listed") == 0


def test_what_is_said_of_one_image(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "urls.txt"
    file.write_text(f"https://me:hunter2@host/a.jpg\n{IMAGES[0]}\n")
    assert predicted([file], run, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "1 image was not predicted; with its reason: " in said and "the url of an image holds" in said
    with pytest.raises(UserError, match="the url of an image holds credentials or a query"):
        predicted(["https://host/a.jpg?key=1"], run, tmp_path / "none")


def test_temporary_names_tell_host_and_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "h" * 64)
    assert writer_mark().startswith("h" * 40 + f".{os.getpid()}.") and not writer_mark().endswith(".0")
    names: list[str] = []
    real = Path.write_bytes

    def seen(path: Path, data: bytes) -> int:
        names.append(path.name)
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", seen)
    pictures.write_bytes(tmp_path / f"{'n' * 180}.overlay.png", b"x")
    assert names == [f".{'n' * 180}.overlay.png.{'h' * 40}.{os.getpid()}"]
