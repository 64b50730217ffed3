"""Names: file names of a dataset -> sample keys, and which files a folder holds; what a malformed list raises."""

from __future__ import annotations

import os
import re
from pathlib import Path

from data_tools.problems import Problems

MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a JSON list and taking from it what ought to be there raises where it is not, or is something else."""
NOT_IN_KEYS = re.compile(r"[^\w-]")
"""A dot would end the key in a shard; letters of any script stay, so that two names do not fall together."""


def sample_key(stem: str) -> str:
    """Key of the image with this name (without its suffix)."""
    return NOT_IN_KEYS.sub("_", stem)


def file_names(folder: Path) -> set[str]:
    """Names in a folder: what a list names is looked up here, so it never leads out of the folder. Raises UserError."""
    names, problems = {path.name for path in folder.iterdir()}, Problems()
    for name in sorted(names):
        check_name(name, problems)
    problems.refuse(f"{len(problems)} files cannot be packed", where=str(folder), remedy="Rename them.")
    return names


def check_name(name: str, problems: Problems) -> None:
    """Add a name that is not UTF-8: it cannot stand in a shard."""
    try:
        name.encode()
    except UnicodeEncodeError:
        problems.add("file names that are not UTF-8", os.fsencode(name).decode("utf-8", "backslashreplace"))
