"""A node: open files, shared memory and memory, against what the ranks on it will take."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mf_scale.config.schema import Config
from mf_scale.doctor.finding import OK, PROBLEM, WARNING, Finding, size, some
from mf_scale.doctor.memory import memory_facts

FILES, SHARED, MEMORY = "open files", "shared memory", "host memory"
LEAST_FILES = 4096
"""Shards (32 a process), loader processes, connections of NCCL and gloo to every rank."""
_FULL = 0.9


@dataclass(frozen=True)
class Needs:
    """What the ranks of a host take, in bytes; estimates from the configuration."""

    batches: int
    """Batches on their way from a rank's loader processes, in shared memory."""
    buffers: int
    """Block buffers of a rank's loader processes (data.workers x data.buffer_mib)."""
    snapshot: int
    """The whole checkpoint's copy in host memory, over all ranks (checkpoint.asynchronous)."""
    offload: int
    """What ZeRO keeps in host memory, over all ranks."""


def needs_of(config: Config, batch_of_a_rank: int, checkpoint: int, trainable: int) -> Needs:
    """Estimates; `checkpoint` in bytes, `trainable` in elements. A sample: three bytes a pixel and a map of two."""
    data = config.data
    workers = max(1, data.workers)
    sample = data.crop[0] * data.crop[1] * (3 + 2)
    share = -(-batch_of_a_rank // workers)
    offload = (16 * trainable if config.zero.offload_optimizer else 0) + (
        4 * trainable if config.zero.offload_parameters else 0
    )
    return Needs(
        batches=data.workers * data.prefetch_steps * share * sample,
        buffers=workers * data.buffer_mib * 2**20,
        snapshot=checkpoint if config.checkpoint.asynchronous else 0,
        offload=offload,
    )


def host_facts() -> dict[str, Any]:
    """What this node allows. Bytes; -1: unlimited open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    facts: dict[str, Any] = {"files": soft, "files_hard": hard, "memory": memory_facts(), "shm": {}}
    try:
        there = os.statvfs("/dev/shm")
        facts["shm"] = {"total": there.f_blocks * there.f_frsize, "free": there.f_bavail * there.f_frsize}
    except OSError:
        pass
    return facts


def judge_hosts(reports: Sequence[Mapping[str, Any]], needs: Needs | None) -> list[Finding]:
    """reports: {host, node: host_facts of one rank a host}. Without `needs` (no configuration) numbers alone."""
    hosts = [report for report in reports if report.get("node")]
    ranks = {str(h["host"]): sum(report["host"] == h["host"] for report in reports) for h in hosts}
    return [
        *_files(hosts),
        *_shared(hosts, ranks, needs),
        *_memory(hosts, ranks, needs, len(reports)),
    ]


def _files(hosts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    few = [h for h in hosts if 0 <= h["node"]["files"] < LEAST_FILES]
    if not few:
        least = min((h["node"]["files"] for h in hosts if h["node"]["files"] >= 0), default=-1)
        return [Finding(FILES, OK, f"{least:,} a process" if least >= 0 else "no limit", details={"least": least})]
    least, hard = min((h["node"]["files"], h["node"]["files_hard"]) for h in few)
    may = "launch/env.sh raises it" if hard >= LEAST_FILES or hard < 0 else "the administrators can raise it"
    return [
        Finding(
            FILES,
            WARNING,
            f"a process may open {least:,} files on {some([h['host'] for h in few])}; {LEAST_FILES:,} are enough for "
            "many ranks and shards",
            f"ulimit -n {LEAST_FILES} ({may}).",
            details={"least": least, "hard": hard},
        )
    ]


def _shared(hosts: Sequence[Mapping[str, Any]], ranks: Mapping[str, int], needs: Needs | None) -> list[Finding]:
    told = [h for h in hosts if h["node"]["shm"]]
    if not told:
        return []
    tightest = min(told, key=lambda h: h["node"]["shm"]["free"] / ranks[str(h["host"])])
    free, need = tightest["node"]["shm"]["free"], needs.batches * ranks[str(tightest["host"])] if needs else 0
    details = {"free": free, "need": need, "host": tightest["host"]}
    if need > free:
        return [
            Finding(
                SHARED,
                PROBLEM,
                f"/dev/shm on {tightest['host']} has {size(free)} free, the loader processes of its ranks hand over up "
                f"to {size(need)}: they would die of a bus error",
                "A larger /dev/shm (docker --shm-size, --ipc=host), or lower data.workers or data.prefetch_steps.",
                details=details,
            )
        ]
    wanted = f", of which loader processes take up to {size(need)}" if need else ""
    return [Finding(SHARED, OK, f"{size(free)} free in /dev/shm{wanted}", details=details)]


def _memory(
    hosts: Sequence[Mapping[str, Any]], ranks: Mapping[str, int], needs: Needs | None, world: int
) -> list[Finding]:
    told = [h for h in hosts if h["node"]["memory"]]
    if not told:
        return []

    def need_of(host: Mapping[str, Any]) -> int:
        if needs is None:
            return 0
        here = ranks[str(host["host"])]
        return here * (needs.buffers + needs.batches) + (needs.snapshot + needs.offload) * here // world

    tightest = min(told, key=lambda h: h["node"]["memory"]["free"] - need_of(h))
    free, total, need = *(tightest["node"]["memory"][name] for name in ("free", "total")), need_of(tightest)
    details = {"free": free, "total": total, "need": need, "host": tightest["host"]}
    text = f"{size(free)} of {size(total)} free"
    if needs is None:
        return [Finding(MEMORY, OK, text, details=details)]
    parts = f"buffers of the loader processes {size(need_of(tightest))}"
    if needs.snapshot or needs.offload:
        parts = f"{size(need)} for loader processes, the copy of a checkpoint" + (
            " and offloading" if needs.offload else ""
        )
    remedy = "Lower data.workers or data.buffer_mib, set checkpoint.asynchronous=false, or ask for more (--mem)."
    if need > _FULL * free:
        what = f"the ranks on {tightest['host']} want {parts}, {size(free)} are free"
        return [Finding(MEMORY, WARNING, what, remedy, details=details)]
    return [Finding(MEMORY, OK, f"{text}; the ranks want {parts}", details=details)]
