"""Training on COCO panoptic and ADE20K together: real processes, real images, stopped and gone on with exactly."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from data_tools.__main__ import main
from mf_scale.config.load import load_config
from mf_scale.data.batch import UNKNOWN
from mf_scale.data.loader import train_steps
from mf_scale.data.sources import open_training
from mf_scale.data.state import DataState
from mf_scale.distributed.env import World
from mf_scale.evaluation.runner import evaluate_run
from mf_scale.rundir import MERGES
from mf_scale.vocabulary import Vocabulary
from tests.integration.program import Run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

ADE = Path(__file__).parents[3] / "shared" / "data" / "ade20k_150"
STEPS = 6


@pytest.fixture(scope="module")
def ade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed in two: train (28 images) and val (6)."""
    if not ADE.is_dir():
        pytest.skip("ADE20K's sample is not beside this repository")
    folder = tmp_path_factory.mktemp("ade")
    for kind in ("images", "annotations"):
        for file in sorted((ADE / kind).iterdir()):
            place = folder / "ade" / kind / ("training" if int(file.stem[-4:]) % 4 else "validation")
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    for split, name in (("training", "train"), ("validation", "val")):
        assert main(["pack", "ade20k_150", str(folder / "ade"), str(folder / name), "--split", split]) in (0, None)
    return folder


def settings(packed: Path, ade: Path) -> list[str]:
    sources = f"[{{index: {packed}/train, weight: 3}}, {{index: {ade}/train, weight: 1, vocabulary: ade20k_150}}]"
    said = ["data.train=null", f"data.sources={sources}", "data.merge=[common]", f"data.val={ade}/val"]
    return [*said, "data.task=semantic", "eval.every_steps=3", "eval.loss_samples=4", f"train.steps={STEPS}"]


@pytest.mark.parametrize("processes", [2])
def test_two_datasets_are_one_training_and_go_on_exactly(
    tmp_path: Path, packed: Path, ade: Path, processes: int
) -> None:
    said = settings(packed, ade)
    whole, run = Run(tmp_path / "whole", packed), Run(tmp_path / "run", packed)
    done = whole.train(*said, processes=processes)
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    assert "unified vocabulary 'unified': 252 classes, 31 of them of several source classes" in printed
    assert "data.sources[1]: ade20k_150, annotates 150 of 252 classes, the others are unknown there" in printed
    assert 'person = coco_panoptic_133 "person" + ade20k_150 "person"' in printed
    assert f"and 21 more merges in {whole.folder / MERGES}" in printed
    assert 'sky = coco_panoptic_133 "sky-other-merged" + ade20k_150 "sky"' in (whole.folder / MERGES).read_text()
    assert "validation: ade20k_150, annotates 150 of 252" in printed

    assert run.train_until(3, signal.SIGTERM, *said, processes=processes) == 85
    done = run.train(*said, processes=processes)
    assert done.returncode == 0, done.stderr
    for event, key in (("keys", "keys"), ("step", "loss"), ("validation", "loss")):
        assert run.series(event, key) == whole.series(event, key), key

    config = load_config(run.folder / "config.yaml")
    sources = open_training(config.data)
    saved = Vocabulary.load(run.folder / f"checkpoints/step-{STEPS:08d}/vocabulary.json")
    assert saved.digest == sources[0].vocabulary.digest and saved.members == sources[0].vocabulary.members
    order = DataState.from_dict(run.state(STEPS)["data"])
    steps = train_steps(sources, order, config.data, rank=0, world=1, step=0)
    for step, keys in run.series("keys", "keys").items():
        _, batch = next(steps)
        assert sorted(batch.keys) == sorted(keys), f"keys of step {step}"
        assert batch.class_mask is not None
        for key, mask in zip(batch.keys, batch.class_mask, strict=True):
            way = sources[1 if key.startswith("ADE") else 0].way
            assert way is not None and (mask == UNKNOWN).tolist() == (~way.known).tolist()
    steps.close()

    # evaluated on ADE alone: what ADE does not annotate is not asked for, and is in no mean
    evaluate_run(str(run.folder), [], World(), split="val")
    results = json.loads((run.folder / "report" / "evaluation-val.json").read_text())
    assert len(results["class_names"]) == 252 and sum(results["annotated"]) == 150
    assert {c["predicted"] for c in results["confusions"]} <= {i for i, a in enumerate(results["annotated"]) if a}
    pixels = results["semantic"]["per_class"]["pixels"]
    assert not any(n for n, known in zip(pixels, results["annotated"], strict=True) if not known)

    # other classes are refused, in one paragraph
    fewer = [text.replace("vocabulary: ade20k_150", "map: {wall: null}") for text in said]
    done = whole.train(*fewer, f"train.steps={STEPS + 1}", processes=1)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the sources together have 'unified' (251 classes)" in done.stderr
    assert "1 of its classes are gone, 0 are new" in done.stderr
    assert "may change in a run as long as the unified classes stay the same" in done.stderr
