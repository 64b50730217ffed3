"""`mf-scale bench loss`: time by stage, peak memory and agreement of every way to the training loss, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mf_scale.bench import floor
from mf_scale.bench.contestants import Contestant, contestants, leaf_copy, leaves, plain, value_and_gradients
from mf_scale.bench.inputs import Shape, make_inputs
from mf_scale.bench.launches import count_launches, count_syncs
from mf_scale.bench.memory import peak_over_inputs
from mf_scale.bench.table import table
from mf_scale.bench.timing import timed
from mf_scale.errors import UserError
from mf_scale.models.outputs import MaskPrediction

SMALL = Shape(images=2, queries=12, segments=5, cells=12, size=48, layers=3, channels=16, classes=9)
"""Where the plain reference in fp64 is the truth: it takes seconds a picture at the size of training."""


def bench_loss(shape: Shape, *, repeats: int, reference: bool, json_file: str | None) -> str:
    """Measure and compare; the table. Writes the same as JSON where a file is named. Raises UserError."""
    _check(shape, repeats)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prediction, batch = make_inputs(shape, device)
    found, absent = contestants(shape.classes, shape.queries, batch, reference=reference)
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(repeats + 1):  # alternating; the first round warms up and is left out
        rounds.append({c.name: _times(c, prediction, device) for c in found})
    results: dict[str, dict[str, Any]] = {}
    for c in found:
        stages = {stage: median(r[c.name][stage] for r in rounds[1:]) for stage in rounds[0][c.name]}
        work = _work(c, prediction)
        results[c.name] = {**stages, "peak_mib": median(peak_over_inputs(work, device) for _ in range(3))}
        if device.type == "cuda":
            results[c.name] |= {"launches": count_launches(work), "syncs": count_syncs(work)}
    truth = _agreement(found, prediction, results)
    _agreement_on_a_small_shape(device, results, reference=reference)
    _ratios(results)
    summary = {
        "shape": asdict(shape),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "repeats": repeats,
        "truth": truth,
        "small_shape": asdict(SMALL),
        "absent": absent,
        "results": results,
    }
    if device.type == "cuda":
        summary["floor"] = _against_the_floor(shape, device, results)
    if json_file is not None:
        _write(Path(json_file), json.dumps(summary, indent=1))
    return table(summary)


def _times(contestant: Contestant, prediction: MaskPrediction, device: torch.device) -> dict[str, float]:
    """Milliseconds by stage, each waited for; the forward as a whole, which waits only once; the backward."""
    times = {}
    if contestant.stages is not None:
        parts, own = contestant.stages, leaf_copy(prediction)
        times["cost_ms"], cost = timed(lambda: parts.cost(own), device)
        times["solve_ms"], pairs = timed(lambda: parts.solve(cost), device)
        times["loss_ms"], _ = timed(lambda: parts.loss(own, pairs), device)
        del cost, pairs
    elif contestant.matching is not None:
        matching = contestant.matching
        times["matching_ms"], _ = timed(lambda: matching(prediction), device)
    own = leaf_copy(prediction)
    times["forward_ms"], total = timed(lambda: contestant.loss(own), device)
    times["backward_ms"], _ = timed(lambda: torch.autograd.grad(total, leaves(own)), device)
    times["total_ms"] = times["forward_ms"] + times["backward_ms"]
    if contestant.stages is not None:
        times["without_solve_ms"] = times["cost_ms"] + times["loss_ms"] + times["backward_ms"]
    return times


def _work(contestant: Contestant, prediction: MaskPrediction) -> Callable[[], None]:
    """Forward and backward that add to gradients made before: they are as large as the inputs, and inputs too."""
    own = leaf_copy(prediction)
    for tensor in leaves(own):
        tensor.grad = torch.zeros_like(tensor)
    return lambda: contestant.loss(own).backward()


def _agreement(found: list[Contestant], prediction: MaskPrediction, results: dict[str, dict[str, Any]]) -> str:
    """Differences on the measured shape, to the peer or, where it is absent, to eager; its name."""
    (eager,) = (c for c in found if c.name == "mf_scale eager")
    truth = next((c for c in found if c.name == "transformers"), eager)
    wanted = value_and_gradients(truth, prediction)
    for c in found:
        results[c.name] |= differences(value_and_gradients(c, prediction), wanted)
    return truth.name


def _agreement_on_a_small_shape(device: torch.device, results: dict[str, dict[str, Any]], *, reference: bool) -> None:
    """Differences to the plain reference in fp64."""
    prediction, batch = make_inputs(SMALL, device)
    sizes = (SMALL.classes, SMALL.queries, batch)
    wanted = value_and_gradients(plain(*sizes), prediction, torch.float64)
    for c in contestants(*sizes, reference=reference)[0]:
        results[c.name]["small"] = differences(value_and_gradients(c, prediction), wanted)


def differences(got: tuple[float, list[Tensor]], wanted: tuple[float, list[Tensor]]) -> dict[str, float]:
    """Relative difference of the loss, and the largest one of any gradient over that gradient's maximum."""
    gradients = [
        float((g - w).abs().max() / w.abs().max().clamp(min=1e-30)) for g, w in zip(got[1], wanted[1], strict=True)
    ]
    return {
        "loss": got[0],
        "loss_difference": abs(got[0] / wanted[0] - 1),
        "gradient_difference": max(gradients, default=0.0),
    }


def _ratios(results: dict[str, dict[str, Any]]) -> None:
    """How many times faster and smaller than the peer, where it is there."""
    peer = results.get("transformers")
    for r in results.values() if peer else ():
        r["faster"] = peer["total_ms"] / r["total_ms"]  # type: ignore[index]
        r["smaller"] = peer["peak_mib"] / r["peak_mib"] if r["peak_mib"] else None  # type: ignore[index]


def _against_the_floor(shape: Shape, device: torch.device, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What this device needs at the least, by its own rates; adds the achieved fraction to the results in stages."""
    sizes = {name: value for name, value in asdict(shape).items() if name != "classes"}
    todo = floor.work(**sizes)
    try:
        ceilings = floor.measure_ceilings(device)
    except Exception as error:  # no run-time compiler, too little memory: the rest of the table stands
        return {**todo._asdict(), "absent": f"{type(error).__name__} {' '.join(str(error).split())[:200]}"}
    least = floor.floor_ms(todo, ceilings)
    for r in results.values():
        if "without_solve_ms" in r:
            r["of_floor"] = floor.achieved(least, r["without_solve_ms"])
    return {**todo._asdict(), **ceilings._asdict(), "floor_ms": least}


def _check(shape: Shape, repeats: int) -> None:
    wrong = [f"--{name} {value}" for name, value in asdict(shape).items() if value < (name != "segments")]
    if wrong or repeats < 1:
        raise UserError(f"sizes must be at least 1: {', '.join(wrong) or '--repeats'}", where="mf-scale bench loss")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the results cannot be written: {error.strerror}", where=str(file)) from error
