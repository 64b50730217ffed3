"""Target: the folder a pack goes into, and what lies in it. Its plan is written once and never replaced."""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.files import partial_path
from mf_scale.data.index import COLUMNS, HEAD
from mf_scale.errors import UserError

PLAN = "pack.json"
SHARD_NAME = re.compile(r"[\w.-]+-\d{6}\.tar(\.rows)?")
NAMED = 4
"""Names told of what lies in a folder."""
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Of a file system that knows no second name of a file."""


@dataclass(frozen=True)
class Look:
    """What a folder holds, seen from one pack."""

    state: str
    """free | begun | finished | damaged (it was finished) | other (another pack, or something else)."""
    told: str = ""
    """What is damaged, or the names of what else is there."""


def look_at(folder: Path, plan: dict[str, Any]) -> Look:
    """What lies in the folder; writes nothing."""
    try:
        found = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return Look("free")
    if all(name.startswith(PLAN) and name != PLAN for name in found):  # nothing, or parts that start at this moment
        return Look("free")
    if not _is_planned(folder, plan):
        return Look("other", _names(found))
    if HEAD not in found:
        return Look("begun")
    damage = _damage(folder)
    return Look("damaged", _names(damage)) if damage else Look("finished")


def prepare(folder: Path, plan: dict[str, Any], *, overwrite: bool) -> None:
    """Make the folder ready for a pack; UserError where it is that of another one and `overwrite` is not set."""
    if overwrite:
        _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    look = look_at(folder, plan)
    if overwrite or look.state == "free":
        _write_plan(folder, plan)
    refuse_other(folder, plan)
    if look.state == "damaged":
        (folder / HEAD).unlink(missing_ok=True)  # what it speaks of is not all there: the pack goes on


def refuse_other(folder: Path, plan: dict[str, Any]) -> None:
    """UserError where the folder is not that of this pack."""
    look = look_at(folder, plan)
    if look.state in ("other", "free"):
        raise UserError(
            f"the folder holds something else than this pack, or one with other arguments or input: {look.told}",
            where=str(folder),
            remedy="Pack into another folder, or add --overwrite to replace shards and index here.",
        )


def _is_planned(folder: Path, plan: dict[str, Any]) -> bool:
    try:
        return bool(json.loads((folder / PLAN).read_text(encoding="utf-8")) == plan)
    except (FileNotFoundError, ValueError):
        return False


def _write_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan unless there is one: of two packs that start at once, one finds the other's, whole."""
    partial = partial_path(folder / PLAN)
    text = json.dumps(plan, ensure_ascii=False, indent=1) + "\n"
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(partial, folder / PLAN)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        _write_alone(folder / PLAN, text)
    finally:
        partial.unlink(missing_ok=True)


def _write_alone(path: Path, text: str) -> None:
    """The same where a file has one name only: another part may see it half written, and refuse to start."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        pass


def _damage(folder: Path) -> list[str]:
    """What of a finished pack is not as its head says, by the sizes; `verify` reads the bytes."""
    try:
        head = json.loads((folder / HEAD).read_text(encoding="utf-8"))
        sizes = {file["name"]: file["size"] for file in [*head["shards"], head["columns"]]}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return [f"{HEAD} cannot be read"]
    found = []
    for name, size in sizes.items():
        try:
            there = (folder / name).stat().st_size
        except FileNotFoundError:
            found.append(f"{name} is missing")
        else:
            if there != size:
                found.append(f"{name} has {there} bytes instead of {size}")
    return found


def _clear(folder: Path) -> None:
    """Remove a pack, the index first, so that at no moment an index speaks of shards that are gone."""
    for name in (HEAD, COLUMNS, PLAN):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("*"):
        if SHARD_NAME.fullmatch(path.name) or path.name.endswith(".partial"):
            path.unlink(missing_ok=True)


def _names(found: list[str]) -> str:
    return f"{', '.join(found[:NAMED])}{', …' if len(found) > NAMED else ''}"
