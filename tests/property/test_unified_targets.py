"""Targets with unified labels: at every pixel what the packed classes are there, mapped; lists and masks likewise."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mf_scale.data.batch import IGNORE, NONE, NOT_EXHAUSTIVE, UNKNOWN
from mf_scale.data.decode import Federated, StoredSample, none_value
from mf_scale.data.mapping import class_mask, mapped_lists, mapped_sample
from mf_scale.data.targets import TargetRules, make_targets
from mf_scale.unify import LEFT_OUT, UnifiedSource

FAST = settings(max_examples=250, deadline=None)
PACKED, UNIFIED = 5, 4


@st.composite
def ways(draw) -> tuple[UnifiedSource, np.ndarray]:
    """A way, and which unified classes are things: a class of several, or of things, is joined where it is stuff."""
    labels = np.array(draw(st.lists(st.integers(-1, UNIFIED - 1), min_size=PACKED, max_size=PACKED)), np.int64)
    things = np.array(draw(st.lists(st.booleans(), min_size=UNIFIED, max_size=UNIFIED)))
    known = np.isin(np.arange(UNIFIED), labels)
    return UnifiedSource("packed", "", labels, known, known & ~things, ()), things


@st.composite
def samples(draw) -> StoredSample:
    segments, layers = draw(st.integers(0, 6)), draw(st.integers(1, 3))
    numbers = st.lists(st.integers(0, segments + 1), min_size=layers * 12, max_size=layers * 12)
    dtype = draw(st.sampled_from([np.uint8, np.uint16]))
    drawn = np.array(draw(numbers)).reshape(layers, 3, 4)
    layer_of = np.array(draw(st.lists(st.integers(0, layers - 1), min_size=segments, max_size=segments)), np.int64)
    stored = np.full(drawn.shape, none_value(np.dtype(dtype)), dtype)
    for layer in range(layers):
        for i in range(segments):
            if layer_of[i] == layer:
                stored[layer][drawn[layer] == i] = i
    stored[0][drawn[0] == segments + 1] = none_value(stored.dtype) + 1
    labels = np.array(draw(st.lists(st.integers(0, PACKED - 1), min_size=segments, max_size=segments)), np.int64)
    crowd = np.array(draw(st.lists(st.booleans(), min_size=segments, max_size=segments)), bool)
    return StoredSample("k", np.zeros((3, 4, 3), np.uint8), stored, labels, layer_of, crowd)


def classes_at(segment_map: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Which classes have a segment at a pixel, bool [classes,H,W]."""
    found = np.zeros((classes, *segment_map.shape[1:]), bool)
    for i, label in enumerate(labels):
        found[label] |= (segment_map == i).any(axis=0)
    return found


@FAST
@given(ways(), samples(), st.sampled_from(["none", "ignore"]))
def test_a_semantic_target_is_the_mapped_dense_class_map(drawn, sample, unlabelled):
    way, things = drawn
    dense = np.full(sample.stored_map.shape[1:], NONE, np.int64)  # the lowest layer with a segment is what shows
    none = none_value(sample.stored_map.dtype)
    for layer in sample.stored_map[::-1]:
        dense = np.where(layer < none, np.append(sample.labels, 0)[np.minimum(layer, len(sample.labels))], dense)
    wanted = np.where(dense >= 0, np.where(way.labels[dense] == LEFT_OUT, IGNORE, way.labels[dense]), dense)
    wanted[(wanted == NONE) & (unlabelled == "ignore")] = IGNORE
    wanted[sample.stored_map[0] > none] = IGNORE
    mapped = mapped_sample(sample, way)
    rules = TargetRules("semantic", things, "none", unlabelled, way.joined)
    made = make_targets(mapped.stored_map, mapped, rules)
    got = np.where(
        made.segment_map[0] >= 0, np.append(made.labels, 0)[np.maximum(made.segment_map[0], -1)], made.segment_map[0]
    )
    assert (got == wanted).all()
    assert len(set(made.labels.tolist())) == len(made.labels)


@FAST
@given(ways(), samples(), st.sampled_from(["none", "ignore"]), st.sampled_from(["none", "ignore", "keep"]))
def test_a_panoptic_target_has_the_mapped_classes_at_every_pixel(drawn, sample, unlabelled, crowd):
    way, things = drawn
    mapped = mapped_sample(sample, way)
    made = make_targets(mapped.stored_map, mapped, TargetRules("panoptic", things, crowd, unlabelled, way.joined))
    unified, none = way.labels[sample.labels], none_value(sample.stored_map.dtype)
    joined = (unified >= 0) & way.joined[unified]
    kept = (unified >= 0) & ((crowd == "keep") | ~sample.crowd | joined)
    here = [(sample.stored_map == i).any(axis=0) for i in range(len(unified))]
    wanted = np.zeros((UNIFIED, 3, 4), bool)
    for i in np.flatnonzero(kept):
        wanted[unified[i]] |= here[i]
    shut = np.zeros((3, 4), bool)  # by left-out segments, and by crowds where those are ignored
    for i in np.flatnonzero(~kept & ((unified < 0) | (crowd == "ignore"))):
        shut |= here[i]
    nowhere = ~wanted.any(axis=0)
    void = sample.stored_map[0] > none
    empty = (sample.stored_map == none).any(axis=0) & (unlabelled == "ignore")
    ignored = void | (nowhere & (shut | empty))
    assert ((made.segment_map[0] == IGNORE) == ignored).all()
    got = classes_at(made.segment_map, made.labels, UNIFIED)
    assert (got == wanted).all()
    for label in np.flatnonzero(way.joined).tolist():
        assert (made.labels == label).sum() <= 1 and not made.crowd[made.labels == label].any()
    for label in np.flatnonzero(~way.joined).tolist():
        present = [i for i in np.flatnonzero(kept & (unified == label)) if here[i].any()]
        assert (made.labels == label).sum() == len(present), "instances stay apart"
    for segment, layer in enumerate(made.segment_layer.tolist()):
        others = [n for n in range(len(made.segment_map)) if n != layer]
        assert not (made.segment_map[others] == segment).any(), "a segment lies on its own layer"


@FAST
@given(ways(), st.lists(st.sets(st.integers(0, PACKED - 1)), min_size=1, max_size=6))
def test_lists_of_classes_are_mapped_image_by_image(drawn, lists):
    way, _ = drawn
    offsets = np.cumsum([0, *map(len, lists)])
    labels = np.array([label for own in lists for label in sorted(own)], np.int32)
    bounds, mapped = mapped_lists(offsets, labels, way)
    for own, first, end in zip(lists, bounds[:-1], bounds[1:], strict=True):
        assert mapped[first:end].tolist() == sorted({int(way.labels[k]) for k in own} - {LEFT_OUT})


@FAST
@given(ways(), samples(), st.sets(st.integers(0, PACKED - 1)), st.sets(st.integers(0, PACKED - 1)))
def test_what_an_image_is_marked_for_is_never_unknown_and_what_nobody_looked_for_always(
    drawn, sample, negative, partly
):
    way, _ = drawn
    present = set(sample.labels.tolist())
    negative -= present
    lists = (np.array(sorted(own), np.int64) for own in (negative, partly & present))
    sample = StoredSample(**{**vars(sample), "federated": Federated(*lists)})
    mask = class_mask(mapped_sample(sample, way), way, UNIFIED)
    for label in range(UNIFIED):
        own = set(np.flatnonzero(way.labels == label).tolist())
        if own & present:
            looked_for = own <= present | negative and not own & partly & present
            assert mask[label] == (0 if looked_for else NOT_EXHAUSTIVE)
        else:
            assert mask[label] == (0 if own and own <= negative else UNKNOWN)
