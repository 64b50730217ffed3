"""Collectives between all ranks: time and bandwidth of all-reduces, who comes late, and whose link is slow."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mf_scale import faults
from mf_scale.distributed import comm
from mf_scale.distributed.env import World
from mf_scale.doctor.finding import OK, WARNING, Finding, size

CHECK = "collectives"
_SIZES = (4 << 10, 1 << 20, 16 << 20)
"""Bytes; on GPUs one more, as large as a bucket of gradients."""
_LARGE = 128 << 20
_REPEATS = 3
_CLOCK_READS = 5
_LATE_SECONDS = 0.25
"""A rank that all others wait so long for, every time."""
_SLOW_SHARE = 1 / 3
"""Of the best link of its kind, below which one is slow."""
Report = Mapping[str, Any]


def measure(world: World, device: torch.device, *, seconds: float) -> dict[str, Any]:
    """What this rank saw, all ranks together; no further size is begun once `seconds` are over.

    {"backend", "all_reduce": {bytes: [seconds inside, one a repetition]}, "ring": [bytes, seconds], "clocks": Unix
    seconds read at the same moments by all ranks}.
    """
    clocks = []
    for _ in range(_CLOCK_READS):
        comm.barrier()
        clocks.append(time.time())
    facts: dict[str, Any] = {"backend": "nccl" if device.type == "cuda" else "gloo", "all_reduce": {}, "clocks": clocks}
    began = time.monotonic()
    for number, count in enumerate((*_SIZES, _LARGE) if device.type == "cuda" else _SIZES, start=1):
        facts["all_reduce"][str(count)] = _all_reduce(world, device, count, number)
        # The same on all ranks, or some would begin a collective that others leave out.
        if comm.sum_array(np.array([time.monotonic() - began]))[0] / world.size > seconds:
            break
    facts["ring"] = _ring(world, device, _SIZES[-1])
    return facts


def _all_reduce(world: World, device: torch.device, count: int, number: int) -> list[float]:
    values = torch.ones(count // 4, device=device)
    dist.all_reduce(values)  # connections are made at the first one of a size
    times = []
    for _ in range(_REPEATS):
        _settle(device)
        comm.barrier()
        faults.reach("doctor.all_reduce", rank=world.rank, step=number)
        began = time.perf_counter()
        dist.all_reduce(values)
        _settle(device)
        times.append(time.perf_counter() - began)
    return times


def _ring(world: World, device: torch.device, count: int) -> list[float]:
    """Every rank sends to the next and receives from the one before, all at once: (bytes, seconds until received)."""
    given = torch.ones(count // 4, device=device)
    taken = torch.empty_like(given)
    following, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    best = float("inf")
    for _ in range(_REPEATS):
        _settle(device)
        comm.barrier()
        began = time.perf_counter()
        both = [dist.P2POp(dist.isend, given, following), dist.P2POp(dist.irecv, taken, before)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        _settle(device)
        best = min(best, time.perf_counter() - began)
    return [float(count), best]


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def judge_collectives(reports: Sequence[Report]) -> list[Finding]:
    """reports: {rank, host, collectives: what `measure` gave} of all ranks, in their order."""
    looked = [report for report in reports if report.get("collectives")]
    if len(looked) < 2:
        return []
    late, waited = lateness(looked)
    found = []
    if waited > _LATE_SECONDS:
        found.append(
            Finding(
                CHECK,
                WARNING,
                f"all ranks wait {waited:.2f} s for rank {late['rank']} on {late['host']} in every collective",
                f"Look at what else its cores do, or --exclude={late['host']}.",
                details={"rank": late["rank"], "host": late["host"], "seconds": waited},
            )
        )
    found += _slow_links(looked)
    if found:
        return found
    largest = max(map(int, looked[0]["collectives"]["all_reduce"]))
    seconds, by = all_reduce_time(looked, largest), bus_bandwidth(looked, largest)
    small = all_reduce_time(looked, min(map(int, looked[0]["collectives"]["all_reduce"])))
    times = {count: all_reduce_time(looked, int(count)) for count in looked[0]["collectives"]["all_reduce"]}
    slowest = min(looked, key=_link)
    link = f"slowest link {size(_link(slowest))}/s, to rank {slowest['rank']} on {slowest['host']}"
    text = f"{looked[0]['collectives']['backend']}: {size(largest)} in {1000 * seconds:.1f} ms ({size(by)}/s), "
    text += f"{size(_SIZES[0])} in {1000 * small:.2f} ms; {link}"
    return [Finding(CHECK, OK, text, details={"all_reduce_seconds": times, "bus_bytes_per_second": by})]


def lateness(reports: Sequence[Report]) -> tuple[Report, float]:
    """The rank that the others wait for, and how long: what is late to a collective spends the least time inside."""
    inside = {
        report["rank"]: np.concatenate([np.array(times) for times in report["collectives"]["all_reduce"].values()])
        for report in reports
    }
    longest = np.max(list(inside.values()), axis=0)
    sizes = len(reports[0]["collectives"]["all_reduce"])
    # The median over repetitions, since anything may be late once; the worst size, since the fast ones show less.
    late = {
        rank: float(np.median((longest - times).reshape(sizes, -1), axis=1).max()) for rank, times in inside.items()
    }
    worst = max(reports, key=lambda report: late[report["rank"]])
    return worst, late[worst["rank"]]


def all_reduce_time(reports: Sequence[Report], count: int) -> float:
    """Seconds of the best all-reduce of `count` bytes, of the rank that was in it longest."""
    times = np.array([report["collectives"]["all_reduce"][str(count)] for report in reports])
    return float(times.max(axis=0).min())


def bus_bandwidth(reports: Sequence[Report], count: int) -> float:
    """Bytes a second that every link of a ring carries: 2 (n - 1) / n x size / time, as nccl-tests have it."""
    ranks = len(reports)
    return 2 * (ranks - 1) / ranks * count / max(all_reduce_time(reports, count), 1e-9)


def _link(report: Report) -> float:
    count, seconds = report["collectives"]["ring"]
    return float(count / max(seconds, 1e-9))


def _slow_links(reports: Sequence[Report]) -> list[Finding]:
    """Links far below the best of their kind: within a host, or between two."""
    links: dict[bool, list[tuple[float, Report, Report]]] = {True: [], False: []}
    for place, report in enumerate(reports):
        sender = reports[place - 1]
        links[sender["host"] == report["host"]].append((_link(report), sender, report))
    found = []
    for inside, of in links.items():
        # On CPUs the links within a host are its memory and whoever has the cores just now.
        if len(of) < 2 or (inside and reports[0]["collectives"]["backend"] == "gloo"):
            continue
        best, (worst, sender, receiver) = max(link for link, _, _ in of), min(of, key=lambda link: link[0])
        if worst < _SLOW_SHARE * best:
            where = f"rank {sender['rank']} on {sender['host']} to rank {receiver['rank']} on {receiver['host']}"
            what = f"the slowest link, {where}, carries {size(worst)}/s; the best of its kind {size(best)}/s"
            remedy = "Look at cables and ports (ibstat, nvidia-smi nvlink -s), NCCL_IB_HCA and NCCL_SOCKET_IFNAME."
            found.append(
                Finding(
                    CHECK, WARNING, what, remedy, details={"receiver": receiver["rank"], "slow": worst, "best": best}
                )
            )
    return found
