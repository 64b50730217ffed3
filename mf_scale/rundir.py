"""A run is a directory: its names, and the committed checkpoints in it. No torch here.

    config.yaml  vocabulary.json  metrics.jsonl  checkpoints/step-00000100/  report/  wandb/

A checkpoint folder counts only when its manifest, written last, names every file with its size and digest. The link
`checkpoints/latest` is for people: this program looks at the folders themselves.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mf_scale.errors import FaultError, UserError

MANIFEST = "manifest.json"
FORMAT = 2
"""Of the manifest. 2: weights and averages whole or in pieces, the moments always in pieces (fragments.py)."""
WEIGHTS = "weights.safetensors"
EMA = "ema.safetensors"
STATE = "state.json"
CONFIG = "config.yaml"
VOCABULARY = "vocabulary.json"
MERGES = "vocabulary.txt"
"""Of a run on a unified vocabulary: which class was made of which."""
LATEST = "latest"
WRITING = ".writing-"
"""What the name of a folder begins with that is to become a checkpoint: .writing-TOKEN-step-N, with the token of the
start that writes it."""
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
"""A disk or a quota that is full: it passes, once somebody makes room."""
_PERSISTENT = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
)
"""What stays so until somebody mends it."""
_NO_FOLDER_FSYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF})
"""What FUSE and SMB answer to the fsync of a folder, which they do not have."""
_PREFIX = "step-"
_SECOND_TRY_SECONDS = 1.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class RunDir:
    """The names inside a run directory."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def vocabulary(self) -> Path:
        return self.path / VOCABULARY

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"{_PREFIX}{step:08d}"


def existing_run(path: str) -> Path:
    """The path of a run directory that is there; raises UserError."""
    if not Path(path).is_dir():
        raise UserError("there is no such run directory", where=path, remedy="Name one that `mf-scale train` wrote.")
    return Path(path)


def committed_checkpoints(run: RunDir) -> list[Path]:
    """Folders with a manifest, newest first. A half-written folder has none.

    One that was being replaced when the process was killed counts as long as nothing stands in its place.
    """
    folders = list(run.checkpoints.iterdir()) if run.checkpoints.is_dir() else []
    replaced = [replaced_by(folder) for folder in folders if folder.name.startswith(WRITING)]
    named = {f.name: f for f in (*replaced, *folders) if is_checkpoint_name(f.name) and (f / MANIFEST).is_file()}
    return [named[name] for name in sorted(named, reverse=True)]


def replaced_by(writing: Path) -> Path:
    """Where the folder of a checkpoint that is being written holds the one whose name it takes, for that moment."""
    return writing / f"{_PREFIX}{writing.name.rpartition(_PREFIX)[2]}"


def is_checkpoint_name(name: str) -> bool:
    """True for the names that `RunDir.checkpoint` gives; other folders are not ours to touch."""
    return re.fullmatch(_PREFIX + r"\d{8,}", name) is not None


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.rpartition("-")[2])


def checkpoint_damage(folder: Path, *, digests: bool = True) -> str | None:
    """What is wrong with a committed checkpoint (a missing, short, altered or foreign file), or None when it is sound.

    Without `digests` files are not read, so alterations that keep the size stay unseen.
    """
    try:
        manifest = json.loads(_read_twice(lambda: (folder / MANIFEST).read_text(encoding="utf-8")))
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, this program reads format {FORMAT}"
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"its manifest cannot be read ({type(error).__name__}: {error})"
    for name, (size, sha256) in files.items():
        file = folder / Path(name).name
        try:
            damage = _read_twice(partial(_file_damage, file, size, sha256 if digests else None))
        except (OSError, ValueError) as error:
            damage = f"{file.name!r} cannot be read ({error})"
        if damage:
            return damage
    return _unnamed_damage(folder, files)


def _read_twice(read: Callable[[], _T]) -> _T:
    """A disk or a server that stumbles once must not cost the newest checkpoint."""
    try:
        return read()
    except FileNotFoundError:
        raise
    except OSError:
        time.sleep(_SECOND_TRY_SECONDS)
        return read()


def _unnamed_damage(folder: Path, names: Collection[str]) -> str | None:
    """Readers take the tensor files that they find: one without a digest in the manifest is nobody's word."""
    if WEIGHTS not in names:
        return f"its manifest does not name {WEIGHTS}"
    try:
        extra = sorted(f.name for f in folder.glob("*.safetensors") if f.name not in names)
    except OSError as error:
        return f"the folder cannot be read ({error})"
    return f"{extra[0]} is not in its manifest" if extra else None


def _file_damage(file: Path, size: int, sha256: str | None) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != size:
        return f"{file.name} has {file.stat().st_size} bytes instead of {size}"
    if sha256 is not None and file_digest(file) != sha256:
        return f"{file.name} was altered after it was written (digest differs)"
    return None


def newest_sound_checkpoint(run: RunDir) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that verifies, and a sentence for each newer one that did not."""
    damaged: dict[Path, str] = {}
    for folder in committed_checkpoints(run):
        damage = checkpoint_damage(folder)
        if damage is None:
            return folder, damaged
        damaged[folder] = f"{folder} is damaged: {damage}"
    return None, damaged


def resolve_checkpoint(path: str) -> tuple[Path | None, Path]:
    """(run directory or None, checkpoint folder) of a run directory or one checkpoint folder; raises UserError."""
    given = Path(path)
    if not given.is_dir():
        raise UserError("this is neither a run directory nor a checkpoint", where=path, remedy="Check the path.")
    # A running training may lead the link `latest` elsewhere between the look at a checkpoint and its loading.
    given = given.resolve()
    if (given / MANIFEST).is_file():
        damage = checkpoint_damage(given)
        if damage:
            raise UserError(f"the checkpoint is damaged: {damage}", where=path, remedy="Take another checkpoint.")
        parent = given.parent
        return (parent.parent if parent.name == "checkpoints" else None), given
    folder, damaged = newest_sound_checkpoint(RunDir(given))
    if folder is None:
        detail = " ".join(damaged.values()) or "it holds no committed checkpoint"
        raise UserError(f"there is nothing to load: {detail}", where=path, remedy="Train first, or name another run.")
    for sentence in damaged.values():
        logging.getLogger(__name__).warning("%s; taking %s", sentence, folder.name)
    return given, folder


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of ours as a dictionary; raises UserError naming it."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"the file cannot be read: {error}", where=str(file)) from error
    if not isinstance(data, dict):
        raise UserError("the file does not hold a JSON object", where=str(file))
    return data


def write_atomically(file: Path, text: str, *, mark: str = "", check: Callable[[], None] = lambda: None) -> None:
    """Write a small file whole or not at all: temporary name, fsync, rename.

    The temporary name ends with `mark`, else with the process id. What `check` raises, right before the rename, leaves
    the file as it was.
    """
    temporary = file.with_name(f".{file.name}.{mark or os.getpid()}")
    with disk_errors(file):
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            check()
        except UserError:
            temporary.unlink(missing_ok=True)
            raise
        temporary.replace(file)


def fsync_folder(folder: Path) -> None:
    """Force a folder's names to the disk, where the file system can; raises the system's own OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(handle)


def file_digest(file: Path) -> str:
    """sha256 of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of writing `path` into a UserError with the remedy, a FaultError if it passes (a full disk)."""
    try:
        yield
    except OSError as error:
        kind = UserError if error.errno in _PERSISTENT else FaultError
        raise kind(f"cannot write: {error.strerror or error}", where=str(path), remedy=_disk_remedy(error)) from error


def _disk_remedy(error: OSError) -> str:
    if error.errno in NO_SPACE:
        return (
            "Free some space (or raise the quota) and start the same command again; committed checkpoints are intact."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Choose a run_dir that this user may write to."
    return "Check the file system, then start the same command again."
