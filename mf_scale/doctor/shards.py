"""Shards: there, of the indexed size, and of the indexed checksum where there was time to read them."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mf_scale.data.index import CHUNK, Index, Shard
from mf_scale.data.storage import Storage, StorageError
from mf_scale.doctor.finding import OK, PROBLEM, WARNING, Finding, size, some
from mf_scale.errors import UserError

CHECK = "shards"
READ_SECONDS = 3.0
"""For checksums, on every node."""
SIZE_SECONDS = 2.0
"""For sizes; a remote store answers some hundred questions in it."""
_LISTED = 20
Report = Mapping[str, Any]


def shard_facts(
    indexes: Sequence[Index], turn: str, *, read: float = READ_SECONDS, sizes: float = SIZE_SECONDS
) -> dict[str, Any]:
    """Look at the sources' shards in an order that `turn` shuffles, so that every start and node looks at others.

    {"shards", "sized", "wrong": {name: what}, "read" bytes, "seconds", "checked" shards, "failed": sentence or ""}.
    """
    chance = random.Random(turn)
    places = [(index, shard) for index in indexes for shard in index.shards]
    chance.shuffle(places)
    facts: dict[str, Any] = {
        "shards": len(places),
        "sized": 0,
        "wrong": {},
        "read": 0,
        "seconds": 0.0,
        "checked": 0,
        "failed": "",
    }
    try:
        began = time.monotonic()
        for index, shard in places:
            _size(index, shard, facts)
            if time.monotonic() - began > sizes:
                break
        began = time.monotonic()
        for index, shard in places:
            if time.monotonic() - began > read:
                break
            if _name(index, shard) not in facts["wrong"]:
                _checksum(index, shard, began + read, facts)
        facts["seconds"] = time.monotonic() - began
    except StorageError as error:
        facts["failed"] = str(error)
    return facts


def _size(index: Index, shard: Shard, facts: dict[str, Any]) -> None:
    facts["sized"] += 1
    try:
        found = Storage(index.source).size(shard.name)
    except StorageError:
        raise  # the network's fault says nothing about the shard
    except UserError:
        facts["wrong"][_name(index, shard)] = "is missing or unreadable"
        return
    if found != shard.size:
        facts["wrong"][_name(index, shard)] = f"has {found:,} bytes instead of {shard.size:,}"


def _checksum(index: Index, shard: Shard, deadline: float, facts: dict[str, Any]) -> None:
    """Counted as checked only where there was time to read it to its end."""
    storage, digest = Storage(index.source), hashlib.sha256()
    for offset in range(0, shard.size, CHUNK):
        data = storage.read(shard.name, offset, min(CHUNK, shard.size - offset))
        digest.update(data)
        facts["read"] += len(data)
        if time.monotonic() > deadline and offset + CHUNK < shard.size:
            return
    facts["checked"] += 1
    if digest.hexdigest() != shard.sha256:
        facts["wrong"][_name(index, shard)] = "has another checksum: it was altered"


def _name(index: Index, shard: Shard) -> str:
    return f"{index.source}/{shard.name}"


def judge_shards(reports: Sequence[Report], *, goes_on: bool = False) -> list[Finding]:
    """reports: {host, shards: shard_facts, "errors": [[source, what, where, remedy, fault], ...]} of one rank a host.

    goes_on: a run that has committed checkpoints is not ended for a byte, which it may have read for days: training
    puts samples that do not decode aside, and counts them. Of what is missing it would start nothing anyway.
    """
    looked = [report for report in reports if report.get("shards")]
    if not looked:
        return []
    found = _unseen(looked)
    seen = [report for report in looked if "shards" in report["shards"]]
    wrong: dict[str, tuple[str, list[str]]] = {}
    for report in seen:
        for name, what in report["shards"]["wrong"].items():
            wrong.setdefault(name, (what, []))[1].append(str(report["host"]))
    if wrong:
        number = max(report["shards"]["shards"] for report in seen)
        listed = [f"{name} {what}" for name, (what, _) in sorted(wrong.items())]
        hosts = {host for _, of in wrong.values() for host in of}
        # One that every node which looked at it would see is the data's; missing on some nodes alone is a mount's.
        local = len(looked) > 1 and len(hosts) < len(looked) and all("missing" in what for what, _ in wrong.values())
        on = f" on {some(sorted(hosts))}" if local else ""
        borne = goes_on and all("altered" in what for what, _ in wrong.values())
        remedy = "Restore the shards, or pack (or index) the source again."
        found.append(
            Finding(
                CHECK,
                WARNING if borne else PROBLEM,
                f"{len(wrong)} of {number} shards differ from the index{on}: {some(listed)}",
                "Mount the file system that holds them there." if local else remedy,
                fault=local,
                details={"wrong": dict(list(wrong.items())[:_LISTED])},
            )
        )
    failed = [report for report in seen if report["shards"]["failed"]]
    if failed:
        what = f"{some([r['host'] for r in failed])}: {failed[0]['shards']['failed']}"
        found.append(Finding(CHECK, PROBLEM, what, "Check the network and the store.", fault=True))
    return found or [_fine(seen)]


def _unseen(looked: Sequence[Report]) -> list[Finding]:
    """One finding a source that cannot be opened: everywhere, or on nodes that lack what others have."""
    blind: dict[str, dict[str, Sequence[Any]]] = {}
    for report in looked:
        for source, *error in report["shards"].get("errors", []):
            # What several sources have in common has no name: each mistake of that kind is one of its own.
            blind.setdefault(source or f"\0{error[0]}", {}).setdefault(str(report["host"]), error)
    found = []
    for source, hosts in blind.items():
        what, where, remedy, _ = next(iter(hosts.values()))
        told = f"{what} ({where})" if where else str(what)
        if len(hosts) == len(looked):
            found.append(Finding(CHECK, PROBLEM, told, remedy, fault=all(bool(error[-1]) for error in hosts.values())))
        elif source.startswith("\0"):
            found.append(Finding(CHECK, PROBLEM, f"{some(list(hosts))}: {told}", remedy, fault=True))
        else:
            said = f"{some(list(hosts))} cannot open a source that the other nodes can: {told}"
            found.append(Finding(CHECK, PROBLEM, said, "Mount the file system that holds it there.", fault=True))
    return found


def _fine(seen: Sequence[Report]) -> Finding:
    facts = [report["shards"] for report in seen]
    speeds = {str(r["host"]): r["shards"]["read"] / max(r["shards"]["seconds"], 1e-9) for r in seen}
    slowest = min(speeds, key=lambda host: speeds[host])
    sized, checked = max(f["sized"] for f in facts), sum(f["checked"] for f in facts)
    number, read = facts[0]["shards"], sum(f["read"] for f in facts)
    there = f"{number:,} there" if sized == number else f"{sized:,} of {number:,} looked at and there"
    again = f"{checked:,} checksums right" if checked else "none small enough for its checksum"
    speed = f", {size(speeds[slowest])}/s" + (f" on {slowest}, the slowest" if len(seen) > 1 else "")
    details = {"bytes_per_second": speeds, "sized": sized, "checked": checked, "shards": number}
    if len(seen) > 1 and speeds[slowest] < 0.2 * sorted(speeds.values())[len(speeds) // 2]:
        what = f"{slowest} reads {size(speeds[slowest])}/s, less than a fifth of the other nodes"
        return Finding(CHECK, WARNING, what, f"Look at its mount and cache, or --exclude={slowest}.", details=details)
    return Finding(CHECK, OK, f"{there}, {again} ({size(read)} read{speed})", details=details)
