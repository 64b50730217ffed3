"""How many kernels the loss starts on a GPU, counted on a CPU by the operators that torch is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.kernels import mask_loss as operator
from mf_scale.kernels import triton_cost, triton_mask_loss
from mf_scale.losses import mask_loss as mask_loss_room
from mf_scale.losses.criterion import Criterion, Normalisers
from mf_scale.matching import cost as cost_room
from mf_scale.matching.cost import pairwise_cost
from mf_scale.matching.hungarian import match
from tests.random_batches import CLASSES, leaves, random_batch, random_prediction

TRITON_LAUNCHES = 3
"""Of the matching cost, and of the mask loss with its gradient."""
NO_KERNEL = ("empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "promote_types")
COPIES = {"to the host": 1, "to the device": 1}
"""Between host and device; they are no kernels and are counted apart."""


class Count(TorchDispatchMode):
    """Operators that start a kernel on a GPU, by name: neither views nor bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "mf_scale":  # what is in our operators counts: they run as the functions they are made of
            with self:
                return getattr(operator, name)._init_fn(*args, **(kwargs or {}))
        if not func.is_view and name not in NO_KERNEL:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch) -> Iterator[Counter[str]]:
    """Counts with Triton's functions replaced by stubs: tensors of their shapes, counted as their launches."""
    count = Count()

    def cost(probability, mask_embeddings, pixels, segment_map, segment_layer, weights):
        count.found["triton"] += TRITON_LAUNCHES
        with torch._C._DisableTorchDispatch():  # finite costs, at no launch
            return tuple(torch.rand(4, *probability.shape).unbind())

    def loss(logits, segment_map, segments, layers, counts, settings, *, want_gradient):
        # Else the kernels' wrapper would copy them, a launch each.
        assert all(x.is_contiguous() for x in (logits, segment_map, segments, layers, counts))
        count.found["triton"] += TRITON_LAUNCHES
        return torch.empty(segments.shape), torch.empty(segments.shape), torch.empty(logits.shape)

    monkeypatch.setattr(triton_cost, "pairwise_cost", cost)
    monkeypatch.setattr(triton_mask_loss, "mask_loss", loss)
    for room in (cost_room, mask_loss_room):
        monkeypatch.setattr(room, "choose_kernels", lambda *_: "triton")
    with count:
        yield count.found


@pytest.fixture
def copies(monkeypatch) -> Counter[str]:
    """Copies between host and device, which on a CPU are none: counted by the calls that make them."""
    seen: Counter[str] = Counter()
    for name, way, option in (("cpu", "to the host", None), ("to", "to the device", "non_blocking")):
        _count_calls(monkeypatch, name, seen, way, option)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        _count_calls(monkeypatch, name, seen, "to the host", None)
    return seen


def _count_calls(monkeypatch, name: str, seen: Counter[str], way: str, option: str | None) -> None:
    original = getattr(Tensor, name)

    def call(self, *arguments, **options):
        seen[way] += option is None or option in options
        return original(self, *arguments, **options)

    monkeypatch.setattr(Tensor, name, call)


def test_matching_cost_and_mask_loss_start_under_twenty_kernels(monkeypatch, copies):
    """From the embeddings in fp32, forward and backward; for any number of images, layers and segments.

    Counted: every operator of torch that is neither a view nor a bare allocation, as one kernel (those that are used
    here are one each on CUDA), and three for each Triton function. Not counted: the two copies between host and device,
    which are looked at apart; the class terms of cost and loss, with the stacking of their embeddings; and what puts
    the two losses together and reports them, which `test_the_whole_criterion` holds.
    """
    with torch.no_grad():
        probability = torch.rand(3, 4 * 5, 5)
    monkeypatch.setattr(cost_room, "class_probabilities", lambda *_: probability)
    batch, prediction = random_batch([3, 5, 0]), random_prediction(3, layers=4, dtype=torch.float32)
    config, matching = LossConfig(), MatchingConfig()
    criterion = Criterion(config, matching, CLASSES, 5)
    embeddings = [*(layer.mask_embeddings for layer in prediction.layers()), prediction.pixel_embeddings]
    given = torch.ones(())
    copies.clear()
    with counted(monkeypatch) as found:
        stacked = prediction.stacked()
        found["stack"] -= 1  # the class embeddings'
        pairs = match(pairwise_cost(prediction, batch, matching, config, stacked), batch, "strict")
        loss = criterion._mask_loss(stacked.mask_embeddings, prediction.pixel_embeddings, batch, pairs)
        forward = found.total()
        torch.autograd.grad(loss.total, embeddings, given)
    assert found["triton"] == 2 * TRITON_LAUNCHES and found["bmm"] == 3, found
    assert forward < found.total() < 20, (found.total(), found)
    assert copies == COPIES


def test_the_whole_criterion(monkeypatch, copies):
    """Also the class term of the cost (4), the class loss with the products of the class head (20 with the stack), the
    sum of both losses (2) and the terms reported (4), also by layer (11).
    """
    batch, prediction = random_batch([3, 5, 0]), random_prediction(3, layers=4, dtype=torch.float32)
    criterion, given = Criterion(LossConfig(), MatchingConfig(), CLASSES, 5), torch.ones(())
    copies.clear()
    with counted(monkeypatch) as found:
        total = criterion(prediction, batch, Normalisers(8, 9)).total
        torch.autograd.grad(total, leaves(prediction), given)
    assert found.total() < 20 + 4 + 20 + 2 + 4 + 11, (found.total(), found)
    assert copies == COPIES
