"""PQ and mIoU on real panoptic annotations, disturbed: equal to torchmetrics, COCO's rules and plain statements."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchmetrics.detection import PanopticQuality

from mf_scale.distributed import comm
from mf_scale.evaluation import confusions
from mf_scale.evaluation.confusions import ConfusionCounts, _merged
from mf_scale.evaluation.counting import class_map
from mf_scale.evaluation.metrics import PanopticCounts, SemanticCounts, outlines
from tests.unit.perturbed import SAMPLE, disturbed

SHARED = Path(__file__).parents[3] / "shared" / "data" / "coco_panoptic" / "annotations"
LISTS = {
    "bundled": SAMPLE / "coco_panoptic" / "annotations" / "panoptic_val.json",
    "shared": SHARED / "panoptic_val2017.json",
}


@dataclass(frozen=True)
class Pair:
    """Segments of an image as marked and as predicted: maps [H,W] (-1: void) and the classes of the segments."""

    truth: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    found: np.ndarray
    found_labels: np.ndarray


@dataclass(frozen=True)
class Source:
    pairs: list[Pair]
    things: list[bool]


@pytest.fixture(scope="module", params=list(LISTS))
def source(request: pytest.FixtureRequest) -> Source:
    """Twelve of COCO's panoptic images, among them one with a crowd; a tenth of their pixels has no segment."""
    path = LISTS[request.param]
    if not path.exists():
        pytest.skip("COCO's panoptic sample is not beside this repository")
    data = json.loads(path.read_text())
    categories = sorted(data["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    random = np.random.default_rng(2)
    crowded = sorted(data["annotations"], key=lambda a: -sum(s["iscrowd"] for s in a["segments_info"]))[:12]
    pairs = [_pair(path.with_suffix("") / a["file_name"], a, label_of, random) for a in crowded]
    assert any(pair.crowd.any() for pair in pairs) and any((pair.truth < 0).any() for pair in pairs)
    return Source(pairs, [bool(category["isthing"]) for category in categories])


def _pair(file: Path, annotation: dict[str, Any], label_of: dict[int, int], random: np.random.Generator) -> Pair:
    """Every second pixel of the map, which is quick; segments moved, grown, renamed, joined and left out."""
    ids = np.asarray(Image.open(file).convert("RGB"))[::2, ::2].astype(np.int64) @ [1, 256, 65536]
    segments = [s for s in annotation["segments_info"] if (ids == s["id"]).any()]
    truth = np.full(ids.shape, -1)
    for i, segment in enumerate(segments):
        truth[ids == segment["id"]] = i
    labels = np.array([label_of[s["category_id"]] for s in segments])
    crowd = np.array([bool(s["iscrowd"]) for s in segments])
    found: NDArray[np.int64] = np.full(truth.shape, -1)
    found_labels: list[int] = []
    for i in random.permutation(len(segments)).tolist():
        if random.random() < 0.12:
            continue
        found[disturbed(truth == i, random)] = len(found_labels)
        found_labels.append(int(labels[i]) if random.random() < 0.85 else int(random.integers(len(label_of))))
    if random.random() < 0.5:
        found[: found.shape[0] // 4, : found.shape[-1] // 3] = len(found_labels)  # one that nobody marked
        found_labels.append(int(random.integers(len(label_of))))
    return Pair(truth, labels, crowd, found, np.array(found_labels, dtype=np.int64))


def _counts(source: Source, *, boundary: bool = False) -> PanopticCounts:
    counts = PanopticCounts(len(source.things), source.things, boundary=boundary)
    for pair in source.pairs:
        counts.update(pair.found, pair.found_labels, pair.truth, pair.labels, pair.crowd)
    return counts


def test_pq_is_torchmetrics(source: Source) -> None:
    """It knows no crowds, so they are void to both; no stuff in two segments, so those are one to both; and it does not
    count a miss where the prediction is void (COCO's rules do), so no prediction is."""
    classes = len(source.things)
    things = {k for k in range(classes) if source.things[k]}
    stuff = set(range(classes)) - things
    peer = PanopticQuality(
        things, stuff, allow_unknown_preds_category=True, return_sq_and_rq=True, return_per_class=True
    )
    ours = PanopticCounts(classes, source.things)
    for pair in source.pairs[:6]:
        truth = np.where(pair.crowd[pair.truth] & (pair.truth >= 0), -1, pair.truth)
        everywhere = np.where(pair.found < 0, len(pair.found_labels), pair.found)
        found, found_labels = _stuff_joined(everywhere, np.append(pair.found_labels, min(stuff)), source.things)
        ours.update(found, found_labels, truth, pair.labels, np.zeros(len(pair.labels), dtype=bool))
        peer.update(_two_channels(found, found_labels), _two_channels(truth, pair.labels))
    results = ours.results()
    told = peer.compute().double().numpy().reshape(-1, 3)
    order = [*sorted(things), *sorted(stuff)]
    seen = 0
    for place, label in enumerate(order):
        value = results["per_class"]["PQ"][label]
        if value is not None:
            seen += 1
            expected = told[place]
            got = [value, results["per_class"]["SQ"][label], results["per_class"]["RQ"][label]]
            assert np.allclose(got, expected, atol=1e-6)
        else:
            assert told[place][0] == 0
    assert seen > 20 and 0.2 < results["all"]["PQ"] < 0.9


def _stuff_joined(found: np.ndarray, labels: np.ndarray, things: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    first: dict[int, int] = {}
    place = [i if things[k] else first.setdefault(int(k), i) for i, k in enumerate(labels)]
    return np.append(place, -1)[found].astype(np.int64), labels


def _two_channels(segment_map: np.ndarray, labels: np.ndarray) -> torch.Tensor:
    """[1,H,W,2]: category (10,000: void) and instance."""
    category = np.append(labels, 10_000)[segment_map]
    return torch.from_numpy(np.stack([category, np.maximum(segment_map, 0)], axis=-1))[None]


@pytest.mark.parametrize("boundary", [False, True])
def test_pq_is_cocos_rules(source: Source, boundary: bool) -> None:
    """As its own evaluation goes, segment by segment, on ids: crowds, void, what lies on them; also by outlines."""
    iou = [0.0] * len(source.things)
    hits: dict[int, int] = defaultdict(int)
    wrong: dict[int, int] = defaultdict(int)
    missed: dict[int, int] = defaultdict(int)
    for pair in source.pairs:
        void = pair.truth < 0
        matched_truth, matched_found = set(), set()
        for i, found_label in enumerate(pair.found_labels.tolist()):
            mask = pair.found == i
            for j, label in enumerate(pair.labels.tolist()):
                if pair.crowd[j] or label != found_label or not mask.any():
                    continue
                overlap = _iou(mask, pair.truth == j, void)
                if boundary:
                    overlap = min(overlap, _iou(_inner(mask), _inner(pair.truth == j), void))
                if overlap > 0.5:
                    iou[label] += overlap
                    hits[label] += 1
                    matched_truth.add(j)
                    matched_found.add(i)
        for j, label in enumerate(pair.labels.tolist()):
            missed[label] += j not in matched_truth and not pair.crowd[j]
        for i, label in enumerate(pair.found_labels.tolist()):
            mask = pair.found == i
            excused = void | np.isin(pair.truth, np.flatnonzero(pair.crowd & (pair.labels == label)))
            if i not in matched_found and mask.any() and (mask & excused).sum() / mask.sum() <= 0.5:
                wrong[label] += 1
    results = _counts(source, boundary=boundary).results()["per_class"]["PQ"]
    for label in range(len(source.things)):
        total = hits[label] + wrong[label] / 2 + missed[label] / 2
        assert (results[label] is None) == (total == 0)
        assert not total or abs(results[label] - iou[label] / total) < 1e-8


def _iou(found: np.ndarray, truth: np.ndarray, void: np.ndarray) -> float:
    return float((found & truth).sum() / max(1, ((found & ~void) | truth).sum()))


def _inner(mask: np.ndarray) -> np.ndarray:
    """Of a mask the pixels within d of its outside, pixel by pixel along rows and columns."""
    reach = max(1, round(0.02 * float(np.hypot(*mask.shape))))
    inside = np.pad(mask, reach)
    whole = inside.copy()
    for axis in (0, 1):
        whole = np.all([np.roll(whole, shift, axis) for shift in range(-reach, reach + 1)], axis=0)
    return (inside & ~whole)[reach:-reach, reach:-reach]


def test_outlines_are_the_erosion_of_every_mask(source: Source) -> None:
    for pair in source.pairs[:3]:
        band = outlines(pair.found)
        for i in range(-1, len(pair.found_labels)):
            mask = pair.found == i
            assert np.array_equal(band & mask, _inner(mask))


def test_miou_and_confusions_are_the_confusion_matrix(source: Source) -> None:
    classes = len(source.things)
    matrix, counts = np.zeros((classes, classes), dtype=np.int64), SemanticCounts(classes)
    outlined, ours = SemanticCounts(classes), ConfusionCounts(classes)
    bands = np.zeros((3, classes))
    for pair in source.pairs:
        truth, found = class_map(pair.truth, pair.labels), np.maximum(class_map(pair.found, pair.found_labels), 0)
        for t, p, n in zip(*_pairs_of(truth, found), strict=True):
            matrix[t, p] += n
        counts.update(found, truth)
        outlined.update_outlines(found, truth)
        ours.update(found, truth)
        for k in np.unique([truth, found]).tolist():
            if k >= 0:
                near, said = _inner(truth == k), _inner(found == k) & (truth >= 0)
                bands[:, k] += [(near & said).sum(), said.sum(), near.sum()]
    hit, true, said = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    present = true > 0
    iou = hit[present] / (true + said - hit)[present]
    results = counts.results()
    assert abs(results["mIoU"] - iou.mean()) < 1e-12
    assert abs(results["fwIoU"] - (iou * true[present] / true.sum()).sum()) < 1e-12
    assert abs(results["pixel_accuracy"] - hit.sum() / true.sum()) < 1e-12
    assert abs(results["mean_accuracy"] - (hit[present] / true[present]).mean()) < 1e-12
    boundary = bands[0][bands[2] > 0] / (bands[1] + bands[2] - bands[0])[bands[2] > 0]
    assert abs(outlined.results()["mIoU"] - boundary.mean()) < 1e-12
    wrong = matrix - np.diag(hit)
    worst = [(int(t), int(p)) for t, p in zip(*np.nonzero(wrong), strict=True)]
    worst.sort(key=lambda pair: (-wrong[pair], pair))
    expected = [
        {"truth": t, "predicted": p, "pixels": int(wrong[t, p]), "share": int(wrong[t, p]) / int(true[t])}
        for t, p in worst[:50]
    ]
    assert ours.results(true) == ours.results(true, at_once=300) == expected and len(worst) > 50


def _pairs_of(truth: np.ndarray, found: np.ndarray) -> tuple[Any, Any, Any]:
    (t, p), n = np.unique(np.stack([truth[truth >= 0], found[truth >= 0]]), axis=1, return_counts=True)
    return t, p, n


def test_confusions_above_the_bound_are_not_told() -> None:
    counts = ConfusionCounts(10, most=3)
    truth = np.arange(4)
    counts.update((truth + 1)[:3], truth[:3])
    assert len(counts.results(np.full(10, 9)) or []) == 3
    counts.update((truth + 1)[3:], truth[3:])
    assert counts.results(np.full(10, 9)) is None


def test_confusions_of_all_ranks_above_the_bound_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's are below it: whether they are told must not depend on how many share the images."""
    counts = ConfusionCounts(10, most=3)
    counts.update(np.array([1, 2]), np.array([0, 1]))
    for others, told in (([1, 45], 3), ([45, 46], None)):
        theirs = np.array([others, [7, 7]]).tobytes()
        monkeypatch.setattr(comm, "gather_bytes", lambda data, owner, theirs=theirs: [data, theirs])
        results = counts.results(np.full(10, 9))
        assert (results and len(results)) == told
        assert results is None or results[0] == {"truth": 0, "predicted": 1, "pixels": 8, "share": 8 / 9}


@pytest.mark.parametrize("waiting", [0, 7, 1 << 18])
def test_confusions_are_merged_now_and_then(waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confusions, "_WAITING", waiting)
    random, counts = np.random.default_rng(3), ConfusionCounts(20)
    truth, found = random.integers(-1, 20, (2, 40, 30))
    merges: list[int] = []

    def merged(pairs: Any, pixels: Any) -> Any:
        merges.append(len(pairs))
        return _merged(pairs, pixels)

    monkeypatch.setattr(confusions, "_merged", merged)
    for row in range(40):
        counts.update(found[row], truth[row])
    made, results = len(merges), counts.results(np.full(20, 1))
    assert results is not None and all(one["pixels"] == _times(truth, found, one) for one in results)
    wrong = (truth >= 0) & (found >= 0) & (truth != found)
    assert len(counts.pairs) == len(np.unique(truth[wrong] * 20 + found[wrong])) and len(results) == 50
    assert 1 < made < 40 if waiting < 8 else made == 0


def _times(truth: np.ndarray, found: np.ndarray, one: dict[str, Any]) -> int:
    return int(((truth == one["truth"]) & (found == one["predicted"])).sum())


def test_confusions_above_the_bound_cost_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confusions, "_WAITING", 0)
    counts = ConfusionCounts(10, most=3)
    counts.update(np.arange(1, 5), np.arange(4))
    assert counts.passed and not len(counts.pairs)
    monkeypatch.setattr(np, "unique", None)
    counts.update(np.arange(1, 5), np.arange(4))
