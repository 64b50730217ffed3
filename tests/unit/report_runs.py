"""Runs for tests of the report: everything a training and its evaluations can tell, made by line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mf_scale.evaluation.metrics import PanopticCounts, SemanticCounts
from mf_scale.rundir import RunDir
from mf_scale.tracking.pictures import Segmentation, draw_segments, plain, write_png
from mf_scale.tracking.report.data import SourceCounts
from tests.unit.histories import Maker

EVIL = "<script>alert(1)</script>"
PHASES = {"data": 0.02, "forward": 0.11, "loss": 0.06, "backward": 0.21, "optimizer": 0.05, "other": 0.01}


def step_values(step: int, *, layers: int = 6) -> dict[str, Any]:
    """What a line of a step tells beside what `Maker.steps` does."""
    wave = np.random.default_rng(step).normal(1.0, 0.04, 8)
    fall = 8.0 / (1 + step / 40)
    terms = {"class": 1.0, "focal": 0.6, "dice": 0.9}
    phases = {name: seconds * float(wave[i]) for i, (name, seconds) in enumerate(PHASES.items())}
    return {
        "loss": fall * float(wave[0]),
        **{f"loss_{name}": fall * share / 2.5 * float(wave[0]) for name, share in terms.items()},
        "loss_layers": {
            name: [fall * share / 15 * (1.6 - 0.1 * i) for i in range(layers)] for name, share in terms.items()
        },
        "phases": phases,
        "step_time": sum(phases.values()),
        "data_wait": phases["data"],
        "images_per_second": 8 / sum(phases.values()),
        "memory": {"device_peak_gib": 61.5 + float(wave[1]), "host_rss_gib": 9.0 + step / 900},
        "matched": 70 * float(wave[2]),
        "grad_norm": 6 * float(wave[3]),
        "lr": 1e-4 * (1 - step / 1000),
    }


class RichMaker(Maker):
    """A `Maker` whose steps tell everything."""

    def rich_steps(self, to: int, *, every: int = 5, seconds: float = 2.0) -> None:
        """Steps up to `to`, with a full line every so many."""
        for step in range(self.step + 1, to + 1):
            self.step, self.time = step, self.time + seconds
            if step % every == 0:
                self.line("step", step, updates=step, **step_values(step))
                if step % 50 == 0:
                    self.line("validation", step, loss=9 / (1 + step / 60))
        self.slot(first=self.began + seconds)


def troubled_run(folder: Path, *, steps: int = 500) -> RunDir:
    """A run with restarts, a jump of the loss, stragglers, skipped steps, quarantine, evaluations during training."""
    maker = RichMaker(folder)
    quarter = steps // 4
    maker.launched("4711", 0, *(f"node{i}" for i in range(6)), ranks=48)
    maker.begun(0, job="4711", restart=0, hosts=["node0"], versions={"torch": "9.9", "mf_scale": "0.1.0"})
    maker.rich_steps(quarter)
    maker.saved()
    maker.line("evaluation", maker.step, split="val", where="training", samples=64, mIoU=0.21, PQ=0.12, AP=0.05)
    maker.rich_steps(quarter + 30)
    maker.script_ended("4711", 0, 137, f"a rank {EVIL} was killed by signal 9", "requeued")
    maker.passed(240)
    maker.launched("4711", 1, "node0", "node7", ranks=48)
    maker.begun(quarter, job="4711", restart=1, versions={"torch": "9.9", "mf_scale": "0.1.0"})
    maker.rich_steps(2 * quarter)
    maker.saved()
    maker.line("evaluation", maker.step, split="val", where="training", samples=64, mIoU=0.34, PQ=0.22, AP=0.11)
    for step in (maker.step + 3, maker.step + 9):
        maker.line(
            "straggler",
            step,
            rank=17,
            host="node2",
            phase="data",
            seconds=0.412,
            median=0.021,
            own=0.5,
            own_median=0.2,
            cost=0.3,
        )
    maker.line("straggler", maker.step + 9, rank=40, host="node5", phase="backward", seconds=0.6, median=0.2)
    bad = [{"rank": 3, "micro_batch": 0, "terms": ["dice"], "keys": [EVIL, "000000000724", "000000001000"]}]
    maker.line("skipped", maker.step + 11, in_a_row=1, reason="loss", ranks=bad, groups=["backbone"])
    maker.line("skipped", maker.step + 12, in_a_row=2, reason="gradients", ranks=bad, groups=["rest"])
    for i in range(3):
        maker.line("quarantine", maker.step + 13, source="s", shard="train-000003.tar", key=f"{EVIL}{i}", offset=0,
                   reason="the image is cut short", replaced_by="000000002153")  # fmt: skip
    maker.rich_steps(2 * quarter + 40)
    maker.line("rollback", maker.step, spike=maker.step, to=2 * quarter, skipped=10, keys=["a"])
    maker.begun(2 * quarter, job="4711", restart=1, versions={"torch": "9.9", "mf_scale": "0.1.0"})
    maker.line("save_failed", maker.step, reason="the disk is full")
    maker.line("evaluation_failed", maker.step, reason="a sample does not decode")
    maker.line("save_slow", maker.step, seconds=900.0, ranks=[1, 2, 3, 4, 5, 6])
    maker.rich_steps(steps)
    maker.saved()
    maker.line("evaluation", maker.step, split="val", where="command", samples=64, mIoU=0.41, PQ=0.3, AP=0.16)
    maker.stopped("done", 0)
    return maker.run


def class_names(count: int) -> list[str]:
    """Names such as vocabularies have them, some of them hostile."""
    hard = [EVIL, "a\"b'c", "c & d", "_hidden", "$x$ & $y", "Ein-sehr-langes-Wort-ohne-jede-Lücke-" * 2]
    return [*hard, *(f"class {i}" for i in range(len(hard), count))][:count]


def evaluated(
    run: RunDir, split: str = "val", *, classes: int = 80, task: str = "panoptic", pictures: int = 1,
    bands: bool = True, step: int = 500, better: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """Leave an evaluation of `split` in the run; returns what stands in its file. `better`: share of errors mended."""
    generator = np.random.default_rng(7)
    names, things = class_names(classes), [i % 2 == 0 for i in range(classes)]
    semantic, panoptic = SemanticCounts(classes), PanopticCounts(classes, things)
    truth = generator.integers(0, classes, (max(60, classes // 20), 80))
    right = generator.random(truth.shape) < (np.linspace(0.0, 1.0, classes) ** 0.7)[truth] + better
    found = np.where(right, truth, (truth + 1) % classes)
    semantic.update(found, truth)
    if classes <= 500:
        panoptic.update(found, range(classes), truth, range(classes), [False] * classes)
    ap = [round(float(v), 3) if thing else None for v, thing in zip(generator.random(classes), things, strict=True)]
    known = [value for value in ap if value is not None]
    mean = sum(known) / len(known)
    results: dict[str, Any] = {
        "step": step, "split": split, "task": task, "samples": 5, "mIoU": None, "PQ": None, "AP": None,
        "class_names": names, "things": things, "images_per_second": 5.0,
    }  # fmt: skip
    if task != "instance":
        results |= {"semantic": semantic.results(), "mIoU": semantic.results()["mIoU"]}
        pairs = [k for k in range(classes) if k + 1 < classes][:50]
        results["confusions"] = [
            {"truth": k, "predicted": k + 1, "pixels": 1000 - k, "share": 0.9 - 0.01 * k} for k in pairs
        ]
    if task != "semantic":
        results |= {"panoptic": panoptic.results(), "PQ": panoptic.results()["all"]["PQ"]}
        results |= {"AP": mean}
        numbers = {"AP": mean, "AP50": 0.5, "AP75": 0.2, "APs": 0.1, "APm": 0.2, "APl": 0.4, "federated": True}
        per_class = {"AP": ap, "instances": [3] * classes}
        results["instances"] = {**numbers, "boundary": {"AP": 0.111}, "per_class": per_class}
    if bands:
        of_class = [("rare", "common", "frequent")[i * 3 // classes] for i in range(classes)]
        band = {"classes": classes // 3, "mIoU": 0.2, "PQ": 0.1, "AP": 0.05}
        results["bands"] = {"of_class": of_class, "rare": band, "common": band, "frequent": {**band, "mIoU": 0.7}}
    results |= {"pictures": _draw(run, split, pictures, names), "picture_score": "PQ"}
    run.report.mkdir(parents=True, exist_ok=True)
    (run.report / f"evaluation-{split}.json").write_text(json.dumps(results))
    return results


def _draw(run: RunDir, split: str, pictures: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """`pictures` of each kind."""
    image = np.random.default_rng(1).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    half = Segmentation((np.arange(80) >= 40).astype(int)[None].repeat(60, axis=0), np.array([1, 3]))
    told = []
    for number, why in enumerate(("first", "best", "median", "worst") * pictures):
        views = []
        for title, picture in (("image", plain(image)), ("ground truth", draw_segments(image, half, names))):
            file = f"{split}-{number:02d}-{title.replace(' ', '-')}.png"
            write_png(run.report / file, picture)
            views.append({"title": title, "file": file})
        told.append({"position": number, "key": f"k&{EVIL}{number}", "why": why, "score": number / 9, "views": views})
    return told


def counted(classes: int = 80) -> list[SourceCounts]:
    """Counts of two training sources, and one that could not be read."""
    images = [int(20_000 / (1 + k)) for k in range(classes)]
    segments = {n: 1000 - 20 * n for n in range(1, 40)}
    sizes = {(480, 640): 9000, (640, 480): 3000, (426, 640): 800, **{(300 + i, 500): 7 for i in range(40)}}
    values: dict[str, Any] = {
        "samples": 20_000, "shards": 12, "bytes": 5 << 30, "vocabulary": EVIL, "kind": "panoptic",
        "class_names": class_names(classes), "class_images": images, "segments": segments, "sizes": sizes,
    }  # fmt: skip
    return [SourceCounts("data/a", **values), SourceCounts("data/<b>", weight=3.0, **values)]
