"""The class loss and the class cost in parts: as the plain statement, unknown classes exactly without a gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.data.batch import NO_LABEL, NOT_EXHAUSTIVE, UNKNOWN, Batch
from mf_scale.kernels import class_rows
from mf_scale.kernels.class_rows import asked_classes, parts
from mf_scale.losses import reference
from mf_scale.losses.class_loss import class_loss
from mf_scale.losses.criterion import Criterion, Normalisers, target_totals
from mf_scale.losses.long_tail import make_adjustment
from mf_scale.matching.class_cost import class_probabilities
from mf_scale.matching.cost import pairwise_cost
from mf_scale.matching.hungarian import match
from mf_scale.models.outputs import Classifier, MaskPrediction
from tests.random_batches import CLASSES, leaves, random_batch, random_prediction

Case = tuple[Tensor, Classifier, Tensor, Tensor, Tensor]


def _case(seed: int, images: int, rows: int, classes: int, width: int, *, bias: bool = True) -> Case:
    """Embeddings [B,R,W], classifier, labels [B,4], targets [B,R] (a segment's class or none), mask [B,K]; fp64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    classifier = Classifier(normal(classes + 1, width), normal(classes + 1) if bias else None)
    labels = torch.randint(0, classes, (images, 4), generator=generator)
    labels[:, 3] = NO_LABEL
    chosen = torch.randint(0, 4, (images, rows), generator=generator)
    targets = labels.gather(1, chosen).remainder(classes + 1)
    mask = torch.randint(0, 3, (images, classes), generator=generator).to(torch.uint8)
    return normal(images, rows, width), classifier, labels, targets, mask


def _batch(labels: Tensor, mask: Tensor | None) -> Batch:
    nothing = torch.zeros(len(labels), 1, 1, 1, dtype=torch.int16)
    return Batch(nothing, nothing, labels, torch.zeros_like(labels), [""] * len(labels), mask)


def _plain(case: Case, no_object: float, masked: bool) -> Tensor:
    embeddings, classifier, labels, targets, mask = case
    batch = _batch(labels, mask if masked else None)
    total = embeddings.new_zeros(())
    for image, rows in enumerate(embeddings):
        logits = reference.asked_logits(classifier.logits(rows), targets[image], batch, image)
        total = total + reference.class_loss(logits, targets[image], no_object)
    return total


def _given(case: Case) -> list[Tensor]:
    return [t for t in (case[0], case[1].weight, case[1].bias) if t is not None]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 4),
    rows=st.integers(1, 9),
    classes=st.integers(1, 23),
    width=st.integers(1, 5),
    masked=st.booleans(),
    bias=st.booleans(),
    chunk=st.integers(1, 400),
    no_object=st.sampled_from([0.1, 1.0, 0.0]),
)
def test_loss_and_cost_are_the_plain_statement_whatever_the_parts(
    seed: int, images: int, rows: int, classes: int, width: int, masked: bool, bias: bool, chunk: int, no_object: float
) -> None:
    case = _case(seed, images, rows, classes, width, bias=bias)
    embeddings, classifier, labels, targets, mask = case
    weights = torch.ones(classes + 1, dtype=torch.float64)
    weights[-1] = no_object
    asked = asked_classes(mask, labels) if masked else None
    before = class_rows.CHUNK["cpu"]
    class_rows.CHUNK["cpu"] = chunk
    try:
        total, by_row = class_loss(embeddings, classifier, targets, weights, asked=asked)
        probability = class_probabilities(embeddings, classifier, labels, asked)
    finally:
        class_rows.CHUNK["cpu"] = before
    wanted = _plain(case, no_object, masked)
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(by_row.sum(), wanted.detach())
    for mine, right in zip(*(torch.autograd.grad(value, _given(case)) for value in (total, wanted)), strict=True):
        torch.testing.assert_close(mine, right)
    for image, logits in enumerate(classifier.logits(embeddings.detach())):
        unknown = reference.unknown_classes(_batch(labels, mask if masked else None), image)
        right = reference.without(logits, unknown).softmax(-1)[:, labels[image, :3]]
        torch.testing.assert_close(probability[image, :, :3], right)


@given(images=st.integers(1, 9), rows=st.integers(1, 9), classes=st.integers(1, 9), chunk=st.integers(1, 900))
def test_parts_are_all_rows_once_in_order_and_no_larger_than_allowed(
    images: int, rows: int, classes: int, chunk: int
) -> None:
    before = class_rows.CHUNK["cpu"]
    class_rows.CHUNK["cpu"] = chunk
    try:
        found = list(parts(torch.empty(images, rows, 1), classes))
    finally:
        class_rows.CHUNK["cpu"] = before
    numbers = torch.arange(images * rows).view(images, rows)
    assert torch.cat([numbers[part].flatten() for part in found]).tolist() == numbers.flatten().tolist()
    assert all(numbers[part].numel() * classes <= max(chunk, classes) for part in found)


def test_gradcheck_and_no_second_derivative() -> None:
    case = _case(0, 2, 3, 4, 2)
    weights, asked = torch.rand(5, dtype=torch.float64), asked_classes(case[4], case[2])

    def total(embeddings: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return class_loss(embeddings, Classifier(weight, bias), case[3], weights, asked=asked)[0]

    assert gradcheck(total, _given(case))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total(*_given(case)), _given(case), create_graph=True)


@pytest.mark.parametrize("balance", ["balanced", "seesaw", "equalisation"])
def test_an_adjustment_is_a_constant_added_to_the_logits(balance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts too, and with classes that are unknown."""
    embeddings, classifier, labels, targets, mask = case = _case(3, 3, 4, 6, 3)
    adjust = make_adjustment(LossConfig(class_balance=balance), [1, 50, 2, 1000, 30, 7])
    assert adjust is not None
    weights, batch = torch.ones(7, dtype=torch.float64), _batch(labels, mask)
    wanted = embeddings.new_zeros(())
    for image, rows in enumerate(embeddings):
        logits = reference.asked_logits(classifier.logits(rows), targets[image], batch, image)
        wanted = wanted + reference.class_loss(logits + adjust(logits.detach(), targets[image]), targets[image], 1.0)
    monkeypatch.setitem(class_rows.CHUNK, "cpu", 7 * 3)
    total, _ = class_loss(
        embeddings, classifier, targets, weights, asked=asked_classes(mask, labels), adjustment=adjust
    )
    torch.testing.assert_close(total, wanted)
    plain, _ = class_loss(embeddings, classifier, targets, weights, asked=asked_classes(mask, labels))
    assert not torch.allclose(total, plain), "the adjustment has a say"
    for mine, right in zip(*(torch.autograd.grad(value, _given(case)) for value in (total, wanted)), strict=True):
        torch.testing.assert_close(mine, right)


def test_a_class_with_a_segment_is_known_and_padding_means_nothing() -> None:
    mask = torch.tensor([[UNKNOWN, UNKNOWN, NOT_EXHAUSTIVE, 0], [UNKNOWN, 0, UNKNOWN, UNKNOWN]], dtype=torch.uint8)
    labels = torch.tensor([[1, 2, 1], [NO_LABEL] * 3])
    wanted = [[UNKNOWN, 0, NOT_EXHAUSTIVE, 0, 0], [UNKNOWN, 0, UNKNOWN, UNKNOWN, 0]]
    assert asked_classes(mask, labels).tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_made_in_fp32_and_gradients_come_in_the_type_of_their_tensors(dtype: torch.dtype) -> None:
    embeddings, classifier, _, targets, _ = _case(1, 2, 50, 40, 8)
    made = (embeddings, classifier, targets, targets, targets)
    narrow = [t.detach().to(dtype).requires_grad_() for t in _given(made)]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = class_loss(narrow[0], Classifier(*narrow[1:]), targets, torch.ones(41))
    right, _ = class_loss(wide[0], Classifier(*wide[1:]), targets, torch.ones(41, dtype=torch.float64))
    assert total.dtype == torch.float32 and right.dtype == torch.float64
    torch.testing.assert_close(total.double(), right, rtol=1e-6, atol=0)
    precision = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for mine, wanted in zip(torch.autograd.grad(total, narrow), torch.autograd.grad(right, wide), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), wanted, rtol=precision, atol=precision * float(wanted.abs().max()))


def test_equal_inputs_give_equal_bits_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(class_rows.CHUNK, "cpu", 500)
    embeddings, classifier, _, targets, _ = case = _case(2, 3, 40, 60, 16)
    found = []
    for _ in range(2):
        total, _ = class_loss(embeddings, classifier, targets, torch.ones(61, dtype=torch.float64))
        found.append([total, *torch.autograd.grad(total, _given(case))])
    assert all(map(torch.equal, *found))


def _masked_batch(mask: int) -> tuple[Batch, int]:
    """Four images; in the first two, class `hidden`, which no segment of theirs has, is masked."""
    batch = random_batch([3, 0, 5, 4])
    hidden = CLASSES - 1
    batch.labels[:2][batch.labels[:2] == hidden] = 0
    batch.labels[2, 0] = hidden
    class_mask = torch.zeros(4, CLASSES, dtype=torch.uint8)
    class_mask[:2, hidden] = mask
    return replace(batch, class_mask=class_mask), hidden


def _first_two(prediction: MaskPrediction, batch: Batch) -> tuple[MaskPrediction, Batch]:
    assert batch.class_mask is not None
    tensors = {name: getattr(batch, name)[:2] for name in ("segment_map", "labels", "segment_layer", "class_mask")}
    return prediction.first(2), replace(batch, **tensors, keys=batch.keys[:2])


def _all_that_follows(prediction: MaskPrediction, batch: Batch, chunk: int) -> list[Tensor]:
    """Cost, loss, terms and all gradients."""
    before = class_rows.CHUNK["cpu"]
    class_rows.CHUNK["cpu"] = chunk
    try:
        criterion = Criterion(LossConfig(), MatchingConfig(), CLASSES, 5)
        normalisers = Normalisers(*target_totals(batch, 5, 0.1))
        cost = pairwise_cost(prediction, batch, criterion.matching, criterion.loss)
        terms = criterion(prediction, batch, normalisers)
        gradients = torch.autograd.grad(terms.total, leaves(prediction))
    finally:
        class_rows.CHUNK["cpu"] = before
    return [cost.total, match(cost, batch, "strict").labels, terms.total, *terms.layers.values(), *gradients]


@pytest.mark.parametrize("chunk", [2**21, 3 * (CLASSES + 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_unknown_class_has_no_say_and_no_gradient_to_the_bit(dtype: torch.dtype, chunk: int) -> None:
    """Whatever its row of the classifier is: in the cost, the matching, the loss and every gradient."""
    batch, hidden = _masked_batch(UNKNOWN)
    whole = random_prediction(4, dtype=dtype)
    prediction, part = _first_two(whole, batch)
    found = []
    for scale in (1.0, -7.0, 1e4):
        with torch.no_grad():
            whole.classifier.weight[hidden] *= scale
            assert whole.classifier.bias is not None
            whole.classifier.bias[hidden] += scale
        own = [tensor.detach().requires_grad_() for tensor in leaves(prediction)]
        found.append(_all_that_follows(_from_leaves(prediction, own), part, chunk))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    weight, bias = found[0][-3:-1]
    assert (weight[hidden] == 0).all() and bias[hidden] == 0
    others = [k for k in range(CLASSES + 1) if k != hidden]
    assert (weight[others] != 0).all() and (bias[others] != 0).all()
    known = _all_that_follows(prediction, replace(part, class_mask=None), chunk)
    assert (known[-3][hidden] != 0).all() and known[2] != found[0][2], "without the mask it has"


def _from_leaves(prediction: MaskPrediction, own: list[Tensor]) -> MaskPrediction:
    """The prediction with other tensors, in the order of `leaves`."""
    layers = [type(prediction.layers()[0])(*own[2 * i : 2 * i + 2]) for i in range(len(prediction.layers()))]
    weight, bias, pixels = own[2 * len(layers) :]
    last = layers[-1]
    return MaskPrediction(
        last.class_embeddings, last.mask_embeddings, pixels, Classifier(weight, bias), tuple(layers[:-1])
    )


def test_in_a_mixed_batch_the_gradient_of_a_class_comes_from_the_images_that_know_it() -> None:
    batch, hidden = _masked_batch(UNKNOWN)
    prediction = random_prediction(4)
    criterion, step = Criterion(LossConfig(), MatchingConfig(), CLASSES, 5), Normalisers(12, 20)
    total = criterion(prediction, batch, step).total
    weight, *embeddings = torch.autograd.grad(
        total, [prediction.classifier.weight, *(layer.class_embeddings for layer in prediction.layers())]
    )
    known = replace(
        batch,
        **{name: getattr(batch, name)[2:] for name in ("segment_map", "labels", "segment_layer")},
        keys=batch.keys[2:],
        class_mask=None,
    )
    tail = MaskPrediction(
        prediction.class_embeddings[2:],
        prediction.mask_embeddings[2:],
        prediction.pixel_embeddings[2:],
        prediction.classifier,
        tuple(type(x)(x.class_embeddings[2:], x.mask_embeddings[2:]) for x in prediction.aux),
    )
    (alone,) = torch.autograd.grad(criterion(tail, known, step).total, [prediction.classifier.weight])
    torch.testing.assert_close(weight[hidden], alone[hidden], rtol=1e-12, atol=1e-14)
    assert (weight[hidden] != 0).all() and all((e != 0).all() for e in embeddings)


def test_not_exhaustive_leaves_the_unmatched_queries_alone() -> None:
    """A matched query is still wrong to name the class; the matching still weighs it."""
    batch, hidden = _masked_batch(NOT_EXHAUSTIVE)
    prediction, part = _first_two(random_prediction(4), batch)
    unmasked = replace(part, class_mask=None)
    loss, matching = LossConfig(), MatchingConfig()
    cost = pairwise_cost(prediction, part, matching, loss)
    assert torch.equal(cost.total, pairwise_cost(prediction, unmasked, matching, loss).total)
    pairs = match(cost, part, "strict")
    targets = pairs.labels.remainder(CLASSES + 1)
    assert part.class_mask is not None
    asked = asked_classes(part.class_mask, part.labels)
    stacked = prediction.stacked().class_embeddings.flatten(1, 2)
    logits = prediction.classifier.logits(stacked).detach().requires_grad_()
    identity = Classifier(torch.eye(CLASSES + 1, dtype=torch.float64))
    weights = torch.ones(CLASSES + 1, dtype=torch.float64)
    total, _ = class_loss(logits, identity, targets, weights, asked=asked)
    (gradient,) = torch.autograd.grad(total, logits)
    matched = targets < CLASSES
    assert matched[0].sum() == 6 and not matched[1].any()
    assert (gradient[~matched][:, hidden] == 0).all() and (gradient[matched][:, hidden] > 0).all()
    assert (gradient[~matched][:, 0] > 0).all()


def test_the_criterion_is_the_reference_with_any_mask() -> None:
    generator = torch.Generator().manual_seed(4)
    for seed in range(4):
        batch, prediction = random_batch([3, 0, 5, 7], seed=seed), random_prediction(4, seed=seed)
        mask = torch.randint(0, 3, (4, CLASSES), generator=generator).to(torch.uint8)
        batch = replace(batch, class_mask=mask)
        criterion = Criterion(LossConfig(), MatchingConfig(), CLASSES, 5)
        step = Normalisers(*target_totals(batch, 5, 0.1))
        got = criterion(prediction, batch, step)
        wanted = reference.reference_loss(
            prediction, batch, step.num_masks, step.class_weight, criterion.loss, criterion.matching
        )
        torch.testing.assert_close(got.total, sum(wanted.values()))
        mine, right = (
            torch.autograd.grad(total, leaves(prediction), allow_unused=True)
            for total in (got.total, torch.stack(list(wanted.values())).sum())
        )
        for one, other in zip(mine, right, strict=True):
            torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)
