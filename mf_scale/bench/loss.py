"""`mf-scale bench loss`: time by stage, peak memory and agreement of every way to the training loss, in one process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mf_scale.bench.contestants import Contestant, contestants, dense_targets, leaf_copy
from mf_scale.bench.memory import peak_over_inputs
from mf_scale.data.batch import Batch
from mf_scale.errors import UserError
from mf_scale.models.outputs import LayerPrediction, MaskPrediction


@dataclass(frozen=True)
class Shape:
    """What is measured; the defaults are those of the published comparison on a CPU."""

    images: int = 2
    queries: int = 100
    segments: int = 15
    """Of each image."""
    cells: int = 128
    """h and w, of the mask logits."""
    size: int = 512
    """H and W, of the segment map."""
    layers: int = 6
    """Supervised decoder layers."""
    channels: int = 256
    classes: int = 150


def bench_loss(shape: Shape, *, repeats: int, reference: bool, json_file: str | None) -> str:
    """Measure and compare; the table. Writes the same as JSON where a file is named. Raises UserError."""
    _check(shape, repeats)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prediction, batch = make_inputs(shape, device)
    found, absent = contestants(shape.classes, shape.queries, device, reference=reference)
    dense_targets(batch)
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(repeats + 1):  # alternating; the first round warms up and is left out
        rounds.append({c.name: _times(c, prediction, batch, device) for c in found})
    results: dict[str, dict[str, Any]] = {}
    truth = _values(found[0], prediction, batch)
    for c in found:
        stages = {stage: median(r[c.name][stage] for r in rounds[1:]) for stage in rounds[0][c.name]}
        work = _work(c, prediction, batch)
        results[c.name] = {
            **stages,
            "peak_mib": median(peak_over_inputs(work, device) for _ in range(3)),
            **_differences(_values(c, prediction, batch), truth),
        }
    summary = {
        "shape": asdict(shape),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "repeats": repeats,
        "absent": absent,
        "results": results,
    }
    if json_file is not None:
        _write(Path(json_file), json.dumps(summary, indent=1))
    return _table(summary)


def make_inputs(shape: Shape, device: torch.device, seed: int = 0) -> tuple[MaskPrediction, Batch]:
    """A random prediction whose mask logits have a spread of about 3, and maps of patches, one segment each."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator) * scale).to(device)

    B, Q, C, T = shape.images, shape.queries, shape.channels, shape.segments
    layers = [
        LayerPrediction(normal(B, Q, shape.classes + 1), normal(B, Q, C, scale=3 / C**0.5)) for _ in range(shape.layers)
    ]
    pixels = normal(B, C, shape.cells, shape.cells)
    grid = max(2, round((2 * T) ** 0.5))
    patches = torch.randint(0, max(T, 1), (B, 1, grid, grid), generator=generator)
    patches.view(B, -1)[:, :T] = torch.arange(T)[: grid * grid]
    places = torch.arange(shape.size) * grid // shape.size
    segment_map = (patches if T else patches - 1)[..., places[:, None], places].to(torch.int16).to(device)
    labels = torch.randint(0, shape.classes, (B, T), generator=generator).to(device)
    images = torch.zeros(B, 3, 1, 1, dtype=torch.uint8, device=device)
    batch = Batch(images, segment_map, labels, torch.zeros_like(labels), [f"image-{b}" for b in range(B)])
    last = layers[-1]
    return MaskPrediction(last.class_logits, last.mask_embeddings, pixels, tuple(layers[:-1])), batch


def _times(contestant: Contestant, prediction: MaskPrediction, batch: Batch, device: torch.device) -> dict[str, float]:
    """Milliseconds of the matching alone (in the forward again), of the forward and of the backward."""
    times = {}
    if contestant.matching is not None:
        matching = contestant.matching
        times["matching_ms"], _ = _timed(lambda: matching(prediction, batch), device)
    leaves = leaf_copy(prediction)
    times["forward_ms"], total = _timed(lambda: contestant.loss(leaves, batch), device)
    times["backward_ms"], _ = _timed(total.backward, device)
    times["total_ms"] = times["forward_ms"] + times["backward_ms"]
    return times


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3, result


def _work(contestant: Contestant, prediction: MaskPrediction, batch: Batch) -> Callable[[], None]:
    leaves = leaf_copy(prediction)
    for tensor in _leaves(leaves):
        tensor.grad = torch.zeros_like(tensor)  # the gradients of the inputs are inputs too, written before the measure

    def work() -> None:
        contestant.loss(leaves, batch).backward()

    return work


def _leaves(prediction: MaskPrediction) -> list[Tensor]:
    by_layer = [tensor for x in prediction.layers() for tensor in (x.class_logits, x.mask_embeddings)]
    return [*by_layer, prediction.pixel_embeddings]


def _values(contestant: Contestant, prediction: MaskPrediction, batch: Batch) -> tuple[float, list[Tensor]]:
    leaves = leaf_copy(prediction)
    total = contestant.loss(leaves, batch)
    return float(total.detach()), list(torch.autograd.grad(total, _leaves(leaves)))


def _differences(got: tuple[float, list[Tensor]], wanted: tuple[float, list[Tensor]]) -> dict[str, float]:
    """Relative difference of the loss, and the largest one of any gradient over that gradient's maximum."""
    gradients = [
        float((g - w).abs().max() / w.abs().max().clamp(min=1e-30)) for g, w in zip(got[1], wanted[1], strict=True)
    ]
    return {"loss": got[0], "loss_difference": abs(got[0] / wanted[0] - 1), "gradient_difference": max(gradients)}


def _table(summary: dict[str, Any]) -> str:
    results = summary["results"]
    peer = results.get("transformers")
    shape = summary["shape"]
    lines = [
        f"{shape['images']} images, {shape['queries']} queries, {shape['segments']} segments, "
        f"{shape['cells']}->{shape['size']}, {shape['layers']} layers, from the embeddings · {summary['device']} · "
        f"median of {summary['repeats']}",
        f"{'':<18}{'matching':>10}{'forward':>10}{'backward':>10}{'total ms':>10}{'peak MiB':>10}"
        f"{'faster':>9}{'smaller':>9}{'loss off':>10}{'grad off':>10}",
    ]
    for name, r in results.items():
        matching = f"{r['matching_ms']:.1f}" if "matching_ms" in r else "-"
        faster = f"{peer['total_ms'] / r['total_ms']:.1f}x" if peer else "-"
        smaller = f"{peer['peak_mib'] / r['peak_mib']:.1f}x" if peer and r["peak_mib"] else "-"
        lines.append(
            f"{name:<18}{matching:>10}{r['forward_ms']:>10.1f}{r['backward_ms']:>10.1f}{r['total_ms']:>10.1f}"
            f"{r['peak_mib']:>10.1f}{faster:>9}{smaller:>9}{r['loss_difference']:>10.1e}"
            f"{r['gradient_difference']:>10.1e}"
        )
    lines.append("forward contains the matching; faster and smaller: against transformers; off: against the first row")
    if summary["absent"]:
        lines.append(f"not measured: {summary['absent']}")
    return "\n".join(lines)


def _check(shape: Shape, repeats: int) -> None:
    wrong = [f"--{name} {value}" for name, value in asdict(shape).items() if value < (name != "segments")]
    if wrong or repeats < 1:
        raise UserError(f"sizes must be at least 1: {', '.join(wrong) or '--repeats'}", where="mf-scale bench loss")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the results cannot be written: {error.strerror}", where=str(file)) from error
