"""The recipes of large vocabularies on real samples: packed, trained on two processes, evaluated, told by bands.

LVIS with few steps in every run of the suite; all three, until the loss has fallen, as a soak test.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mf_scale.tracking.metrics import read_metrics
from mf_scale.tracking.report.table import count
from mf_scale.vocabulary import Vocabulary
from tests.dry_run import DryRun, dry_run
from tests.recipe_samples import RECIPES

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]

SAMPLES = {  # classes, those that the evaluated images hold, classes of each band
    "ade20k_full": (847, 24, None),
    "lvis_1203": (1203, 39, {"rare": 337, "common": 461, "frequent": 405}),
    "union_247": (247, None, None),
}


def tried(name: str, folder: Path, steps: int) -> tuple[DryRun, list[float]]:
    """The dry run, and the losses of its steps."""
    if missing := RECIPES[name].missing:
        pytest.skip(f"not beside this repository: ../shared/data/{', '.join(missing)}")
    found = dry_run(name, folder, steps=steps)
    losses = [record["loss"] for record in read_metrics(found.folder / "metrics.jsonl") if record["event"] == "step"]
    assert losses and all(math.isfinite(loss) for loss in losses)
    return found, losses


def check(name: str, found: DryRun) -> None:
    classes, held, of_bands = SAMPLES[name]
    results, measure = found.evaluation, RECIPES[name].measure
    assert f"{classes} classes" in found.printed and "2 x cpu" in found.printed
    assert len(results["class_names"]) == classes and results[measure] is not None
    values = results["instances" if measure == "AP" else "semantic"]["per_class"]["AP" if measure == "AP" else "IoU"]
    present = sum(value is not None for value in values)
    assert held is None or present == held
    told = {band: results["bands"][band]["classes"] for band in ("rare", "common", "frequent")}
    assert of_bands is None or told == of_bands
    assert sum(told.values()) >= present > 0, "every class that is evaluated has a band"
    assert any(line.split()[:3] == ["all", f"{classes:,}", f"{present:,}"] for line in found.printed.splitlines())
    page = (found.folder / "report" / "index.html").read_text()
    assert "By frequency band" in page and f"{present} of {count(classes)} classes occur" in page
    last = max((found.folder / "checkpoints").glob("step-*"))
    saved = Vocabulary.load(last / "vocabulary.json")
    assert saved.images is not None and sum(saved.images) > 0, "what the prior is taken from"


def test_lvis_is_packed_trained_evaluated_and_told_by_bands(tmp_path: Path) -> None:
    found, _ = tried("lvis_1203", tmp_path, steps=2)
    check("lvis_1203", found)
    assert found.evaluation["instances"]["federated"] and found.evaluation["bands"]["rare"]["AP"] is None


@pytest.mark.soak
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_learns_its_sample(name: str, tmp_path: Path) -> None:
    found, losses = tried(name, tmp_path, steps=60)
    check(name, found)
    assert losses[-1] < 0.7 * losses[0]
    if name == "union_247":
        assert sum(found.evaluation["annotated"]) == 133, "evaluated on COCO panoptic"
        for source, known in (("coco_stuff_171", 145), ("coco_panoptic_133", 133), ("ade20k_150", 148)):
            assert f"{source}, annotates {known} of 247 classes" in found.printed
