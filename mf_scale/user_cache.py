"""User cache: folders of this user's own in which work is kept for later starts, and whether they are."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def cache_folders() -> list[Path]:
    """Where something may be kept: the user's cache, else a folder of the user's own among the temporary files."""
    folders = [Path(tempfile.gettempdir()) / f"mf_scale-{os.getuid()}"]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    except RuntimeError:  # a user without a home
        return folders
    return [cache / "mf_scale", *folders]


def own_folders() -> Iterator[Path]:
    """Those that are there, or could be made, and that nobody else may write to."""
    for folder in cache_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if is_ours_alone(folder, stat.S_ISDIR):
                yield folder
        except OSError:
            continue


def is_ours_alone(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Of this kind and not a link, our own, and for nobody else to write; raises OSError."""
    found = path.lstat()
    return is_kind(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
