"""Which program this is: a digest of its own code, and versions of what its results may depend on. No torch here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mf_scale import __version__

_PACKAGE = Path(__file__).parent
_GIT_SECONDS = 5.0
_PROGRAM = (".py", ".cpp", ".html", ".json")
"""Endings of the files that are the program; what Python or a compiler made of them is not."""


@cache
def code_files() -> dict[str, str]:
    """The package's files by their name below its folder, each with the first 12 hex digits of its sha256."""
    files = sorted(file for file in _PACKAGE.rglob("*") if file.suffix in _PROGRAM and file.is_file())
    return {file.relative_to(_PACKAGE).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files}


def code_digest() -> str:
    """16 hex digits that are the same for two copies of the program only where all of their files are."""
    listing = "".join(f"{name} {digest}\n" for name, digest in code_files().items())
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


@cache
def library_versions() -> dict[str, str]:
    """Versions of this program, Python and the libraries that results may depend on."""
    libraries = {name: version(name) for name in ("torch", "deepspeed", "webdataset", "timm")}
    return {"mf_scale": __version__, "python": platform.python_version(), **libraries}


@cache
def code_commit() -> str | None:
    """The git commit that the program was checked out at, or that a frozen copy of it says; None where nothing tells.

    Whether files differ from it is what `code_digest` tells: looking for that takes git seconds on a slow disk.
    """
    root = _PACKAGE.parent
    with contextlib.suppress(OSError, ValueError, AttributeError, subprocess.SubprocessError):
        if (root / "code.json").is_file():
            return str(json.loads((root / "code.json").read_text(encoding="utf-8")).get("commit") or "") or None
        if (root / ".git").exists():
            asked = ["git", "-C", str(root), "rev-parse", "HEAD"]
            done = subprocess.run(asked, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
            return done.stdout.strip() or None
    return None


def code_facts() -> dict[str, Any]:
    """Which code this is, for a person: {"fingerprint", "commit", "versions"}."""
    return {"fingerprint": code_digest(), "commit": code_commit(), "versions": library_versions()}
