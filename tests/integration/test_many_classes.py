"""Memory at K = 10,000 of a step's class terms and of semantic inference, each measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mf_scale.config.schema import EvalConfig
from mf_scale.evaluation.inference import semantic
from mf_scale.models.outputs import Classifier, MaskPrediction

pytestmark = pytest.mark.integration
CLASSES = 10_000
MIB = 2**20

CLASS_TERMS = """
import json, sys
import torch
from mf_scale.bench.memory import peak_over_inputs
from mf_scale.kernels.class_rows import asked_classes
from mf_scale.losses.class_loss import class_loss
from mf_scale.matching.class_cost import class_probabilities
from mf_scale.models.outputs import Classifier

def leaf(*shape):
    return (torch.randn(shape, generator=generator) / 16).requires_grad_()

generator = torch.Generator().manual_seed(0)
images, rows, width, classes = 16, 6 * 100, 256, int(sys.argv[1])
embeddings, classifier = leaf(images, rows, width), Classifier(leaf(classes + 1, width), leaf(classes + 1))
labels = torch.randint(0, classes, (images, 20), generator=generator)
targets = torch.full((images, rows), classes)
targets[:, ::5] = labels.repeat(1, 6)
mask = torch.randint(0, 3, (images, classes), generator=generator).to(torch.uint8)
weights = torch.ones(classes + 1)
found = {}

def step():
    asked = asked_classes(mask, labels) if "masked" in sys.argv else None
    found["cost"] = float(class_probabilities(embeddings, classifier, labels, asked).sum())
    total, by_row = class_loss(embeddings, classifier, targets, weights, asked=asked)
    total.backward()
    found["loss"] = float(total.detach())

found["peak_mib"] = peak_over_inputs(step, torch.device("cpu"))
found["gradient"] = float(classifier.weight.grad.abs().sum())
print(json.dumps(found))
"""

SEMANTIC = """
import json, sys, time
from pathlib import Path
import torch
from mf_scale.bench.memory import peak_over_inputs
from mf_scale.evaluation.inference import semantic
from mf_scale.models.outputs import Classifier, MaskPrediction

classes, queries, side, rows, budget = (int(word) for word in sys.argv[1:])
generator = torch.Generator().manual_seed(0)
normal = lambda *shape: torch.randn(shape, generator=generator)
classifier = Classifier(normal(classes + 1, 256) / 4, normal(classes + 1))
prediction = MaskPrediction(
    normal(1, queries, 256), normal(1, queries, 256) / 4, normal(1, 256, rows // 4, side // 4), classifier
)
found = {}

def work():
    with torch.inference_mode():
        found["map"] = semantic(prediction, (rows, side), budget=budget * 2**20 // 4)

began = time.perf_counter()
added = peak_over_inputs(work, torch.device("cpu"))
# Of this process since it began: a resource usage would have that of the process it was forked from.
(whole,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps({
    "added_mib": added, "process_mib": int(whole.split()[1]) / 1024, "seconds": time.perf_counter() - began,
    "classes": len(found["map"].unique()), "size": found["map"].shape,
}))
"""


def _child(code: str, *words: object) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1500,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_the_class_terms_of_a_step_add_less_than_200_mb(masked: bool) -> None:
    """16 images x 6 layers x 100 queries, cost, loss and gradients; the logits alone are 384 MB, a gradient as much."""
    found = _child(CLASS_TERMS, CLASSES, "masked" if masked else "all")
    print(found)
    assert 0 < found["peak_mib"] < 200e6 / MIB
    assert found["loss"] > 0 and found["cost"] > 0 and found["gradient"] > 0


def _semantic_peak(rows: int, queries: int) -> None:
    budget = EvalConfig().memory_budget
    found = _child(SEMANTIC, CLASSES, queries, 2048, rows, budget)
    print(found)
    assert found["size"] == [1, rows, 2048] and found["classes"] > 1
    budget_result_and_margin = budget + rows * 2048 * 8 / MIB + 64
    assert 0 < found["added_mib"] < budget_result_and_margin
    assert found["process_mib"] < 1024, "torch and the prediction in it"


def test_a_strip_2048_wide_stays_in_the_budget() -> None:
    """All bands of an image are alike; dense, the scores of this strip are 2.6 GB."""
    _semantic_peak(32, 100)


@pytest.mark.soak
@pytest.mark.timeout(1600)
def test_2048_by_2048_stays_below_a_gigabyte() -> None:
    """Dense, the scores are 168 GB."""
    _semantic_peak(2048, 100)


def test_the_classes_are_those_of_the_dense_way() -> None:
    """At K = 10,000, with upsampling before the sigmoid, by several budgets."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    classifier = Classifier(normal(CLASSES + 1, 16), normal(CLASSES + 1))
    prediction = MaskPrediction(normal(1, 9, 16), normal(1, 9, 8), normal(1, 8, 6, 8), classifier)
    masks = torch.einsum("bqc,bchw->bqhw", prediction.mask_embeddings, prediction.pixel_embeddings)
    masks = torch.nn.functional.interpolate(masks, size=(23, 31), mode="bilinear", align_corners=False).sigmoid()
    scores = torch.einsum("bqk,bqhw->bkhw", prediction.class_logits.softmax(-1)[..., :-1], masks)
    for budget in (2**15, 2**18, 2**24):
        assert torch.equal(semantic(prediction, (23, 31), budget=budget), scores.argmax(1))
