"""`mf-scale bench classes`: class terms and semantic inference by the number of classes, beside the dense way."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mf_scale.bench.class_ways import Sizes, Way, class_terms, inference, inference_sure
from mf_scale.bench.memory import peak_over_inputs
from mf_scale.bench.timing import timed
from mf_scale.errors import UserError
from mf_scale.rundir import disk_errors

_MEASURED: tuple[Callable[[Sizes, int, torch.device], Way], ...] = (class_terms, inference, inference_sure)
_COLUMNS = (
    ("classes", "classes", ",d"),
    ("ours ms", "ours_ms", ",.0f"),
    ("dense ms", "dense_ms", ",.0f"),
    ("faster", "faster", ".2fx"),
    ("ours MiB", "ours_mib", ",.1f"),
    ("dense MiB", "dense_mib", ",.1f"),
    ("smaller", "smaller", ".1fx"),
)


def bench_classes(sizes: Sizes, classes: Sequence[int], *, repeats: int, json_file: str | None) -> str:
    """Measure every number of classes by both ways; the table. Writes all numbers as JSON where a file is named.

    The dense way is left out where it would need more than half of the memory that is free.
    """
    _check(sizes, classes, repeats)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, list[dict[str, Any]]] = {}
    for make in _MEASURED:
        for count in sorted(set(classes)):
            way = make(sizes, count, device)
            results.setdefault(way.name, []).append({"classes": count, **_measure(way, device, repeats)})
    summary = {
        "sizes": asdict(sizes),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "repeats": repeats,
        "results": results,
    }
    if json_file is not None:
        with disk_errors(Path(json_file)):
            Path(json_file).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return table(summary)


def _measure(way: Way, device: torch.device, repeats: int) -> dict[str, Any]:
    """Times and peaks of the ways, in turns after a round that warms up, and how far ours is off."""
    ways = {"ours": way.ours}
    absent = way.dense_bytes > free_bytes(device) // 2
    if not absent:
        ways["dense"] = way.dense
    rounds = [{name: timed(work, device)[0] for name, work in ways.items()} for _ in range(repeats + 1)]
    found: dict[str, Any] = {f"{name}_ms": median(r[name] for r in rounds[1:]) for name in ways}
    found |= {f"{name}_mib": peak_over_inputs(work, device) for name, work in ways.items()}
    if absent:
        return found | {"dense_gib": way.dense_bytes / 2**30}
    differences = way.differences(copy.deepcopy(way.ours()), way.dense())
    smaller = found["dense_mib"] / found["ours_mib"] if found["ours_mib"] else None
    return found | {
        "faster": found["dense_ms"] / found["ours_ms"],
        "smaller": smaller,
        "differences": differences,
    }


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now; on a CPU by the kernel's own estimate (Linux)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def table(summary: dict[str, Any]) -> str:
    """What `bench_classes` sums up, for people."""
    sizes, lines = summary["sizes"], []
    of_image = f": {sizes['size']}x{sizes['size']}, {sizes['queries']} queries, a budget of {sizes['budget']} MiB"
    titles = {
        "class terms": f"class cost, loss and gradients: {sizes['images']} images, {sizes['layers']} layers, "
        f"{sizes['queries']} queries of {sizes['width']} channels, {sizes['segments']} segments",
        "inference": "semantic inference, every class looked at" + of_image,
        "inference, sure": "semantic inference, every query sure of a class or of none" + of_image,
    }
    for name, rows in summary["results"].items():
        lines.append(f"{titles[name]} · {summary['device']} · median of {summary['repeats']}")
        lines.append("".join(f"{title:>11}" for title, _, _ in _COLUMNS) + "  off the dense way")
        for row in rows:
            lines.append("".join(f"{_cell(row.get(key), form):>11}" for _, key, form in _COLUMNS) + f"  {_off(row)}")
    lines.append("faster, smaller: against the dense way, which keeps all logits, or K x H x W scores")
    return "\n".join(lines)


def _off(row: dict[str, Any]) -> str:
    if "dense_gib" in row:
        return f"not measured: it keeps {row['dense_gib']:.0f} GiB at the least"
    return ", ".join(f"{name} {value:.0e}" for name, value in row["differences"].items())


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form.removesuffix("x")) + "x" * form.endswith("x")


def _check(sizes: Sizes, classes: Sequence[int], repeats: int) -> None:
    given = {**asdict(sizes), "classes": min(classes, default=0), "repeats": repeats}
    wrong = [f"--{name} {value}" for name, value in given.items() if value < 1]
    if wrong:
        raise UserError(f"sizes must be at least 1: {', '.join(wrong)}", where="mf-scale bench classes")
