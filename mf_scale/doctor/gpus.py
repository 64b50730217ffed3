"""GPUs: what torch and nvidia-smi say of them."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mf_scale.doctor.finding import OK, PROBLEM, WARNING, Finding, size, some

if TYPE_CHECKING:
    import torch

CHECK = "gpus"
_FIELDS = ("uuid", "name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total")
_NEWER = ("remapped_rows.failure", "clocks_throttle_reasons.hw_slowdown")
"""Fields that older drivers do not know, and then refuse the whole question."""
_SECONDS = 5.0
_MIB = 2**20
_CONTEXT = 1024 * _MIB
"""What a CUDA context of our own may take of a GPU's memory."""
_SLOWER = 1.5
"""A GPU that multiplies this much slower than the others' median holds all of them up."""
Report = Mapping[str, Any]


def device_facts(device: torch.device) -> dict[str, Any]:
    """What a rank says of its own GPU, before it has used it for anything; empty on a CPU. Bytes, seconds."""
    import torch

    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "uuid": str(getattr(facts, "uuid", "")).removeprefix("GPU-"),
        "total": total,
        "free": free,
        "bf16": torch.cuda.is_bf16_supported(),
        "product_seconds": _product(device),
    }


def _product(device: torch.device) -> float:
    """Seconds of a large matrix product: what is throttled is slow at it."""
    import torch

    from mf_scale.doctor.watch import best_of

    factor = torch.ones(4096, 4096, device=device, dtype=torch.float16)

    def multiply() -> None:
        for _ in range(10):
            factor @ factor
        torch.cuda.synchronize(device)

    multiply()
    return best_of(3, multiply)


def smi_facts() -> dict[str, Any]:
    """What nvidia-smi says of this node: {"gpus": [...], "processes": [...]}; {"error": ...} where it fails; {} without
    one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    try:
        for fields in ((*_FIELDS, *_NEWER), _FIELDS):
            asked = subprocess.run(
                [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
            if asked.returncode == 0:
                break
        else:
            return {"error": " ".join((asked.stderr or asked.stdout).split())[:300]}
        apps = subprocess.run(
            [program, "--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"nvidia-smi does not answer ({type(error).__name__})"}
    return {
        "gpus": parse_table(asked.stdout, fields),
        "processes": parse_table(apps.stdout if apps.returncode == 0 else "", ("uuid", "pid", "name", "memory")),
    }


def parse_table(text: str, fields: Sequence[str]) -> list[dict[str, str | None]]:
    """Rows of nvidia-smi's CSV; None for what it does not tell ([N/A], [Not Supported], ...)."""
    rows = []
    for cells in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(cells) == len(fields):
            values = [None if cell.startswith("[") or not cell else cell.strip() for cell in cells]
            row = dict(zip(fields, values, strict=True))
            rows.append({**row, "uuid": (row["uuid"] or "").removeprefix("GPU-")})
    return rows


def driver_of(reports: Sequence[Report]) -> str:
    """The driver's version; empty where nvidia-smi does not tell."""
    gpus = [gpu for report in reports for gpu in report.get("smi", {}).get("gpus", [])]
    return next((gpu["driver_version"] for gpu in gpus if gpu["driver_version"]), "")


def judge_gpus(reports: Sequence[Report], *, precision: str = "fp32") -> list[Finding]:
    """reports: {rank, host, gpu: device_facts, smi: smi_facts of one rank a host, gpu_files: GPUs in /dev}."""
    ours = [report for report in reports if report.get("gpu")]
    blind = [report for report in reports if not report.get("gpu") and report.get("gpu_files")]
    found = []
    if blind:
        hosts = list(dict.fromkeys(str(report["host"]) for report in blind))
        why = next((str(report["cuda_error"]) for report in blind if report.get("cuda_error")), "")
        found.append(
            Finding(
                CHECK,
                PROBLEM,
                f"{some(hosts)} has GPUs that torch cannot use{f': {why}' if why else ''}",
                "Compare torch's CUDA with the driver's (`nvidia-smi`); a wheel for a newer CUDA than the driver knows "
                "needs a newer driver.",
                fault=bool(ours),  # where the others can, it is the node
            )
        )
    found += _sick(reports)
    if not ours:
        return found or [Finding(CHECK, OK, "none: the ranks compute on CPUs")]
    found += _doubles(ours) + _unlike(ours) + _in_use(ours, reports) + _slow(ours)
    if precision == "bf16" and not all(report["gpu"]["bf16"] for report in ours):
        found.append(Finding(CHECK, WARNING, "these GPUs compute bf16 in software", "Take train.precision=fp16."))
    kinds = Counter(f"{report['gpu']['name']} ({size(report['gpu']['total'])})" for report in ours)
    text = " and ".join(f"{number} x {kind}" for kind, number in kinds.items())
    return found or [Finding(CHECK, OK, text, details={"ranks": {str(r["rank"]): dict(r["gpu"]) for r in ours}})]


def _sick(reports: Sequence[Report]) -> list[Finding]:
    found = []
    used = {report["gpu"]["uuid"] for report in reports if report.get("gpu")}
    for report in reports:
        smi, host = report.get("smi", {}), report["host"]
        if "error" in smi and report.get("gpu_files"):
            what = f"nvidia-smi fails on {host}: {smi['error']}"
            found.append(Finding(CHECK, WARNING, what, "Look at the driver of that node."))
        for gpu in smi.get("gpus", []):
            if used and gpu["uuid"] not in used:
                continue
            errors = gpu.get("ecc.errors.uncorrected.volatile.total") or "0"
            if errors.isdecimal() and int(errors):
                said = f"GPU {gpu['uuid'][:8]} on {host} had {errors} memory errors that ECC could not correct"
                # Since the driver was loaded, which may be months ago: no proof that it is sick now.
                found.append(Finding(CHECK, WARNING, said, f"Tell the administrators, or --exclude={host}."))
            if gpu.get("remapped_rows.failure") in ("Yes", "1"):
                found.append(_broken(f"GPU {gpu['uuid'][:8]} on {host} could not replace broken memory rows", host))
            if gpu.get("clocks_throttle_reasons.hw_slowdown") == "Active":
                said = f"GPU {gpu['uuid'][:8]} on {host} is slowed down by its hardware (heat or power)"
                found.append(Finding(CHECK, WARNING, said, "All ranks wait for the slowest: tell the administrators."))
    return found


def _broken(text: str, host: object) -> Finding:
    return Finding(CHECK, PROBLEM, text, f"Have it reset or replaced; until then --exclude={host}.", fault=True)


def _doubles(ours: Sequence[Report]) -> list[Finding]:
    by_gpu: dict[tuple[str, str], list[int]] = {}
    for report in ours:
        by_gpu.setdefault((str(report["host"]), str(report["gpu"]["uuid"])), []).append(report["rank"])
    doubles = {place: ranks for place, ranks in by_gpu.items() if len(ranks) > 1 and place[1]}
    return [
        Finding(
            CHECK,
            PROBLEM,
            f"ranks {some(ranks)} on {host} share one GPU",
            "One rank a GPU: --ntasks-per-node equal to --gpus-per-node, or another CUDA_VISIBLE_DEVICES.",
        )
        for (host, _), ranks in doubles.items()
    ]


def _unlike(ours: Sequence[Report]) -> list[Finding]:
    names = Counter(str(report["gpu"]["name"]) for report in ours)
    if len(names) == 1:
        return []
    listed = " and ".join(f"{number} x {name}" for name, number in names.items())
    remedy = "All wait for the slowest: ask for one kind (--constraint)."
    return [Finding(CHECK, WARNING, f"the GPUs differ: {listed}", remedy)]


def _in_use(ours: Sequence[Report], reports: Sequence[Report]) -> list[Finding]:
    known = {report.get("pid") for report in reports}
    found = []
    for report in ours:
        used = report["gpu"]["total"] - report["gpu"]["free"] - _CONTEXT
        if used <= 0.02 * report["gpu"]["total"]:
            continue
        rows: list[dict[str, Any]] = next(
            (r["smi"].get("processes", []) for r in reports if r["host"] == report["host"] and r.get("smi")), []
        )
        mine = [row for row in rows if row["uuid"] == report["gpu"]["uuid"] and row["pid"] not in map(str, known)]
        who = (
            some([f"pid {row['pid']} {row['name']}" for row in mine]) or "processes that nvidia-smi does not show here"
        )
        found.append(
            Finding(
                CHECK,
                WARNING,
                f"rank {report['rank']} on {report['host']} shares its GPU: {size(used)} are in use by {who}",
                "End them, or take another GPU: they take memory and time.",
            )
        )
    return found


def _slow(ours: Sequence[Report]) -> list[Finding]:
    times = sorted(float(report["gpu"]["product_seconds"]) for report in ours)
    median, last = times[(len(times) - 1) // 2], max(ours, key=lambda report: float(report["gpu"]["product_seconds"]))
    if len(ours) < 2 or times[-1] < _SLOWER * median:
        return []
    return [
        Finding(
            CHECK,
            WARNING,
            f"rank {last['rank']} on {last['host']} multiplies {times[-1] / median:.1f} times slower than others",
            f"All ranks wait for it: look at its heat, power and other processes, or --exclude={last['host']}.",
        )
    ]
