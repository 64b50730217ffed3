"""The run directory: can it be written, how fast, how much room is there, and what time is it there."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mf_scale import faults
from mf_scale.config.schema import Config
from mf_scale.doctor.finding import OK, PROBLEM, WARNING, Finding, size, some
from mf_scale.rundir import NO_SPACE

WRITES, ROOM, CLOCK = "run directory", "room", "file clock"
MOST_BYTES = 64 << 20
"""Written for the trial, on every node at once."""
WRITE_SECONDS = 2.0
FILE_SKEW = 5.0
"""Seconds: the job scripts tell what was changed after a submission by the times of files."""
_CHUNK = 4 << 20
_FEW_FILES = 10_000
_SAVE_SHARE = 0.5
Report = Mapping[str, Any]


def directory_facts(
    folder: Path, *, most: int = MOST_BYTES, seconds: float = WRITE_SECONDS, rank: int = 0
) -> dict[str, Any]:
    """Write a file into `folder`, or where it would be made, and say how that went; nothing of it stays.

    {"place", "there", "free", "total", "files_free" (None: not told), "wrote" bytes, "seconds", "ahead" (seconds by
    which the file system's clock is ahead of this node's), "error", "errno"}.
    """
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    facts: dict[str, Any] = {"place": str(place), "there": place == folder.absolute(), "error": "", "errno": 0}
    facts |= {"wrote": 0, "seconds": 0.0, "ahead": 0.0, "free": 0, "total": 0, "files_free": None}
    try:
        room, files = shutil.disk_usage(place), os.statvfs(place)
        facts |= {"free": room.free, "total": room.total, "files_free": files.f_favail if files.f_files else None}
        file = place / f".doctor-{secrets.token_hex(8)}"
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            file.unlink()  # so that it goes whatever becomes of this process
            before = time.time()
            os.write(handle, b"\0")
            os.fsync(handle)
            # The server's time lies between two readings of this node's; what it is off by is nothing within them.
            stamp, after = os.fstat(handle).st_mtime, time.time()
            facts["ahead"] = min(0.0, stamp - before) or max(0.0, stamp - after)
            faults.reach("doctor.write", rank=rank, step=0)
            facts["wrote"], facts["seconds"] = _write(handle, min(most, room.free // 4), seconds)
        finally:
            os.close(handle)
    except OSError as error:
        facts |= {"error": error.strerror or str(error), "errno": error.errno or 0}
    return facts


def unanswered(folder: Path, why: str) -> dict[str, Any]:
    """The facts of a file system that does not answer."""
    nothing: dict[str, Any] = {"wrote": 0, "seconds": 0.0, "ahead": 0.0, "free": 0, "total": 0, "files_free": None}
    return {"place": str(folder), "there": True, "error": why, "errno": 0, **nothing}


def _write(handle: int, most: int, seconds: float) -> tuple[int, float]:
    data, wrote, began = os.urandom(_CHUNK), 0, time.perf_counter()
    while wrote < most and time.perf_counter() - began < seconds:
        wrote += os.write(handle, data[: most - wrote])
        if wrote % (4 * _CHUNK) == 0:  # else a cache takes all of it, and the limit of time is met in the last fsync
            os.fsync(handle)
    os.fsync(handle)
    with suppress(OSError):
        os.ftruncate(handle, 0)
    return wrote, time.perf_counter() - began


def judge_writes(reports: Sequence[Report], checkpoint: int, config: Config) -> list[Finding]:
    """reports: {host, directory: directory_facts} of one rank a host; `checkpoint` in bytes, 0: not known."""
    looked = [report for report in reports if report.get("directory")]
    failed = [report for report in looked if report["directory"]["error"]]
    if failed:
        facts, all_of_them = failed[0]["directory"], len(failed) == len(looked)
        full = facts["errno"] in NO_SPACE
        mine = all_of_them and facts["errno"] in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
        hosts = "" if all_of_them else f" on {some([r['host'] for r in failed])}, while the other nodes can"
        remedy = (
            "Free some space, or raise the quota."
            if full
            else "Choose a run_dir that this user may write to."
            if mine
            else "Look at that file system's mount and server."
        )
        what = f"{facts['place']} cannot be written{hosts}: {facts['error']}"
        return [Finding(WRITES, PROBLEM, what, remedy, fault=not mine, details={"errno": facts["errno"]})]
    speeds = {str(r["host"]): r["directory"]["wrote"] / max(r["directory"]["seconds"], 1e-9) for r in looked}
    slowest = min(speeds, key=lambda host: speeds[host])
    together = sum(speeds.values())
    place = looked[0]["directory"]["place"] + ("" if looked[0]["directory"]["there"] else " (where it will be made)")
    by = f", {size(together)}/s from {len(speeds)} nodes at once" if len(speeds) > 1 else ""
    text = f"{place}: writes {size(speeds[slowest])}/s" + (f" on {slowest}, the slowest{by}" if by else "")
    details = {"bytes_per_second": speeds, "checkpoint_bytes": checkpoint}
    save, stop = checkpoint / max(together, 1.0), 60 * config.train.stop_before
    if checkpoint and stop and save > _SAVE_SHARE * stop:
        return [
            Finding(
                WRITES,
                WARNING,
                f"{text}; a checkpoint of {size(checkpoint)} takes about {save:.0f} s, and train.stop_before leaves "
                f"{stop:.0f} s",
                f"Take train.stop_before={round(2.5 * save / 60, 1)} and --signal=B:USR1@{max(60, round(3 * save))}.",
                details=details,
            )
        ]
    takes = f", about {save:.1f} s a checkpoint" if checkpoint else ""
    return [Finding(WRITES, OK, text + takes, details=details)]


def judge_room(facts: Mapping[str, Any], checkpoint: int, held: int, config: Config, *, goes_on: bool) -> list[Finding]:
    """Room for what `checkpoint` keeps, and one more that is being written.

    facts: directory_facts; `checkpoint` bytes of one, 0: not known; `held`: bytes that the run's checkpoints take
    already; goes_on: the run has committed some. A run that is under way is only warned: training bears a full disk.
    """
    free, files = int(facts["free"]), facts["files_free"]
    keep = config.checkpoint
    number = keep.keep_last + 1 + keep.keep_best
    need = max(0, number * checkpoint - held)
    details = {"free": free, "checkpoint_bytes": checkpoint, "checkpoints": number, "held": held, "need": need}
    if facts["error"]:
        return []  # said already
    if files is not None and files < _FEW_FILES:
        what = f"the file system of {facts['place']} has room for {files:,} files only"
        return [Finding(ROOM, WARNING, what, "Remove files that are not needed: inodes run out before bytes.")]
    if not checkpoint:
        return [Finding(ROOM, OK, f"{size(free)} free", details=details)]
    of = f"{number} checkpoints of {size(checkpoint)} (keep_last + 1{' + the best' if keep.keep_best else ''})"
    remedy = "Free some space, choose another run_dir, or lower checkpoint.keep_last."
    if free < checkpoint:
        what = f"{size(free)} free: not one checkpoint of {size(checkpoint)} can be written"
        return [Finding(ROOM, PROBLEM, what, remedy, fault=True, details=details)]
    if free < need:
        what = f"{size(free)} free, {of} need {size(need)}" + (" more" if held else "")
        level = WARNING if goes_on else PROBLEM
        return [Finding(ROOM, level, what, remedy, details=details)]
    more = "; checkpoint.keep_every adds to them" if keep.keep_every else ""
    return [Finding(ROOM, OK, f"{size(free)} free for {of}{more}", details=details)]


def judge_file_clock(reports: Sequence[Report]) -> list[Finding]:
    """Whether the file system's clock is that of the nodes."""
    looked = [report for report in reports if report.get("directory") and not report["directory"]["error"]]
    if not looked:
        return []
    worst = max(looked, key=lambda report: abs(report["directory"]["ahead"]))
    ahead = float(worst["directory"]["ahead"])
    if abs(ahead) < FILE_SKEW:
        return [Finding(CLOCK, OK, f"within {max(abs(ahead), 0.1):.1f} s of the nodes'", details={"ahead": ahead})]
    apart = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'}"
    what = f"the file system's clock is {apart} that of {worst['host']}"
    remedy = "Have both set (NTP): what was changed after a submission is told by the times of files."
    return [Finding(CLOCK, WARNING, what, remedy, details={"ahead": ahead})]
