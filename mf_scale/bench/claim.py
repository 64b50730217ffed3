"""The paper's claim on data of one's own: three kinds of model, alike in all but the head and its loss, several seeds.

A seed is a partition of the images, an initialisation and an order of the samples, the same for all kinds, so that they
are compared in pairs. What is finished is not done again, what was cut off goes on from its own checkpoints.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mf_scale.bench.claim_split import Bands, make_split, open_pool, pool_digest
from mf_scale.bench.claim_table import claim_table, summarise
from mf_scale.config.load import config_to_dict, is_overridden, load_config
from mf_scale.config.schema import Config
from mf_scale.config.validate import check_vocabulary, plan_batch, validate
from mf_scale.data.index import Index
from mf_scale.distributed.launch import launch
from mf_scale.errors import EXIT_FAULT, FaultError, StoppedOnRequest, UserError
from mf_scale.rundir import RunDir, disk_errors, read_json, write_atomically
from mf_scale.tracking.metrics import read_metrics

KINDS = ("per_pixel", "per_pixel_plus", "mask_classification")
"""Of model, the plainest first: the others are compared with it."""
SPLITS = ("train", "val")
_OWN = ("run_dir", "seed", "data.train", "data.val", "data.sources", "model.kind")
"""Keys that the experiment sets itself."""
_PLAN = "experiment.json"


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    config: str
    overrides: Sequence[str]
    sources: Sequence[str]
    folder: Path
    seeds: Sequence[int]
    held_out: int
    bands: Bands
    rates: Sequence[float]
    """Learning rates beside the configuration's own, each tried with the first seed."""
    processes: int
    minutes: float
    """That one training or evaluation may take."""


@dataclass(frozen=True)
class Cell:
    """One training."""

    kind: str
    seed: int
    rate: float

    def run(self, folder: Path) -> RunDir:
        """Its run directory."""
        return RunDir(folder / f"seed-{self.seed}" / f"{self.kind}-lr-{self.rate:g}")


def run_claim(asked: Asked, stops: list[str]) -> str:
    """Train and evaluate what is not there yet; the table.

    It stands in FOLDER/claim.md, and all numbers in claim.json, from the first finished run on. `stops` is the live
    list of stop signals. Raises UserError, FaultError where a run took too long, and StoppedOnRequest; the same
    command goes on.
    """
    config = _configuration(asked)
    pool = open_pool(asked.sources)
    _check(asked, config, pool)
    models = {kind: _model(config, kind) for kind in KINDS}
    _keep_plan(asked, config, pool)
    text = ""
    for cell in cells(asked, config.optimizer.lr):
        sources = asked.folder / f"seed-{cell.seed}" / "data"
        sources.parent.mkdir(parents=True, exist_ok=True)
        make_split(pool, sources, seed=cell.seed, held_out=asked.held_out, bands=asked.bands)
        _train_and_evaluate(cell, asked, config, sources, stops)
        text = _write(asked, config, models)
    return text


def cells(asked: Asked, rate: float) -> list[Cell]:
    """All kinds of one seed after another, so that whatever is there compares; then the other learning rates."""
    own = [Cell(kind, seed, rate) for seed in asked.seeds for kind in KINDS]
    return own + [Cell(kind, asked.seeds[0], other) for other in asked.rates if other != rate for kind in KINDS]


def _configuration(asked: Asked) -> Config:
    given = [key for key in _OWN if is_overridden(asked.overrides, key)]
    if given:
        raise UserError(f"{given[0]} is set by the experiment itself", where="command line", remedy="Leave it out.")
    config = load_config(asked.config, asked.overrides)
    if config.data.task != "semantic":
        raise UserError("the per-pixel models need data.task=semantic", where=asked.config)
    return config


def _check(asked: Asked, config: Config, pool: Sequence[Index]) -> None:
    samples, where = sum(index.samples for index in pool), ", ".join(asked.sources)
    if not 0 < asked.held_out < samples:
        raise UserError(f"{asked.held_out} of {samples} samples cannot be held out", where="--held-out")
    if asked.bands.rare >= asked.bands.common:
        raise UserError("a class is common from more images on than it is rare up to", where="--rare, --common")
    if len(set(asked.seeds)) < len(asked.seeds) or min(asked.seeds) < 0:
        raise UserError("seeds are whole numbers from 0, each named once", where="--seeds")
    if not all(0 < rate < math.inf for rate in asked.rates):
        raise UserError("a learning rate is a number above 0", where="--rates")
    check_vocabulary(config, pool[0].packed, where=where)
    plan_batch(config, asked.processes)
    for kind in KINDS:  # all of it before the first of them is trained
        data = replace(config.data, train=asked.sources[0], val=asked.sources[0])
        validate(replace(config, data=data, model=replace(config.model, kind=kind)))


def _keep_plan(asked: Asked, config: Config, pool: Sequence[Index]) -> None:
    """Hold the folder to one experiment: what makes its runs comparable is written down, and must stay."""
    told = config_to_dict(config)
    told["run_dir"] = told["seed"] = None
    plan = {"config": told, "sources": pool_digest(pool), "held_out": asked.held_out, "bands": asdict(asked.bands)}
    file = asked.folder / _PLAN
    if file.exists():
        found = read_json(file)
        differing = sorted(set(_differing(found, plan, "")))
        if differing:
            raise UserError(
                f"the folder holds an experiment with another {', '.join(differing[:5])}",
                where=str(file),
                remedy="Take another --folder: its runs would not compare with these.",
            )
        return
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(plan, indent=1))


def _differing(found: Any, wanted: Any, name: str) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in found.keys() | wanted.keys():
            yield from _differing(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield name.removeprefix("config.")


def _train_and_evaluate(cell: Cell, asked: Asked, config: Config, sources: Path, stops: list[str]) -> None:
    run = cell.run(asked.folder)
    missing = [split for split in SPLITS if _evaluation(run, split, config.train.steps) is None]
    if not missing:
        return
    print(f"seed {cell.seed}, {cell.kind}, lr {cell.rate:g}: {run.path}", flush=True)
    own = [f"run_dir={run.path}", f"seed={cell.seed}", f"model.kind={cell.kind}", f"optimizer.lr={cell.rate!r}"]
    own += [f"data.{name}={sources / name}" for name in SPLITS]
    _call(["train", asked.config, *asked.overrides, *own], asked, run, stops)
    for split in missing:
        _call(["evaluate", str(run.path), "--split", split], asked, run, stops)


def _call(arguments: Sequence[str], asked: Asked, run: RunDir, stops: list[str]) -> None:
    """One command of this program to its end, in processes of its own."""
    late: list[str] = []

    def ask() -> None:
        late.append(arguments[0])
        stops.append("SIGTERM")

    clock = threading.Timer(asked.minutes * 60, ask)
    clock.daemon = True
    clock.start()
    try:
        code = launch([*arguments, "--processes", str(asked.processes)], asked.processes, stops)
    finally:
        clock.cancel()
    if late and code:
        raise FaultError(
            f"{late[0]} took more than {asked.minutes:g} minutes",
            where=str(run.path),
            remedy="The same command goes on; --minutes allows more.",
        )
    if code and stops:
        raise StoppedOnRequest
    if code:
        kind, then = UserError, "Correct that first."
        if code == EXIT_FAULT:
            kind, then = FaultError, "The same command goes on."
        remedy = f"What it said stands above. {then}"
        raise kind(f"{arguments[0]} ended with exit code {code}", where=str(run.path), remedy=remedy)


def _evaluation(run: RunDir, split: str, steps: int) -> dict[str, Any] | None:
    """Results of a split after all steps, or None."""
    file = run.report / f"evaluation-{split}.json"
    results = read_json(file) if file.exists() else None
    return results if results is not None and results["step"] == steps else None


def _write(asked: Asked, config: Config, models: Mapping[str, Any]) -> str:
    """FOLDER/claim.json and claim.md of all that is finished; the table."""
    done = [told for cell in cells(asked, config.optimizer.lr) if (told := _told(cell, asked, config)) is not None]
    summary = summarise(done, config.optimizer.lr, models, asdict(asked.bands))
    text = claim_table(summary)
    write_atomically(asked.folder / "claim.json", json.dumps(summary, indent=1))
    write_atomically(asked.folder / "claim.md", f"{text}\n")
    return text


def _told(cell: Cell, asked: Asked, config: Config) -> dict[str, Any] | None:
    """What came out of a finished training, or None."""
    run = cell.run(asked.folder)
    found = {split: _evaluation(run, split, config.train.steps) for split in SPLITS}
    if None in found.values():
        return None
    steps = [record for record in read_metrics(run.metrics) if record["event"] == "step"]
    told: dict[str, Any] = {**asdict(cell), "loss": steps[-1]["loss"]}
    # The median: a shared machine has slow moments, and they say nothing of the model.
    told["step_seconds"] = float(np.median([record["step_time"] - record["data_wait"] for record in steps]))
    for split, results in found.items():
        told[split] = _numbers(results or {})
    return told


def _numbers(results: dict[str, Any]) -> dict[str, Any]:
    """mIoU, that of the classes that were trained on, pixel accuracy, and of each band mIoU and classes evaluated."""
    values, of_class = results["semantic"]["per_class"]["IoU"], results["bands"]["of_class"]
    seen = [v for v, band in zip(values, of_class, strict=True) if v is not None and band is not None]
    told = {"mIoU": results["mIoU"], "seen": sum(seen) / len(seen) if seen else None, "seen_classes": len(seen)}
    told["pixel_accuracy"], told["classes"] = results["semantic"]["pixel_accuracy"], results["semantic"]["classes"]
    for name, band in results["bands"].items():
        if name != "of_class":
            here = sum(v is not None for v, of in zip(values, of_class, strict=True) if of == name)
            told[name] = {"mIoU": band["mIoU"], "classes": here}
    return told


def _model(config: Config, kind: str) -> dict[str, Any]:
    """Trainable parameters, and FLOPs of a forward pass of one training crop."""
    from mf_scale.plan.parts import count_parts, sum_of

    parts = count_parts(replace(config, model=replace(config.model, kind=kind)))
    return {"parameters": sum_of(parts).trainable, "gflop": sum_of(parts).flops / 1e9}
