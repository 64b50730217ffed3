"""The plan of a prediction, in its folder: what it is of, so that the same command goes on and another one is refused.

The first of its processes writes it and all take the checkpoint that it names: of a run that goes on, two would find
two newest ones. No torch here.

    OUT/predict.json  summary.json  quarantine.jsonl  panoptic.json ...
        NAME.overlay.png  NAME.map.png  NAME.json       with .parts/part-000000.jsonl .json
    or  part-000000.tar  part-000000.jsonl  part-000000.json
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mf_scale.errors import UserError
from mf_scale.evaluation.prediction.files import FileSource
from mf_scale.evaluation.prediction.words import FILES, Options, Source, counted
from mf_scale.rundir import MANIFEST, disk_errors, file_digest, read_json, resolve_checkpoint

PLAN, SUMMARY, QUARANTINE = "predict.json", "summary.json", "quarantine.jsonl"
MERGED = ("panoptic.json", "semantic.json", "instances.json", "images.json")
BOOKS = ".parts"
"""Folder of what is written of parts where results are laid out for a person."""
RESULTS = (".overlay.png", ".map.png", ".json")
"""What the names of an image's files end in. The last one is written last."""
NAMES = {"run": "--run", "task": "--task", "settings": "--set", "input": "input", "overlay": "overlays",
         "classes": "--classes", "part_size": "--part-size", "image_ids": "--image-ids"}  # fmt: skip
"""What the fields of a plan are called where two differ."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def identity_of(run: str, source: Source, layout: str, options: Options) -> dict[str, Any]:
    """What tells one prediction from another, apart from the checkpoint: that is chosen once."""
    return {
        "format": 1,
        "run": str(Path(run).resolve()),
        "task": options.task,
        "settings": sorted(options.overrides),
        "input": source.identity(),
        "layout": layout,
        "part_size": source.part_size,
        "overlay": layout == FILES if options.overlay is None else options.overlay,
        "classes": list(options.classes),
        "image_ids": options.image_ids,
    }


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The plan in a folder; None where there is none."""
    return read_json(folder / PLAN) if (folder / PLAN).exists() else None


def refuse_other(
    folder: Path, identity: dict[str, Any], source: Source, overwrite: bool = False
) -> dict[str, Any] | None:
    """The plan of the same prediction, begun before, or None; UserError where the folder holds something else.

    With `overwrite` what a prediction wrote there does not count: it is to be removed.
    """
    there = _names_in(folder)  # first: what another process writes after its plan is no stranger's
    plan = read_plan(folder)
    if plan is None or overwrite:
        if plan is not None:
            there -= {path.name for path in _files_of_prediction(folder)}
        _refuse_taken(folder, there, source, identity["layout"])
        return None
    differing = [key for key in identity if plan.get(key) != identity[key]]
    if differing:
        told = "; ".join(_told(key, plan.get(key), identity[key]) for key in differing)
        raise UserError(
            f"the folder holds another prediction: {told}",
            where=str(folder),
            remedy="Predict into another folder, or add --overwrite to remove what it holds and begin anew.",
        )
    return plan


def write_plan(folder: Path, identity: dict[str, Any], checkpoint: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Write the plan, with what is `told` at the end, unless another process was faster; the one that counts."""
    plan = {**identity, "checkpoint": str(checkpoint), "manifest": file_digest(checkpoint / MANIFEST), **told}
    partial = folder / f".{PLAN}.{mark()}"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(json.dumps(plan, ensure_ascii=False, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(partial, folder / PLAN)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not (folder / PLAN).exists():
                partial.replace(folder / PLAN)
        finally:
            partial.unlink(missing_ok=True)
    found = read_plan(folder)
    assert found is not None
    return found


def planned_checkpoint(plan: dict[str, Any]) -> Path:
    """The checkpoint that a prediction began with; UserError where it is gone or another one by now."""
    checkpoint = Path(plan["checkpoint"])
    try:
        same = file_digest(checkpoint / MANIFEST) == plan["manifest"]
    except OSError:
        same = False
    if not same:
        raise UserError(
            "the checkpoint with which this prediction began is not there any more",
            where=str(checkpoint),
            remedy="Add --overwrite to begin anew with the newest one, or take another folder.",
        )
    return resolve_checkpoint(str(checkpoint))[1]


def remove_prediction(folder: Path) -> None:
    """Remove what a prediction has written into a folder, and nothing else; its plan goes last."""
    if read_plan(folder) is None:
        return
    with disk_errors(folder):
        for path in _files_of_prediction(folder):
            if path.name != PLAN:
                path.unlink(missing_ok=True)
        shutil.rmtree(folder / BOOKS, ignore_errors=True)
        (folder / PLAN).unlink(missing_ok=True)


def _files_of_prediction(folder: Path) -> Iterator[Path]:
    """What a prediction has written directly into a folder."""
    for book in (folder / BOOKS).glob("*part-*.jsonl*"):  # also of a part that was cut off
        for name in _written_names(book):
            for suffix in RESULTS:
                yield folder / f"{name}{suffix}"
    for path in folder.iterdir():
        if re.fullmatch(r"\.?part-\d{6,}\..*", path.name):
            yield path
    for name in (*MERGED, QUARANTINE, SUMMARY, PLAN):
        yield folder / name


def mark() -> str:
    """What the temporary files of this process end in: another host may have the same process id."""
    return f"{host_mark()}.{os.getpid()}"


def host_mark() -> str:
    """This host in the name of a file, which must not become too long."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]


def _written_names(book: Path) -> Iterator[str]:
    """What the results of a part's images are called."""
    for line in book.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            name = str(json.loads(line)["name"])
        except (ValueError, KeyError, TypeError):  # cut off in the middle, or of an image that was not read
            continue
        if "/" not in name:
            yield name


def _names_in(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(
            f"cannot write: {error.strerror}", where=str(folder), remedy="Choose another folder."
        ) from error


def _refuse_taken(folder: Path, there: set[str], source: Source, layout: str) -> None:
    """UserError where files would be written over that no prediction wrote."""
    ours = {PLAN, SUMMARY, QUARANTINE, *MERGED}
    if layout == FILES and isinstance(source, FileSource):
        ours |= {name + suffix for name in source.names() for suffix in RESULTS}
    taken = sorted(name for name in there if name in ours or re.fullmatch(r"part-\d{6,}\..*", name))
    if taken:
        raise UserError(
            f"the folder holds files with the names of results, but no prediction: {', '.join(taken[:4])}",
            where=str(folder),
            remedy="Predict into another folder.",
        )


def _told(key: str, before: Any, now: Any) -> str:
    if key == "input" and isinstance(before, dict):
        if before.get("kind") != now.get("kind") or _size_of(before) != _size_of(now):
            return f"it is of {_size_of(before)}, this input of {_size_of(now)}"
        changed = ", or of images that have changed since" if now.get("kind") == "images" else ""
        thing = "tars" if "tars" in now else "images"
        return f"it is of {now.get(thing, 0):,} other {thing if now.get(thing) != 1 else thing[:-1]}{changed}"
    name = NAMES.get(key, key)
    return f"{name} was {_short(before)}, now {_short(now)}"


def _size_of(identity: dict[str, Any]) -> str:
    if "tars" in identity:
        return counted(identity["tars"], "tar")
    return counted(identity.get("images", 0), "image") + (" of a source" if identity.get("kind") == "shards" else "")


def _short(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text or "not given"
