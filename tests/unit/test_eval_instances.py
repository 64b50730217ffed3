"""Mask AP on real annotations, disturbed: equal to pycocotools, to faster-coco-eval on the whole, to LVIS's rules."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import coco as peer
from pycocotools import mask as coco_masks
from pycocotools.cocoeval import COCOeval as PeerEval

from mf_scale.data.batch import NONE
from mf_scale.data.decode import Federated
from mf_scale.data.loader import EvalSample
from mf_scale.evaluation.inference import Instances
from mf_scale.evaluation.instances import InstanceRecords
from tests.unit.perturbed import LVIS, SAMPLE, Listed, found_instances, listed_instances

AREAS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
Found = list[Instances]


@pytest.fixture(scope="module")
def coco() -> tuple[Listed, Found]:
    """The embedded COCO instances: crowds, overlaps, small ones."""
    listed = listed_instances(SAMPLE / "coco_stuff" / "annotations" / "instances_val.json")
    random = np.random.default_rng(3)
    return listed, [found_instances(sample, len(listed.categories), random) for sample in listed.samples]


@pytest.fixture(scope="module", params=["LVIS's own", "made"])
def lvis(request: pytest.FixtureRequest) -> tuple[Listed, Found]:
    """LVIS's own images, 1230 classes, of which each image verifies a few; or COCO's with lists of that kind."""
    random = np.random.default_rng(5)
    if request.param == "made":
        made = listed_instances(SAMPLE / "coco_stuff" / "annotations" / "instances_val.json")
        things = sorted({k for sample in made.samples for k in sample.labels.tolist()})
        listed = Listed([_federated(sample, things, random) for sample in made.samples], made.categories)
    elif LVIS.exists():
        listed = listed_instances(LVIS, most=40)
    else:
        pytest.skip("LVIS's sample is not beside this repository")
    return listed, [found_instances(sample, len(listed.categories), random) for sample in listed.samples]


def _federated(sample: EvalSample, things: list[int], random: np.random.Generator) -> EvalSample:
    """Without its crowds, which LVIS has not: they are of a class not looked for."""
    absent = [k for k in things if k not in sample.labels]
    lists = random.choice(absent, 6, replace=False), random.choice(things, 6, replace=False)
    kept = np.flatnonzero(~sample.crowd)
    layers = np.array([np.where(sample.segment_map[i] == i, number, NONE) for number, i in enumerate(kept.tolist())])
    nothing = np.full((1, *sample.image.shape[:2]), NONE)
    return replace(
        sample,
        segment_map=(layers if len(kept) else nothing).astype(np.int16),
        labels=sample.labels[kept],
        segment_layer=np.arange(len(kept)),
        crowd=np.zeros(len(kept), dtype=bool),
        federated=Federated(*(np.sort(values) for values in lists)),
    )


def _ours(listed: Listed, found: Found, *, boundary: bool = False) -> dict[str, Any]:
    classes = len(listed.categories)
    with InstanceRecords(classes, [True] * classes) as records:
        for position, (sample, instances) in enumerate(zip(listed.samples, found, strict=True)):
            records.add(position, sample, instances)
        results = records.results(boundary=boundary)
    assert results is not None
    return results


def _as_lists(listed: Listed, found: Found) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What COCO's tools read: all images, all categories, every instance that was found."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for position, (sample, instances) in enumerate(zip(listed.samples, found, strict=True)):
        size = {"height": sample.image.shape[0], "width": sample.image.shape[1]}
        negative, partly = (
            ([], []) if (f := sample.federated) is None else (f.negative.tolist(), f.not_exhaustive.tolist())
        )
        lists = {"neg_category_ids": negative, "not_exhaustive_category_ids": partly}
        images.append({"id": position + 1, **size, **lists})
        for i, label in enumerate(sample.labels.tolist()):
            mask = sample.segment_map[sample.segment_layer[i]] == i
            annotations.append({**_entry(position, label, mask), "id": len(annotations) + 1})
            annotations[-1] |= {"iscrowd": int(sample.crowd[i]), "area": int(mask.sum())}
        for i in range(len(instances)):
            entry = _entry(position, int(instances.labels[i]), instances.mask(i))
            results.append({**entry, "score": float(instances.scores[i])})
    categories = [
        {"id": label, "name": str(label), "frequency": category.get("frequency", "f")}
        for label, category in enumerate(listed.categories)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def _entry(position: int, label: int, mask: np.ndarray) -> dict[str, Any]:
    runs = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "image_id": position + 1,
        "category_id": label,
        "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
    }


def _close(ours: float | None, theirs: float) -> bool:
    return (ours is None) == (theirs == -1) and (ours is None or abs(ours - theirs) < 1e-12)


def test_ap_is_pycocotools(coco: tuple[Listed, Found]) -> None:
    ours = _ours(*coco)
    truth, results = _as_lists(*coco)
    lists = peer.COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        lists.dataset = truth
        lists.createIndex()
        evaluation = PeerEval(lists, lists.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert [_close(ours[name], value) for name, value in zip(AREAS, evaluation.stats[:6], strict=True)] == [True] * 6
    precision = evaluation.eval["precision"][:, :, :, 0, -1].mean((0, 1))
    assert all(_close(a, b) for a, b in zip(ours["per_class"]["AP"], precision, strict=True))
    assert 0.1 < ours["AP"] < 0.8 and ours["federated"] is False
    assert sum(ours["per_class"]["instances"]) == sum(int((~s.crowd).sum()) for s in coco[0].samples)
    assert any(s.crowd.any() for s in coco[0].samples), "crowds are among them"


@pytest.mark.parametrize("kind", ["segm", "boundary"])
def test_a_class_at_a_time_is_the_library_on_the_whole(lvis: tuple[Listed, Found], kind: str) -> None:
    ours = _ours(*lvis, boundary=True)
    truth, results = _as_lists(*lvis)
    # Version 1.8 fails on an image that has nothing but detections which it drops.
    marked = {annotation["image_id"] for annotation in truth["annotations"]}
    verified = {(image["id"], label) for image in truth["images"] for label in image["neg_category_ids"]}
    sound = marked | {r["image_id"] for r in results if (r["image_id"], r["category_id"]) in verified}
    results = [r for r in results if r["image_id"] in sound]
    whole = COCO(truth)
    evaluation = COCOeval_faster(whole, whole.loadRes(results), kind, lvis_style=True, print_function=lambda *_: None)
    evaluation.params.maxDets = [300]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert ours["federated"] is True
    told = ours if kind == "segm" else ours["boundary"]
    assert [_close(told[name], value) for name, value in zip(AREAS, evaluation.all_stats[:6], strict=True)] == [
        True
    ] * 6
    precision = evaluation.eval["precision"][:, :, :, 0, -1].mean((0, 1))
    assert all(_close(a, b) for a, b in zip(told["per_class"]["AP"], precision, strict=True))
    assert ours["boundary"]["AP"] < ours["AP"]


def test_lvis_ap_is_its_rules(lvis: tuple[Listed, Found]) -> None:
    listed, found = lvis
    ours = _ours(listed, found)["per_class"]["AP"]
    for label in range(len(listed.categories)):
        expected = _lvis_ap(listed.samples, found, label)
        assert (ours[label] is None) == (expected is None)
        assert expected is None or abs(ours[label] - expected) < 1e-9
    not_exhaustive = [k for s in listed.samples if s.federated for k in s.federated.not_exhaustive.tolist()]
    assert any(ours[k] is not None for k in not_exhaustive), "the rule for them was needed"


def _lvis_ap(samples: list[EvalSample], found: Found, label: int) -> float | None:
    """Gupta et al. 2019 in plain words: one class, dense masks, one threshold after another."""
    seen, marked = [], 0
    for sample, instances in zip(samples, found, strict=True):
        assert sample.federated is not None
        of_class = np.flatnonzero(sample.labels == label).tolist()
        if not of_class and label not in sample.federated.negative:
            continue  # nobody looked for it here
        truth = [sample.segment_map[sample.segment_layer[i]] == i for i in of_class]
        masks = [instances.mask(i) for i in np.flatnonzero(instances.labels.numpy() == label).tolist()]
        scores = instances.scores[instances.labels == label].tolist()
        overlaps = [[(mask & t).sum() / (mask | t).sum() for t in truth] for mask in masks]
        seen.append((overlaps, scores, label in sample.federated.not_exhaustive))
        marked += len(truth)
    if not marked:
        return None
    return float(np.mean([_area_under(seen, marked, threshold) for threshold in np.arange(10) * 0.05 + 0.5]))


def _area_under(seen: list[Any], marked: int, threshold: float) -> float:
    flags: list[tuple[float, bool]] = []
    for overlaps, scores, partly in seen:
        taken: set[int] = set()
        for row, score in zip(overlaps, scores, strict=True):
            free = [t for t in range(len(row)) if t not in taken]
            best = max(free, key=lambda t: (row[t], t), default=None)
            if best is not None and row[best] >= threshold - 1e-10:
                taken.add(best)
                flags.append((score, True))
            elif not partly:
                flags.append((score, False))
    flags.sort(key=lambda flag: -flag[0])
    hits = np.cumsum([hit for _, hit in flags])
    precision, recall = hits / np.arange(1, len(flags) + 1), hits / marked
    return float(np.mean([precision[recall >= r].max(initial=0.0) for r in np.linspace(0, 1, 101)]))


@pytest.mark.parametrize(("of_the_other", "expected"), [("negative", 0.5), ("nothing", 1.0), ("not_exhaustive", 1.0)])
def test_what_is_no_false_positive(of_the_other: str, expected: float) -> None:
    """One image has the class, found with a low score; in the other it is found with a higher one, and is not there."""
    mask = np.zeros((40, 50), dtype=bool)
    mask[5:30, 10:40] = True
    lists = {"negative": [], "not_exhaustive": [], of_the_other: [1]}
    if of_the_other == "not_exhaustive":
        lists["negative"] = [1]  # else it is not looked at in the first place
    nothing = np.zeros(0, dtype=np.int64)
    here = Federated(nothing, nothing)
    there = Federated(*(np.array(lists[name], dtype=np.int64) for name in ("negative", "not_exhaustive")))
    flat = np.where(mask, 0, NONE).astype(np.int16)[None]
    one, image = np.array([1]), np.zeros((*mask.shape, 3), dtype=np.uint8)
    with_it = EvalSample("a", image, flat, one, np.array([0]), np.array([False]), 1, here)
    without = EvalSample("b", image, np.full_like(flat, NONE), nothing, nothing, nothing.astype(bool), 1, there)
    rows = torch.from_numpy(np.packbits(mask, axis=-1)[None])
    found = [
        Instances(torch.tensor([1]), torch.tensor([score]), torch.tensor([0]), rows, (40, 50)) for score in (0.3, 0.9)
    ]
    listed = Listed([with_it, without], [{"id": 1}, {"id": 2}])
    assert _ours(listed, found)["per_class"]["AP"][1] == pytest.approx(expected)


@pytest.mark.parametrize(("before", "expected"), [(299, 1.0), (300, 0.0)])
def test_of_an_image_lvis_counts_300(before: int, expected: float) -> None:
    """Behind as many better ones, of whatever class, the right one does not count."""
    mask = np.zeros((40, 50), dtype=bool)
    mask[5:30, 10:40] = True
    flat = np.where(mask, 0, NONE).astype(np.int16)[None]
    sample = EvalSample(
        "a",
        np.zeros((*mask.shape, 3), dtype=np.uint8),
        flat,
        np.array([1]),
        np.array([0]),
        np.array([False]),
        1,
        Federated(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)),
    )
    labels = torch.tensor([0] * before + [1])
    scores = torch.tensor([0.9] * before + [0.5])
    rows = torch.from_numpy(np.packbits(mask, axis=-1)[None])
    found = Instances(labels, scores, torch.zeros(before + 1, dtype=torch.int64), rows, (40, 50))
    assert _ours(Listed([sample], [{"id": 1}, {"id": 2}]), [found])["per_class"]["AP"][1] == pytest.approx(expected)
