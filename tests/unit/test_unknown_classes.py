"""A class that is unknown in an image, in the whole model: no gradient, no say in the matching, in any kind of loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mf_scale.config.schema import Config
from mf_scale.data.batch import NOT_EXHAUSTIVE, UNKNOWN, Batch
from mf_scale.kernels import class_rows
from mf_scale.losses.choose import choose_criterion
from mf_scale.losses.criterion import Normalisers, target_totals
from mf_scale.losses.terms import LossTerms
from mf_scale.matching.cost import pairwise_cost
from mf_scale.matching.hungarian import match
from mf_scale.models.build import build_model
from mf_scale.models.outputs import Classifier, MaskPrediction
from mf_scale.models.text_head import CLASS_ROWS
from tests.random_batches import CLASSES, random_batch
from tests.unit.painted import painted_config

HIDDEN = CLASSES - 1
"""Unknown in the first image."""
GONE = CLASSES - 2
"""Unknown in both."""
IMAGES = [3, 400, 50, 1000, 7, 20, 4]


def config_of(balance: str = "none", precision: str = "fp32") -> Config:
    config = painted_config(train__global_batch=2)
    config.loss.class_balance = balance
    config.train.precision = precision
    config.model.backbone = replace(config.model.backbone, name="resnet10t", weights="none")
    config.model.pixel_decoder = replace(config.model.pixel_decoder, width=16, mask_channels=16)
    decoder = replace(config.model.decoder, layers=3, queries=6, width=16, heads=2, feedforward=16, dropout=0.0)
    config.model.decoder = decoder
    return config


def batch_of() -> Batch:
    """Two images; HIDDEN is unknown in the first and present in the second, GONE unknown in both."""
    batch = random_batch([3, 4], (64, 96))
    batch.labels[batch.labels >= GONE] = 0
    batch.labels[1, 0] = HIDDEN
    class_mask = torch.zeros(2, CLASSES, dtype=torch.uint8)
    class_mask[0, HIDDEN] = class_mask[:, GONE] = UNKNOWN
    return replace(batch, class_mask=class_mask)


def model_of(config: Config, text: bool = False) -> nn.Module:
    """A model whose hidden classes would be the first choice of every query."""
    rows = torch.randn(CLASSES, 12, generator=torch.Generator().manual_seed(3)) if text else None
    model = build_model(config.model, CLASSES, seed=1, class_rows=rows).train()
    if not text:
        with torch.no_grad():
            heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
            (head,) = [module for module in heads if module.out_features == CLASSES + 1]
            head.bias[GONE:CLASSES] += 4.0
    return model


def class_head(model: nn.Module) -> nn.Linear:
    (head,) = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES + 1]
    return head


def terms_of(model: nn.Module, config: Config, batch: Batch, *, bf16: bool = False) -> LossTerms:
    criterion = choose_criterion(config, CLASSES, IMAGES)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        prediction = model(batch.images)
    step = Normalisers(*target_totals(batch, config.model.decoder.queries, config.loss.no_object_weight))
    return criterion(prediction, batch, step)


@pytest.mark.parametrize("chunk", [2**21, 3 * (CLASSES + 1)])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("balance", ["none", "balanced", "seesaw", "equalisation"])
def test_the_rows_of_a_class_that_no_image_knows_get_exactly_no_gradient(
    balance: str, bf16: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all decoder layers supervised; of one that the second image knows, they come from that image alone."""
    monkeypatch.setitem(class_rows.CHUNK, "cpu", chunk)  # all logits at once, which the matching made, or in parts
    config, batch = config_of(balance), batch_of()
    model, found = model_of(config), []
    head = class_head(model)
    for mask in (batch.class_mask, None):
        terms = terms_of(model, config, replace(batch, class_mask=mask), bf16=bf16)
        assert len(terms.layers["class"]) == 3, "deep supervision"
        found.append(torch.autograd.grad(terms.total, [head.weight, head.bias]))
    for masked, plain in zip(*found, strict=True):
        assert (masked[GONE] == 0).all() and (plain[GONE] != 0).any(), "without the mask it has one"
        assert all((masked[k] != 0).any() for k in range(CLASSES + 1) if k != GONE)


def test_the_gradient_of_a_class_that_one_image_knows_is_that_image_s_alone() -> None:
    """Norms are frozen, so that images are seen each by itself."""
    config, batch = config_of(), batch_of()
    model = model_of(config)
    head = class_head(model)
    step = Normalisers(7, 12)
    criterion = choose_criterion(config, CLASSES, IMAGES)

    def row_of(some: Batch) -> Tensor:
        (weight,) = torch.autograd.grad(criterion(model(some.images), some, step).total, [head.weight])
        return weight[HIDDEN]

    def only(image: int) -> Batch:
        here = slice(image, image + 1)
        names = ("images", "segment_map", "labels", "segment_layer", "class_mask")
        return replace(batch, **{n: getattr(batch, n)[here] for n in names}, keys=batch.keys[here])

    assert (row_of(only(0)) == 0).all()
    torch.testing.assert_close(row_of(batch), row_of(only(1)), rtol=1e-4, atol=1e-7)
    assert (row_of(batch) != 0).any()


def test_with_a_text_head_no_gradient_comes_through_the_logit_of_an_unknown_class() -> None:
    """It has no row to train; so whatever its embedding is, every gradient of the model is the same to the bit."""
    config, batch = config_of(), batch_of()

    model = model_of(config, text=True)
    rows = dict(model.named_buffers())[CLASS_ROWS]
    first = rows.clone()

    def gradients(row: Tensor, mask: Tensor | None) -> list[Tensor]:
        rows[GONE] = row
        total = terms_of(model, config, replace(batch, class_mask=mask)).total
        return list(torch.autograd.grad(total, [value for value in model.parameters() if value.requires_grad]))

    turned = -first[GONE].roll(3)
    same, other = (gradients(row, batch.class_mask) for row in (first[GONE], turned))
    assert len(same) > 20 and all(map(torch.equal, same, other))
    bare, bare_other = (gradients(row, None) for row in (first[GONE], turned))
    assert not all(map(torch.equal, bare, bare_other)), "without the mask it has a say"


@pytest.mark.parametrize("mask", [UNKNOWN, NOT_EXHAUSTIVE])
def test_the_matching_does_not_hear_of_unknown_classes(mask: int) -> None:
    """A query that would give all its probability to an unknown class costs what the others' logits say."""
    config, batch = config_of(), batch_of()
    with torch.no_grad():
        given = model_of(config)(batch.images)
    assert isinstance(given, MaskPrediction) and given.classifier.bias is not None and batch.class_mask is not None

    def pairs(mask: Tensor | None, lift: float) -> tuple[Tensor, Tensor]:
        bias = given.classifier.bias.clone()  # type: ignore[union-attr]
        bias[GONE] += lift
        prediction = replace(given, classifier=Classifier(given.classifier.weight, bias))
        own = replace(batch, class_mask=mask)
        cost = pairwise_cost(prediction, own, config.matching, config.loss)
        return cost.total, match(cost, own, "strict").labels

    of_mask = torch.where(batch.class_mask == UNKNOWN, mask, batch.class_mask)
    (low, first), (high, second) = pairs(of_mask, -3.0), pairs(of_mask, 30.0)
    heard = not torch.equal(low, high)
    assert heard == (mask == NOT_EXHAUSTIVE), "one that is only not marked through is weighed"
    assert heard or torch.equal(first, second)
    assert not torch.equal(pairs(None, -3.0)[0], pairs(None, 30.0)[0])
