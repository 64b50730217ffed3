"""Names: file names of a dataset -> sample keys, and which files a folder holds."""

from __future__ import annotations

import re
from pathlib import Path

NOT_IN_KEYS = re.compile(r"[^\w-]")
"""A dot would end the key in a shard; letters of any script stay, so that two names do not fall together."""


def sample_key(stem: str) -> str:
    """Key of the image with this name (without its suffix)."""
    return NOT_IN_KEYS.sub("_", stem)


def file_names(folder: Path) -> set[str]:
    """Names in a folder: what a list names is looked up here, so it never leads out of the folder."""
    return {path.name for path in folder.iterdir()}
