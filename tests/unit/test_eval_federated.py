"""A federated source, from LVIS's files through packing to its numbers: what was looked for comes along."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mf_scale.data.decode import decode_sample
from mf_scale.data.index import Index
from mf_scale.data.loader import eval_samples
from mf_scale.data.samples import BadSample, RawSample
from mf_scale.distributed.env import World
from mf_scale.evaluation.bands import band_results
from mf_scale.evaluation.results import results_table
from mf_scale.evaluation.runner import evaluate
from mf_scale.models.outputs import MaskPrediction
from mf_scale.vocabulary import ClassInfo, Vocabulary
from tests.random_batches import said_outright
from tests.unit.packed_formats import pack
from tests.unit.painted import painted_config
from tests.unit.test_format_lvis import make_tree

pytest.importorskip("pycocotools.mask", reason="polygons are drawn with pycocotools")


class Guessing(nn.Module):
    """Finds the class it is told in the upper half of every image, and one that nobody looked for in all of it."""

    stride = 4

    def __init__(self, classes: int, told: int, never: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        logits = torch.full((1, 2, classes + 1), -9.0)
        logits[0, 0, told], logits[0, 1, never] = 5.0, 9.0
        self.logits = logits

    def forward(self, images: Tensor) -> MaskPrediction:
        cells = F.avg_pool2d(images.float(), self.stride, ceil_mode=True).shape[-2:]
        upper = torch.full((1, 2, *cells), 8.0)
        upper[:, 0, cells[0] // 2 :] = -8.0
        return said_outright(self.logits, torch.eye(2)[None], upper)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, dict[str, dict[str, list[int]]]]:
    """The packed source, and what LVIS's list says was looked for, by sample."""
    folder = tmp_path_factory.mktemp("lvis")
    tree = make_tree(folder / "src", "v1")
    data = json.loads((tree / "annotations" / "lvis_v1_val.json").read_text())
    assert pack("lvis_v1", tree, folder / "out", "val") == 0
    index = Index.open(folder / "out")
    label_of = index.vocabulary.index_of_source_id()
    said = {
        image["coco_url"].split("/")[-1].removesuffix(".jpg"): {
            name: sorted(label_of[k] for k in set(image[f"{name}_category_ids"])) for name in ("neg", "not_exhaustive")
        }
        for image in data["images"]
    }
    return index, said


def test_what_was_looked_for_reaches_the_evaluation(source: tuple[Index, dict[str, dict[str, list[int]]]]) -> None:
    index, said = source
    seen = 0
    for sample in eval_samples(index, painted_config(data__task="instance").data, rank=0, world=1):
        assert sample.federated is not None
        assert sample.federated.negative.tolist() == said[sample.key]["neg"]
        assert sample.federated.not_exhaustive.tolist() == said[sample.key]["not_exhaustive"]
        seen += 1
    assert seen == len(said)


def test_results_of_a_federated_source(source: tuple[Index, dict[str, dict[str, list[int]]]]) -> None:
    """With numbers by frequency band, also in the table for the terminal."""
    index, said = source
    sample = next(iter(eval_samples(index, painted_config().data, rank=0, world=1, samples=1)))
    told, classes = int(sample.labels[0]), len(index.vocabulary)
    never = next(k for k in range(classes) if k not in sample.labels and k not in said[sample.key]["neg"])
    config = painted_config(data__task="instance", eval__short_side=64)
    evaluation = evaluate(
        Guessing(classes, told, never), index, config, World(), split="val", samples=1, progress=False
    )
    assert evaluation is not None
    results = evaluation.results
    per_class = results["instances"]["per_class"]
    assert results["instances"]["federated"] is True and per_class["AP"][never] is None
    assert sum(per_class["instances"]) == len(sample.labels)
    bands = results["bands"]
    assert bands["of_class"] == [c.frequency for c in index.vocabulary.classes]
    assert sum(bands[band]["classes"] for band in ("rare", "common", "frequent")) == classes
    by_letter = {letter: results["instances"][f"AP{letter}"] for letter in "rcf"}
    assert by_letter == {band[0]: bands[band]["AP"] for band in ("rare", "common", "frequent")}
    of_band = index.vocabulary.classes[told].frequency or ""
    pairs = zip(per_class["AP"], index.vocabulary.classes, strict=True)
    values = [value for value, info in pairs if info.frequency == of_band and value is not None]
    assert values and bands[of_band]["AP"] == pytest.approx(np.mean(values))
    head = results_table([results]).splitlines()[0]
    assert head.split()[-7:-1] == ["AP", "AP50", "AP75", "APr", "APc", "APf"]


@pytest.mark.parametrize(
    "said",
    [[], 3, {"negative": [1]}, {"negative": [9], "not_exhaustive": []}, {"negative": ["x"], "not_exhaustive": []},
     {"negative": [-1], "not_exhaustive": []}, {"negative": [10**30], "not_exhaustive": []}],
)  # fmt: skip
def test_lists_that_make_no_sense_are_bad_samples(said: object) -> None:
    meta = {"height": 2, "width": 2, "segments": [], "federated": said}
    with pytest.raises(BadSample, match="looked for"):
        decode_sample(RawSample("k", _png(), [_png(grey=True)], meta), 5, 100)


def _png(grey: bool = False) -> bytes:
    import cv2

    pixels = np.full((2, 2), 254, np.uint8) if grey else np.zeros((2, 2, 3), np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def test_bands_are_means_over_their_classes() -> None:
    bands = ["rare", None, "common", "rare", "rare"]
    classes = tuple(ClassInfo(str(i), True, i, band) for i, band in enumerate(bands))
    results = {
        "semantic": {"per_class": {"IoU": [0.2, 0.9, None, 0.4, None]}},
        "instances": {"per_class": {"AP": [None, 0.1, 0.5, None, None]}},
    }
    told = band_results(Vocabulary("v", classes), results)
    assert told is not None
    assert told["rare"] == {"classes": 3, "mIoU": pytest.approx(0.3), "PQ": None, "AP": None}
    assert told["common"] == {"classes": 1, "mIoU": None, "PQ": None, "AP": 0.5}
    assert told["frequent"] == {"classes": 0, "mIoU": None, "PQ": None, "AP": None}
    assert band_results(Vocabulary("v", (ClassInfo("a", True, 0),)), results) is None
