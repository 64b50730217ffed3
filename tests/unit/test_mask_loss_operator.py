"""The mask loss as an operator of torch: what of it is differentiable, compiled, and untouched by autocast."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mf_scale.kernels import mask_loss as operator
from mf_scale.kernels.choose import why_not
from mf_scale.kernels.mask_loss import mask_loss, product
from tests.random_batches import random_batch

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(why_not("native", "cpu", torch.float32) is not None, reason="no native kernels")
)


def _targets() -> tuple[torch.Tensor, ...]:
    """Map [2,1,24,32], segments and layers [2,3], counts [2]."""
    pairs = torch.zeros(2, 3, dtype=torch.int64)
    return random_batch([3, 2]).segment_map, torch.tensor([[0, 1, 2], [0, 1, 0]]), pairs, torch.tensor([3, 2])


def _options(kernels: str, want_gradient: bool = True) -> tuple[Any, ...]:
    return 20.0, 1.0, 0.25, 2.0, False, kernels, want_gradient


def _embeddings(dtype=torch.float32, trained=(True, True), contiguous=True) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    masks, pixels = torch.randn(2, 3, 4, generator=g), torch.randn(2, 4, 6, 8, generator=g)
    if not contiguous:
        masks, pixels = masks.mT.contiguous().mT, pixels.to(memory_format=torch.channels_last)
    return masks.to(dtype).requires_grad_(trained[0]), pixels.to(dtype).requires_grad_(trained[1])


@pytest.mark.parametrize("kernels", [NATIVE, "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("trained", "contiguous"),
    [((True, True), True), ((True, True), False), ((True, False), True), ((False, True), True)],
)
def test_torchs_rules_for_operators_are_kept(kernels, dtype, trained, contiguous):
    embeddings = _embeddings(dtype, trained, contiguous)
    torch.library.opcheck(mask_loss, (*embeddings, *_targets(), *_options(kernels)))


def test_without_gradients_torchs_rules_are_kept():
    torch.library.opcheck(mask_loss, (*_embeddings(trained=(False, False)), *_targets(), *_options("eager", False)))
    torch.library.opcheck(product, (torch.randn(2, 3, 4), torch.randn(2, 5, 4).mT))


@pytest.mark.parametrize("kernels", [NATIVE, "eager"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_stays_one_graph_when_compiled(kernels, backend):
    (masks, pixels), targets = _embeddings(), _targets()

    def total(masks, pixels):
        return mask_loss(masks * 2, pixels, *targets, *_options(kernels))[0] * 3

    compiled = torch.compile(total, fullgraph=True, backend=backend)
    answers = [torch.autograd.grad(f(masks, pixels), (masks, pixels)) for f in (total, compiled)]
    torch.testing.assert_close(*answers)


def test_the_gradient_is_right():
    double = _embeddings(torch.float64)
    torch.autograd.gradcheck(lambda *x: mask_loss(*x, *_targets(), *_options("eager"))[0] * 3, double)


def test_second_derivatives_are_refused_and_not_wrong():
    (masks, pixels), targets = _embeddings(torch.float64), _targets()
    total = mask_loss(masks, pixels, *targets, *_options("eager"))[0]
    with pytest.raises(RuntimeError, match="mf_scale::mask_loss has no second derivative"):
        torch.autograd.grad(total, masks, create_graph=True)
    compiled = torch.compile(
        lambda *x: mask_loss(*x, *targets, *_options("eager"))[0], fullgraph=True, backend="aot_eager"
    )
    (first,) = torch.autograd.grad(compiled(masks, pixels), masks, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(first.square().sum(), masks)


def test_only_the_total_is_differentiable():
    targets = _targets()
    total, *others = mask_loss(*_embeddings(), *targets, *_options("eager"))
    assert total.requires_grad and not any(other.requires_grad for other in others)
    compiled = torch.compile(
        lambda *x: mask_loss(*x, *targets, *_options("eager")), fullgraph=True, backend="aot_eager"
    )
    total, *others = compiled(*_embeddings())
    assert total.requires_grad and not any(other.requires_grad for other in others)


def test_the_backward_makes_nothing_for_the_other_outputs():
    class Made(TorchDispatchMode):
        found: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    total = mask_loss(*_embeddings(), *_targets(), *_options("eager"))[0]
    with Made():
        total.backward()
    assert "product" in Made.found and not {"zeros", "new_zeros", "zeros_like"} & set(Made.found)


def test_a_gradient_that_was_not_asked_for_is_explained():
    total = mask_loss(*_embeddings(), *_targets(), *_options("eager", False))[0]
    with pytest.raises(RuntimeError, match="called without want_gradient"):
        total.backward()


@pytest.mark.parametrize("kernels", [NATIVE, "eager"])
def test_autocast_changes_no_bit(kernels):
    def step() -> tuple[torch.Tensor, ...]:
        embeddings = _embeddings()
        total = mask_loss(*embeddings, *_targets(), *_options(kernels))[0]
        return total.detach(), *torch.autograd.grad(total, embeddings)

    wanted = step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = step()
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("before", ["highest", "high"])
def test_tf32_is_set_for_the_product_alone(before):
    matmul, at_first = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    try:
        set_before = matmul.fp32_precision, matmul.allow_tf32
        with operator.tf32(False):
            assert (matmul.fp32_precision, matmul.allow_tf32) == set_before
        with pytest.raises(ArithmeticError), operator.tf32(True):
            assert matmul.fp32_precision == "tf32"
            raise ArithmeticError
        assert (matmul.fp32_precision, matmul.allow_tf32) == set_before
    finally:
        torch.set_float32_matmul_precision(at_first)


@pytest.mark.gpu
def test_the_product_of_half_embeddings_is_exact_in_tf32():
    left, right = (torch.randn(2, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    wanted = left.double() @ right.double()
    assert (product(left, right) - wanted).abs().max() < 1e-5 * wanted.abs().max()
