"""What an evaluation leaves: JSON and pictures in the report folder, an event, a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mf_scale.distributed import comm
from mf_scale.evaluation.bands import PER_CLASS, mean_of
from mf_scale.evaluation.looking import Shown
from mf_scale.evaluation.troubles import named_trouble
from mf_scale.rundir import RunDir, disk_errors, read_json, write_atomically
from mf_scale.tracking.metrics import EVALUATION_NUMBERS, MetricsLog
from mf_scale.tracking.pictures import write_bytes, write_class_map, write_png
from mf_scale.vocabulary import BANDS

_SEMANTIC_COLUMNS = {"mIoU": "mIoU", "pixel_accuracy": "pixel acc.", "mean_accuracy": "mean acc."}
_INSTANCE_COLUMNS = ("AP", "AP50", "AP75", "APr", "APc", "APf")


@dataclass(frozen=True)
class Evaluation:
    """Results of one split; `pictures` holds this rank's part."""

    results: dict[str, Any]
    pictures: list[Shown] = field(default_factory=list)


def make_room(run: RunDir, split: str) -> None:
    """The report folder, where a file can be written: that none can is found before the work."""
    trial = run.report / f".{split}-trial"
    write_bytes(trial, b"can be written")
    with disk_errors(trial):
        trial.unlink(missing_ok=True)


def write_evaluation(
    run: RunDir, evaluation: Evaluation, *, step: int, write: Callable[[Path, str], None] = write_atomically
) -> dict[str, Any]:
    """Write RUN/report/evaluation-SPLIT.json and its pictures; what stands in it. Called by all ranks.

    `write` puts the text into the file, whole or not at all. The pictures of the evaluation before go last: whenever
    somebody looks, or the process ends, those that the JSON names are there.
    """
    split = evaluation.results["split"]
    mine = comm.together(lambda: [_write_pictures(run.report, f"{split}-{step}", one) for one in evaluation.pictures])
    gathered = comm.gather_objects(mine)

    def put() -> dict[str, Any]:
        pictures = sorted((p for part in gathered or [] for p in part), key=_picture_order)
        results = {"step": step, **evaluation.results, "pictures": pictures}
        run.report.mkdir(parents=True, exist_ok=True)
        write(run.report / f"evaluation-{split}.json", json.dumps(results, indent=1))
        _remove_others(run.report, split, pictures)
        return results

    return dict(comm.on_first_rank(put))


def _write_pictures(folder: Path, start: str, shown: Shown) -> dict[str, Any]:
    """Write the views of one sample under names with this start; what the JSON tells of them."""
    files = []
    with named_trouble(lambda: f"sample {shown.key}", where=str(folder), remedy="Evaluate the run again."):
        for title, picture in shown.views:
            name = f"{start}-{shown.choice.position:02d}-{title.replace(', ', '-').replace(' ', '-')}.png"
            write_png(folder / name, picture)
            view = {"title": title, "file": name}
            if title in shown.maps:
                view["classes"] = f"{name.removesuffix('.png')}-classes.png"
                write_class_map(folder / view["classes"], shown.maps[title])
            files.append(view)
    return {**asdict(shown.choice), "key": shown.key, "views": files}


def _remove_others(folder: Path, split: str, pictures: Sequence[dict[str, Any]]) -> None:
    """Remove the split's pictures that are not of these."""
    views = [view for picture in pictures for view in picture["views"]]
    named = {view[kind] for view in views for kind in ("file", "classes") if kind in view}
    with disk_errors(folder):
        for file in folder.glob(f"{split}-[0-9]*.png"):
            if file.name not in named:
                file.unlink(missing_ok=True)


def save_evaluation(run: RunDir, evaluation: Evaluation, *, step: int) -> None:
    """The same, and the `evaluation` event, for an evaluation that no training is around."""
    results = write_evaluation(run, evaluation, step=step)

    def write() -> None:
        log = MetricsLog(run.metrics)
        log.write("evaluation", step, **event_numbers(results), where="command")
        log.close()

    comm.on_first_rank(write)


def event_numbers(results: dict[str, Any]) -> dict[str, Any]:
    """What the `evaluation` event says of results."""
    return {name: results[name] for name in EVALUATION_NUMBERS}


def _picture_order(picture: dict[str, Any]) -> tuple[int, int]:
    return ("first", "best", "median", "worst").index(picture["why"]), picture["position"]


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """The numbers of splits for a terminal, a line each, in percent; empty without a split."""
    rows = [_cells(one) for one in results]
    if not rows:
        return ""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    return _aligned([heads, *([row.get(head, "-") for head in heads] for row in rows)])


def bands_table(results: dict[str, Any]) -> str:
    """A line a frequency band: its classes, those that the split holds, the means over these; empty without bands."""
    if "bands" not in results:
        return ""
    of_class, lines = results["bands"]["of_class"], []
    numbers = {name: place for name, place in PER_CLASS.items() if place[0] in results}
    values = {name: results[part]["per_class"][value] for name, (part, value) in numbers.items()}
    for band in (*BANDS, None, "all"):
        members = [label for label, of in enumerate(of_class) if band in (of, "all")]
        if members or band is not None:
            held = sum(any(of[label] is not None for of in values.values()) for label in members)
            means = [_percent(mean_of(of, members)) for of in values.values()]
            lines.append([band or "no band", f"{len(members):,}", f"{held:,}", *means])
    return _aligned([["band", "classes", "in split", *numbers], *lines])


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)


def run_table(run: RunDir) -> str:
    """The table of all splits that `evaluate` has left in a run."""
    return results_table([read_json(file) for file in sorted(run.report.glob("evaluation-*.json"))])


def _cells(results: dict[str, Any]) -> dict[str, str]:
    cells = {"split": results["split"], "images": f"{results['samples']:,}"}
    if "semantic" in results:
        cells |= {name: _percent(results["semantic"][key]) for key, name in _SEMANTIC_COLUMNS.items()}
    if "panoptic" in results:
        cells |= {name: _percent(results["panoptic"]["all"][name]) for name in ("PQ", "SQ", "RQ")}
        cells |= {f"PQ {group}": _percent(results["panoptic"][group]["PQ"]) for group in ("things", "stuff")}
    if "instances" in results:
        numbers = {name: results["instances"][name] for name in _INSTANCE_COLUMNS if name in results["instances"]}
        cells |= {name: _percent(value) for name, value in numbers.items()}
    return cells | {"images/s": f"{results['images_per_second']:.2f}"}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
