"""What is trained is what was submitted: code and configuration are copied into the run directory.

    RUN/code/DIGEST/  mf_scale/  launch/  BUILDER'S MODULE  config.yaml  code.json
    RUN/code/newest   the digest that the last start was given

A copy is made once, takes its name by a rename, and is held to its digest at every start. A later submission is
trained from its own copy where files had changed before it was submitted, and from the last one where they changed
after; requeued starts find theirs through the job's comment.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mf_scale.config.load import config_files, config_to_yaml, load_config
from mf_scale.config.schema import Config
from mf_scale.errors import UserError
from mf_scale.rundir import CONFIG, RunDir, disk_errors, read_json, write_atomically

CODE = "code"
_NEWEST, _FACTS = "newest", "code.json"
_CLOCK_SECONDS = 5.0
"""The controller's clock and the file server's differ by as much at most."""
_NAME_LENGTH = 12


@dataclass(frozen=True)
class Frozen:
    """A copy of code and configuration that a start is trained from."""

    folder: Path
    notes: tuple[str, ...] = ()
    """What a person should know about the choice."""

    @property
    def config(self) -> Path:
        return self.folder / CONFIG


def freeze(
    run: RunDir, config: Path, effective: Config, root: Path, package: Path, *, submitted: float, anew: bool
) -> Frozen:
    """The copy that a job submitted at `submitted` (Unix seconds; 0: now) is trained from, made where it is new.

    root: the project's folder, with launch/. package: the folder of mf_scale. anew: take the present files whatever
    changed when. Raises UserError where what was submitted is not to be had any more.
    """
    files = _files(config, effective, root, package)
    texts = {CONFIG: config_to_yaml(load_config(config)).encode()}
    present = _digest(files, texts)
    newest = _newest(run, anew=anew)
    late = [] if anew or not submitted else _changed_after(files, config, submitted)
    if newest is None:
        if late:
            raise _changed_since(late[0], submitted)
        return _copy(run, present, files, texts, config, root)
    if newest.folder.name == present:
        return newest
    changed = _differences(newest.folder, files, texts, config)
    after = [file for file in changed if file in late]
    if after and len(after) < len(changed):
        raise _changed_since(after[0], submitted)
    if after:
        told = f"{_shown(after)} changed after the job was submitted; training from the copy made before"
        return Frozen(newest.folder, (told,))
    made = _copy(run, present, files, texts, config, root)
    return Frozen(made.folder, (f"{_shown(changed)} changed since the last submission; training from a new copy",))


def open_frozen(folder: Path) -> Frozen:
    """A copy made before, held to its digest; raises UserError where it is damaged."""
    if not (folder / _FACTS).is_file():
        raise UserError("the frozen code is gone", where=str(folder), remedy="Submit the job again.")
    if _digest(_inside(folder), {}) != folder.name:
        raise UserError(
            "the frozen code was altered after it was frozen",
            where=str(folder),
            remedy="Submit again with --freeze-anew, or with --live-code to train from the present files.",
        )
    return Frozen(folder)


def _inside(folder: Path) -> dict[str, Path]:
    return {str(f.relative_to(folder)): f for f in folder.rglob("*") if _counts(f, folder)}


def _counts(file: Path, folder: Path) -> bool:
    """Not what an editor or NFS leaves beside the files: merely looking at one must not end a job."""
    parts = file.relative_to(folder).parts
    left = "__pycache__" in parts or any(part.startswith(".") for part in parts) or file.name.endswith("~")
    return file.is_file() and file.name != _FACTS and not left


def _files(config: Path, effective: Config, root: Path, package: Path) -> dict[str, Path]:
    """Name in the copy -> file."""
    files = {f"mf_scale/{f.relative_to(package)}": f for f in package.rglob("*") if _counts(f, package)}
    launch = root / "launch"
    files |= {f"launch/{f.name}": f for f in launch.glob("*") if f.suffix == ".sh"}
    return files | _builder_files(effective)


def _builder_files(config: Config) -> dict[str, Path]:
    """The user's own model builder, unless it is an installed library: its module, or its whole top-level package."""
    builder = config.model.pixel_level.builder
    top = builder.partition(":")[0].partition(".")[0] if builder else ""
    try:
        spec = importlib.util.find_spec(top) if top and top != "mf_scale" else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or "site-packages" in str(spec.origin) or spec.origin in (None, "built-in", "frozen"):
        places = list(spec.submodule_search_locations or ()) if spec is not None and spec.origin is None else []
        folder = Path(places[0]) if places and "site-packages" not in places[0] else None
        return {f"{top}/{f.relative_to(folder)}": f for f in folder.rglob("*") if _counts(f, folder)} if folder else {}
    file = Path(str(spec.origin))
    if file.name != "__init__.py":
        return {file.name: file}
    return {f"{top}/{f.relative_to(file.parent)}": f for f in file.parent.rglob("*") if _counts(f, file.parent)}


def _digest(files: Mapping[str, Path], texts: Mapping[str, bytes]) -> str:
    total = hashlib.sha256()
    for name in sorted([*files, *texts]):
        data = texts[name] if name in texts else files[name].read_bytes()
        total.update(f"{name}\0{len(data)}\0".encode() + data)
    return total.hexdigest()[:_NAME_LENGTH]


def _newest(run: RunDir, *, anew: bool) -> Frozen | None:
    """The last copy, if it is there; with `anew` only a sound one, else UserError where it was altered."""
    try:
        name = (run.path / CODE / _NEWEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if not name or not (run.path / CODE / name / _FACTS).is_file():
        return None
    try:
        return open_frozen(run.path / CODE / name)
    except UserError:
        if anew:
            return None
        raise


def _changed_after(files: Mapping[str, Path], config: Path, submitted: float) -> list[str]:
    """Names of what was written after the submission; the configuration counts as one, whichever of its files."""
    limit = submitted + _CLOCK_SECONDS
    late = [name for name, file in files.items() if file.stat().st_mtime > limit]
    return late + ([str(config)] if any(f.stat().st_mtime > limit for f in config_files(config)) else [])


def _differences(folder: Path, files: Mapping[str, Path], texts: Mapping[str, bytes], config: Path) -> list[str]:
    changed = [name for name, file in files.items() if _bytes(folder / name) != file.read_bytes()]
    gone = sorted(set(_inside(folder)) - set(files) - set(texts))
    return changed + gone + ([str(config)] if _bytes(folder / CONFIG) != texts[CONFIG] else [])


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _copy(
    run: RunDir, name: str, files: Mapping[str, Path], texts: Mapping[str, bytes], config: Path, root: Path
) -> Frozen:
    folder, made = run.path / CODE / name, run.path / CODE / f".freezing-{name}-{os.getpid()}"
    facts = {"config": str(config), "frozen": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": _commit(root)}
    if folder.is_dir() and _digest(_inside(folder), {}) != name:
        folder.rename(folder.with_name(f".altered-{name}-{os.getpid()}"))
    with disk_errors(folder):
        if not folder.is_dir():
            try:
                _fill(made, files, texts, json.dumps(facts, indent=1))
                if _digest(_inside(made), {}) != name:
                    raise UserError("files changed while they were copied", where=str(root), remedy="Submit again.")
                _take_name(made, folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        write_atomically(run.path / CODE / _NEWEST, name)
    return open_frozen(folder)


def _fill(made: Path, files: Mapping[str, Path], texts: Mapping[str, bytes], facts: str) -> None:
    for inside, file in files.items():
        (made / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, made / inside)
    for inside, data in texts.items():
        (made / inside).write_bytes(data)
    (made / _FACTS).write_text(facts, encoding="utf-8")


def _take_name(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another task of an array was quicker
            raise


def _commit(root: Path) -> str | None:
    """The commit that the project's folder stands at, `+` behind it with changes; None where git does not tell."""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _changed_since(name: str, submitted: float) -> UserError:
    when = time.strftime("%H:%M:%S on %Y-%m-%d", time.localtime(submitted))
    return UserError(
        f"{name} changed after the job was submitted (at {when}), and what was submitted was not kept",
        where="frozen code",
        remedy="Submit again; `bash launch/multinode.sh ...` keeps a copy at once, --live-code takes what is there.",
    )


def _shown(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more files"


def frozen_facts(folder: Path) -> Mapping[str, str]:
    """What a copy says of itself: config, frozen (time), commit."""
    return read_json(folder / _FACTS)
