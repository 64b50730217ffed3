"""The per-pixel loss: against torch's own operator, its edges, its memory, its normaliser over a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from mf_scale.config.load import load_config
from mf_scale.data.batch import IGNORE, NONE, NOT_EXHAUSTIVE, UNKNOWN
from mf_scale.data.collate import cut
from mf_scale.losses.choose import choose_criterion
from mf_scale.losses.criterion import Criterion
from mf_scale.losses.pixel_criterion import PixelCriterion, pixel_classes, unknown_classes
from mf_scale.losses.pixel_loss import UNCOUNTED, pixel_loss
from mf_scale.models.build import build_model
from mf_scale.models.outputs import PixelPrediction
from tests.random_batches import CLASSES, pixel_leaves, pixel_part, random_batch, random_pixel_prediction


def _loss(prediction, batch):
    criterion = PixelCriterion()
    return criterion(prediction, batch, criterion.normalisers(criterion.totals(batch)))


def test_it_is_torchs_cross_entropy_of_upsampled_logits():
    batch, prediction = random_batch([3, 5]), random_pixel_prediction(2, layers=1)
    upsampled = F.interpolate(prediction.logits(), size=(24, 32), mode="bilinear", align_corners=False)
    wanted = F.cross_entropy(upsampled, pixel_classes(batch), ignore_index=UNCOUNTED)
    got = _loss(prediction, batch)
    torch.testing.assert_close(got.total, wanted)
    torch.testing.assert_close(got.terms, {"pixel": wanted.detach()})
    inputs = pixel_leaves(prediction)
    torch.testing.assert_close(torch.autograd.grad(got.total, inputs), torch.autograd.grad(wanted, inputs))


def test_pixels_take_their_segments_class_and_nothing_else():
    batch = random_batch([2], (2, 3))
    batch.labels[0] = torch.tensor([6, 0])
    batch.segment_map[0, 0] = torch.tensor([[0, 1, NONE], [IGNORE, 0, 1]], dtype=torch.int16)
    assert pixel_classes(batch).tolist() == [[[6, 0, -1], [-1, 6, 0]]]
    assert PixelCriterion().totals(batch) == (4.0,)


def test_each_layers_share_is_told_and_they_make_the_whole():
    batch, prediction = random_batch([3, 5]), random_pixel_prediction(2)
    got = _loss(prediction, batch)
    layers = got.layers["pixel"]
    assert not layers.requires_grad
    torch.testing.assert_close(layers.sum(), got.total.detach())
    last = PixelPrediction(prediction.class_embeddings, prediction.pixel_embeddings, prediction.bias)
    torch.testing.assert_close(layers[-1], _loss(last, batch).total.detach())
    assert len(layers) == 1 + len(prediction.aux) == 2


def test_gradcheck():
    batch = random_batch([3, 0], (9, 11))
    leaves = [t.detach().clone().requires_grad_() for t in pixel_leaves(random_pixel_prediction(2, size=(4, 5)))]
    embeddings = torch.stack(leaves[:2], dim=1).detach().requires_grad_()
    assert gradcheck(lambda e, p, b: pixel_loss(e, p, b, pixel_classes(batch)), (embeddings, *leaves[2:]))


@pytest.mark.parametrize("segments", [[0, 0], [2, 0]])
def test_without_a_labelled_pixel_the_loss_is_nought_and_the_graph_whole(segments):
    batch, prediction = random_batch(segments), random_pixel_prediction(2)
    batch.segment_map[:] = IGNORE
    got = _loss(prediction, batch)
    assert got.total == 0
    for gradient in torch.autograd.grad(got.total, pixel_leaves(prediction)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_computed_in_fp32(dtype):
    batch, half = random_batch([3, 2]), random_pixel_prediction(2, dtype=dtype)
    full = random_pixel_prediction(2)
    with torch.no_grad():
        for mine, theirs in zip(pixel_leaves(full), pixel_leaves(half), strict=True):
            mine.copy_(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        got = _loss(half, batch)
    assert got.total.dtype == torch.float32
    torch.testing.assert_close(got.total.double(), _loss(full, batch).total, rtol=1e-5, atol=0)
    assert all(g.dtype == dtype for g in torch.autograd.grad(got.total, pixel_leaves(half)))


def _bits(prediction, batch):
    total = _loss(prediction, batch).total
    return [total.detach(), *torch.autograd.grad(total, pixel_leaves(prediction))]


@pytest.mark.parametrize("value", [0, NOT_EXHAUSTIVE])
def test_where_all_is_known_the_loss_is_what_it_is_without_a_mask(value):
    batch, prediction = random_batch([3, 5]), random_pixel_prediction(2, dtype=torch.float32)
    masked = replace(batch, class_mask=torch.full((2, CLASSES), value, dtype=torch.uint8))
    assert all(map(torch.equal, _bits(prediction, masked), _bits(prediction, batch)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classes_that_are_unknown_are_as_if_they_were_not_there(dtype):
    """Of the first image 1 and 4 are unknown, of the second 4 and 5, which is marked there; 0 is what padding reads."""
    batch = random_batch([2, 2], ignored=True)
    batch.labels[:] = torch.tensor([[2, 6], [5, 3]])
    mask = torch.zeros(2, CLASSES, dtype=torch.uint8)
    mask[0, [0, 1, 4]] = mask[1, [0, 4, 5]] = UNKNOWN
    batch = replace(batch, class_mask=mask)
    unknown = unknown_classes(batch)
    assert unknown is not None
    assert [row.nonzero().flatten().tolist() for row in unknown] == [[0, 1, 4], [0, 4]]
    prediction = random_pixel_prediction(2, dtype=dtype)
    *layers, pixels, bias = (g.clone() for g in _bits(prediction, batch)[1:])
    for layer in layers:
        assert (layer[unknown] == 0).all() and (layer[~unknown] != 0).any(1).all()
    assert pixels.isfinite().all() and (bias[[0, 4]] == 0).all() and (bias[[1, 2, 3, 5, 6]] != 0).all()
    before = _bits(prediction, batch)
    with torch.no_grad():
        assert prediction.bias is not None
        for t in (*prediction.aux, prediction.class_embeddings):
            t[unknown] = 50.0
        prediction.bias[[0, 4]] = 1e4
    assert all(map(torch.equal, before, _bits(prediction, batch)))


def test_an_image_of_which_no_class_is_known_has_no_loss():
    batch, prediction = random_batch([3, 0]), random_pixel_prediction(2)
    mask = torch.tensor([0, UNKNOWN], dtype=torch.uint8)[:, None].expand(-1, CLASSES)
    assert all(map(torch.equal, _bits(prediction, replace(batch, class_mask=mask)), _bits(prediction, batch)))


def test_the_classifier_s_row_of_an_unknown_class_gets_exactly_no_gradient():
    config = load_config(None, ["model.kind=per_pixel", "model.backbone.name=resnet10t", "model.backbone.weights=none"])
    pixel_decoder = replace(config.model.pixel_decoder, width=16, mask_channels=16)
    model = build_model(replace(config.model, pixel_decoder=pixel_decoder), CLASSES, seed=0)
    batch = random_batch([2, 3], (64, 64))
    batch.labels[batch.labels == 5] = 3
    mask = torch.zeros(2, CLASSES, dtype=torch.uint8)
    mask[:, 5] = UNKNOWN
    _loss(model(batch.images), replace(batch, class_mask=mask)).total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for gradient in (gradients["classifier.weight"], gradients["classifier.bias"]):
        assert (gradient[5] == 0).all() and (gradient[:5] != 0).any()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_large_logits_stay_finite():
    batch, prediction = random_batch([3]), random_pixel_prediction(1, dtype=torch.float32)
    with torch.no_grad():
        prediction.pixel_embeddings.mul_(1e4)
    got = _loss(prediction, batch)
    assert got.total.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.total, pixel_leaves(prediction)))


@pytest.mark.parametrize("parts", [[(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 2), (2, 4)], [(0, 3), (3, 4)]])
def test_a_batch_of_four_equals_its_parts_under_the_steps_normaliser(parts):
    batch, prediction = random_batch([2, 0, 6, 4]), random_pixel_prediction(4)
    criterion = PixelCriterion()
    pieces = [cut(batch, a, b) for a, b in parts]
    step = criterion.normalisers([sum(criterion.totals(piece)[0] for piece in pieces)])
    totals = [
        criterion(pixel_part(prediction, a, b), piece, step).total for (a, b), piece in zip(parts, pieces, strict=True)
    ]
    whole, inputs = _loss(prediction, batch).total, pixel_leaves(prediction)
    torch.testing.assert_close(torch.stack(totals).sum(), whole)
    got = torch.autograd.grad(torch.stack(totals).sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(whole, inputs))


def test_equal_inputs_give_equal_bits():
    batch, prediction = random_batch([5, 6], (64, 64)), random_pixel_prediction(2, dtype=torch.float32)
    first, second = (_loss(prediction, batch).total for _ in range(2))
    inputs = pixel_leaves(prediction)
    assert torch.equal(first, second)
    assert all(map(torch.equal, torch.autograd.grad(first, inputs), torch.autograd.grad(second, inputs)))


def test_no_map_of_all_classes_is_kept_or_made_at_full_resolution():
    """847 classes at 512x512 would be 888 MB in fp32; the largest tensor that is made is one of the coarse logits."""
    classes, cells, side, channels = 847, 16, 512, 8
    made: list[int] = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            out = function(*arguments, **(named or {}))
            made.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    batch = random_batch([3], (side, side))
    prediction = random_pixel_prediction(
        1, layers=1, classes=classes, size=(cells, cells), channels=channels, dtype=torch.float32
    )
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), Largest():
        _loss(prediction, batch).total.backward()
    assert max(made) <= 2**20 < classes * side * side // 200
    assert max(kept) <= classes * channels


def test_without_gradients_none_is_made():
    batch, prediction = random_batch([3]), random_pixel_prediction(1)
    with torch.no_grad():
        silent = _loss(prediction, batch)
    assert not silent.total.requires_grad and silent.total == _loss(prediction, batch).total


def test_descent_finds_the_classes():
    batch = random_batch([3], (32, 32), ignored=False)
    prediction = random_pixel_prediction(1, layers=1, size=(8, 8), channels=8, dtype=torch.float32)
    optimizer = torch.optim.Adam(pixel_leaves(prediction), 0.05)
    history = []
    for _ in range(100):
        total = _loss(prediction, batch).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(float(total.detach()))
    assert history[-1] < 0.1 * history[0]


def test_the_kind_of_model_chooses_the_loss():
    kinds = {"mask_classification": Criterion, "per_pixel": PixelCriterion, "per_pixel_plus": PixelCriterion}
    for kind, wanted in kinds.items():
        criterion = choose_criterion(load_config(None, [f"model.kind={kind}"]), 5)
        assert type(criterion) is wanted
        batch = random_batch([2, 1])
        assert len(criterion.totals(batch)) == criterion.summed
        assert set(criterion.denominators(criterion.totals(batch))) == set(criterion.names)


def test_logits_are_the_factors_product():
    prediction = PixelPrediction(torch.ones(1, 2, 3), torch.full((1, 3, 1, 1), 2.0), torch.tensor([0.0, 1.0]))
    assert prediction.logits().flatten().tolist() == [6.0, 7.0]
    assert PixelPrediction(torch.ones(1, 2, 3), torch.full((1, 3, 1, 1), 2.0)).logits().flatten().tolist() == [6.0, 6.0]
