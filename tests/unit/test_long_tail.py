"""Class losses for long tails: their papers' formulas spelt out; and the plain loss where nothing is to balance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mf_scale.config.load import load_config
from mf_scale.config.schema import LossConfig
from mf_scale.config.validate import validate
from mf_scale.errors import UserError
from mf_scale.losses.choose import choose_criterion
from mf_scale.losses.class_loss import class_loss
from mf_scale.losses.criterion import Criterion
from mf_scale.losses.long_tail import make_adjustment
from mf_scale.models.outputs import Classifier
from mf_scale.vocabulary import log_prior
from tests.random_batches import CLASSES, random_batch, random_prediction

IMAGES = [1000, 3, 120, 0, 100]
"""The last is rare by the hair that loss.equalisation_images draws."""
K = len(IMAGES)
BALANCES = ("balanced", "seesaw", "equalisation")


def settings(balance: str, **others: float) -> LossConfig:
    loss = LossConfig(class_balance=balance)
    for name, value in others.items():
        setattr(loss, name, value)
    return loss


def rows(seed: int = 0, count: int = 40) -> tuple[Tensor, Tensor]:
    """Logits [n,K+1] in fp64, some far apart, and a target each: every class and no-object."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, K + 1, dtype=torch.float64, generator=generator) * 4
    return logits, torch.arange(count) % (K + 1)


def losses(logits: Tensor, targets: Tensor, loss: LossConfig, images: list[int]) -> Tensor:
    """Of each row, through what the criterion calls: the embeddings are the logits."""
    adjustment = make_adjustment(loss, images)
    identity = Classifier(torch.eye(logits.shape[1], dtype=logits.dtype))
    weights = torch.ones(logits.shape[1], dtype=logits.dtype)
    return class_loss(logits[None], identity, targets[None], weights, adjustment=adjustment)[1][0]


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    return losses(logits, targets, LossConfig(), IMAGES)


def by_hand(balance: str, z: list[float], target: int) -> float:
    """One row by the paper's formula, in plain Python."""
    count = [max(1, n) for n in IMAGES]
    e = [math.exp(value) for value in z]
    if balance == "balanced":
        object_share = sum(e[:K]) / sum(e)
        if target == K:
            return -math.log(1 - object_share)
        return -math.log(
            object_share * count[target] * e[target] / sum(n * x for n, x in zip(count, e[:K], strict=True))
        )
    if target == K:
        return -math.log(e[K] / sum(e))
    if balance == "equalisation":
        weight = [0.1 if j != target and IMAGES[j] <= 100 else 1.0 for j in range(K)] + [1.0]
        return -math.log(e[target] / sum(w * x for w, x in zip(weight, e, strict=True)))
    sigma = [x / sum(e[:K]) for x in e[:K]]
    total = e[target] + e[K]
    for j in range(K):
        if j != target:
            mitigation = 1.0 if count[target] <= count[j] else (count[j] / count[target]) ** 0.8
            right = max(sigma[target], 0.01)
            compensation = 1.0 if sigma[j] <= right else (sigma[j] / right) ** 2
            total += mitigation * compensation * e[j]
    return -math.log(e[target] / total)


@pytest.mark.parametrize("balance", BALANCES)
def test_each_is_its_papers_formula_and_leaves_no_object_alone(balance: str) -> None:
    logits, targets = rows()
    expected = [by_hand(balance, z, int(t)) for z, t in zip(logits.tolist(), targets, strict=True)]
    found = losses(logits, targets, settings(balance), IMAGES)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10)
    of_objects = targets < K
    assert not torch.allclose(found[of_objects], plain(logits, targets)[of_objects], rtol=1e-3)
    # A query without a segment has the plain loss, whatever is made of the classes.
    assert torch.allclose(found[~of_objects], plain(logits, targets)[~of_objects], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("loss", "images"),
    [
        (settings("balanced"), [7] * K),
        (settings("balanced"), [0] * K),
        (settings("seesaw", seesaw_p=0.0, seesaw_q=0.0), IMAGES),
        (settings("seesaw", seesaw_q=0.0), [7] * K),
        (settings("equalisation", equalisation_share=0.0), IMAGES),
        (settings("equalisation"), [101] * K),
        (LossConfig(), IMAGES),
    ],
)
def test_where_there_is_nothing_to_balance_the_loss_is_the_plain_one_to_the_bit(
    loss: LossConfig, images: list[int], dtype: torch.dtype
) -> None:
    logits, targets = rows(1)
    logits = logits.to(dtype).requires_grad_()
    found, expected = losses(logits, targets, loss, images), plain(logits, targets)
    assert torch.equal(found, expected)
    gradients = [
        _gradient(logits.detach(), targets, make_adjustment(loss, images)),
        _gradient(logits.detach(), targets),
    ]
    assert torch.equal(*gradients)


def _gradient(logits: Tensor, targets: Tensor, adjustment: object = None) -> Tensor:
    embeddings = logits.clone().requires_grad_()
    weights = torch.linspace(0.5, 1.5, logits.shape[1], dtype=logits.dtype)
    identity = Classifier(torch.eye(logits.shape[1], dtype=logits.dtype))
    class_loss(embeddings[None], identity, targets[None], weights, adjustment=adjustment)[0].backward()  # type: ignore[arg-type]
    assert embeddings.grad is not None
    return embeddings.grad


@pytest.mark.parametrize("balance", BALANCES)
def test_the_gradient_is_that_of_the_loss_with_what_is_added_held_still(balance: str) -> None:
    logits, targets = rows(2, 12)
    adjustment = make_adjustment(settings(balance), IMAGES)
    assert adjustment is not None
    added = adjustment(logits, targets)
    weights = torch.linspace(0.5, 1.5, K + 1, dtype=torch.float64)

    def total(at: Tensor) -> float:
        return float(F.cross_entropy(at + added, targets, weights, reduction="sum"))

    found, step = _gradient(logits, targets, adjustment), 1e-6
    for row in range(len(logits)):
        for column in range(K + 1):
            moved = torch.zeros_like(logits)
            moved[row, column] = step
            expected = (total(logits + moved) - total(logits - moved)) / (2 * step)
            assert abs(float(found[row, column]) - expected) < 1e-6 * max(1.0, abs(expected)), (row, column)


@pytest.mark.parametrize("balance", BALANCES)
def test_what_is_added_is_zero_for_no_object_and_finite_beside_unknown_classes(balance: str) -> None:
    logits, targets = rows(3)
    unknown = torch.zeros_like(logits, dtype=torch.bool)
    unknown[::2, [0, 3]] = True
    unknown[torch.arange(len(targets)), targets] = False
    hidden = logits.masked_fill(unknown, -torch.inf)
    adjustment = make_adjustment(settings(balance), IMAGES)
    assert adjustment is not None
    added = adjustment(hidden, targets)
    assert added.shape == logits.shape and added.isfinite().all()
    assert (added[:, K] == 0).all()
    if balance != "balanced":
        assert (added[torch.arange(len(targets)), targets] == 0).all() and (added[targets == K] == 0).all()
    # An unknown class has no say in what the others get: as if there were none of it.
    for z, target, left, own in zip(logits, targets, unknown, added, strict=True):
        kept = [k for k in range(K + 1) if not left[k]]
        smaller = make_adjustment(settings(balance), [IMAGES[k] for k in kept[:-1]])
        assert smaller is not None
        of_kept = smaller(z[kept][None], torch.tensor([kept.index(int(target))]))[0]
        assert torch.allclose(of_kept, own[kept], atol=1e-12)


def test_a_row_in_which_nothing_but_no_object_is_known_is_left_alone() -> None:
    logits = torch.full((1, K + 1), -torch.inf)
    logits[0, K] = 1.0
    for balance in BALANCES:
        adjustment = make_adjustment(settings(balance), IMAGES)
        assert adjustment is not None
        assert not adjustment(logits, torch.tensor([K])).isnan().any()


def test_balanced_training_finds_the_plain_no_object_and_the_posterior_over_the_prior() -> None:
    """One point of the input space, where no-object is right in 60% and the classes share the rest 8:1:1."""
    images, right = [800, 100, 100], torch.tensor([0.32, 0.04, 0.04, 0.6], dtype=torch.float64)
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    adjustment = make_adjustment(settings("balanced"), images)
    assert adjustment is not None
    optimizer = torch.optim.SGD([logits], lr=1.0)
    for _ in range(2000):
        optimizer.zero_grad()
        every = logits.expand(4, 4)
        targets = torch.arange(4)
        F.cross_entropy(every + adjustment(every.detach(), targets), targets, right, reduction="sum").backward()
        optimizer.step()
    found = logits.detach().softmax(0)
    assert torch.allclose(found[3], right[3], atol=1e-6)
    assert torch.allclose(found[:3], torch.full((3,), 0.4 / 3, dtype=torch.float64), atol=1e-6)


def test_equalisation_may_leave_rare_negatives_out_altogether() -> None:
    logits, targets = rows(4)
    found = losses(logits, targets, settings("equalisation", equalisation_share=1.0), IMAGES)
    rare = [j for j, count in enumerate(IMAGES) if count <= 100]
    for z, target, value in zip(logits, targets.tolist(), found, strict=True):
        kept = [j for j in range(K + 1) if target in (K, j) or j not in rare]
        expected = F.cross_entropy(z[kept], torch.tensor(kept.index(target)))
        assert torch.allclose(value, expected)


def test_the_prior_is_an_even_one_where_counts_are_equal_and_finite_where_there_are_none() -> None:
    assert log_prior([3, 3, 3]) == [0.0, 0.0, 0.0]
    assert log_prior([0, 2]) == [math.log(2 / 3), math.log(4 / 3)]


def test_the_criterion_has_the_adjustment_of_the_configuration() -> None:
    for balance, kind in (("none", "NoneType"), ("seesaw", "Seesaw"), ("balanced", "BalancedSoftmax")):
        criterion = choose_criterion(load_config(None, [f"loss.class_balance={balance}"]), K, IMAGES)
        assert isinstance(criterion, Criterion) and type(criterion.adjustment).__name__ == kind


@pytest.mark.parametrize("balance", BALANCES)
def test_a_step_of_training_differs_in_the_class_term_alone(balance: str) -> None:
    """The criterion as a run makes it: the same matching and masks, another class loss, other gradients by it."""
    plain_of, balanced_of = _step("none"), _step(balance)
    for same in ("focal", "pixels"):
        assert torch.equal(plain_of[same], balanced_of[same])
    for other in ("class", "classifier"):
        assert not torch.allclose(plain_of[other], balanced_of[other], rtol=1e-3)


def _step(balance: str) -> dict[str, Tensor]:
    """Two loss terms and two gradients of a random step."""
    batch, prediction = random_batch([3, 0, 5]), random_prediction(3)
    said = [f"loss.class_balance={balance}", "model.decoder.queries=5"]
    criterion = choose_criterion(load_config(None, said), CLASSES, [1000, 3, 120, 0, 40, 7, 900])
    terms = criterion(prediction, batch, criterion.normalisers(criterion.totals(batch)))
    gradients = torch.autograd.grad(terms.total, [prediction.classifier.weight, prediction.pixel_embeddings])
    return {
        **{name: terms.terms[name] for name in ("class", "focal")},
        **dict(zip(("classifier", "pixels"), gradients, strict=True)),
    }


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (["loss.seesaw_p=1.0"], r"loss\.seesaw_p = 1\.0 does nothing with loss\.class_balance = none"),
        (["loss.class_balance=seesaw", "loss.equalisation_images=5"], r"equalisation_images = 5 does nothing"),
        (["loss.class_balance=seesaw", "loss.seesaw_q=-1"], r"loss\.seesaw_q = -1\.0 must not be negative"),
        (["loss.class_balance=equalisation", "loss.equalisation_share=1.5"], r"must lie in 0\.\.1"),
        (["loss.class_balance=seesaw", "model.kind=per_pixel", "data.task=semantic"], r"needs model\.kind = mask_cl"),
        (["eval.logit_adjustment=-1"], r"eval\.logit_adjustment = -1\.0 must not be negative"),
        (["model.class_embeddings=''"], r"model\.class_embeddings is empty"),
        (["model.class_embeddings=~/a.npy"], r"~ is not expanded here"),
        (["model.class_embeddings=a.npy", "model.kind=per_pixel", "data.task=semantic"], r"class head of queries"),
    ],
)
def test_options_that_do_nothing_or_cannot_be_are_refused(said: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        validate(load_config(None, said))
