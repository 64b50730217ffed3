"""All attention kernels that run here agree; what they make of masks; the choice of a kernel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mf_scale.errors import UserError
from mf_scale.models import attention as room
from mf_scale.models.attention import attention, resolve_kernel
from mf_scale.models.position import sine_position


def _inputs(length: int, width: int = 8, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, 5, 3, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    k, v = (torch.randn(2, length, 3, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    bias = torch.randn(2, 3, 5, length, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(2, 1, 5, length, generator=generator) > 0.4
    return q, k.requires_grad_(), v.requires_grad_(), bias.requires_grad_(), mask


@pytest.mark.parametrize("length", range(1, 18))
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_sdpa_equals_the_reference_in_value_and_gradient(length, with_bias, with_mask):
    q, k, v, bias, mask = _inputs(length)
    inputs = [q, k, v, bias] if with_bias else [q, k, v]
    answers = []
    for kernel in ("reference", "sdpa"):
        out = attention(q, k, v, bias if with_bias else None, mask if with_mask else None, kernel)
        answers.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for wanted, got in zip(*answers, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_reference_is_softmax_attention():
    q, k, v, bias, mask = _inputs(6)
    out = attention(q, k, v, bias, mask | True, "reference")
    scores = q[1, 2, 0] @ k[1, :, 0].T / 8**0.5 + bias[1, 0, 2]
    torch.testing.assert_close(out[1, 2, 0], scores.softmax(0) @ v[1, :, 0])


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_may_look_nowhere_gets_zeros_and_poisons_nothing(kernel, dtype):
    q, k, v, bias, mask = _inputs(7, dtype=dtype)
    mask[:, :, 3] = False
    out = attention(q, k, v, bias, mask, kernel)
    assert (out[:, 3] == 0).all()
    out.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v, bias))
    assert (q.grad[:, 3] == 0).all() and (q.grad[:, 2] != 0).any()
    hidden = torch.zeros(5, 7, dtype=dtype).index_fill(0, torch.tensor([3]), -torch.inf)
    assert (attention(q, k, v, hidden, kernel=kernel)[:, 3] == 0).all()


def test_a_masked_key_has_no_influence():
    q, k, v, _, mask = _inputs(4)
    mask[..., 1] = False
    other = v.detach().clone()
    other[:, 1] += 100
    assert torch.equal(attention(q, k, v, mask=mask, kernel="sdpa"), attention(q, k, other, mask=mask, kernel="sdpa"))


def test_auto_takes_sdpa_on_a_cpu_and_forcing_xformers_there_says_why():
    assert resolve_kernel("auto", "cpu", torch.float32) == "sdpa"
    with pytest.raises(UserError, match=r"xformers cannot run here on cpu in torch.float32: \w+"):
        resolve_kernel("xformers", "cpu", torch.float32)
    with pytest.raises(UserError, match="unknown attention kernel 'flash'"):
        resolve_kernel("flash", "cpu", torch.float32)


@pytest.mark.gpu
def test_xformers_equals_the_reference_on_a_gpu():
    for length in range(1, 18):
        for width in (8, 12):
            q, k, v, bias, mask = (t.cuda() for t in _inputs(length, width, torch.float32))
            wanted, got = (attention(q, k, v, bias, mask, kernel) for kernel in ("reference", "xformers"))
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def _particular(q, k, v, attn_bias=None, p=0.0, scale=None):
    """Attention that is as particular about its inputs as xformers' kernels on a GPU, which do not run here."""
    assert q.shape[-1] % 8 == 0 and q.shape[-1] == k.shape[-1] == v.shape[-1]
    if attn_bias is not None:
        assert attn_bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1]) and attn_bias.dtype == q.dtype
        assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1]) and attn_bias.stride(-1) == 1
    scores = torch.einsum("bmhk,bnhk->bhmn", q, k) * scale + (0 if attn_bias is None else attn_bias)
    return torch.einsum("bhmn,bnhk->bmhk", scores.softmax(-1), v)


@pytest.mark.parametrize("length", range(1, 18))
@pytest.mark.parametrize("width", [8, 12])
def test_what_xformers_gets_is_padded_and_aligned(length, width, monkeypatch):
    monkeypatch.setattr(room, "_xformers_ops", lambda: SimpleNamespace(memory_efficient_attention=_particular))
    q, k, v, bias, mask = _inputs(length, width)
    for some_bias, some_mask in ((None, None), (bias, None), (bias[:, :1], mask), (None, mask)):
        wanted = attention(q, k, v, some_bias, some_mask, "reference")
        additive, blind = room._merge_mask(q, k, some_bias, some_mask)
        got = room._xformers(q, k, v, additive, 0.0)
        torch.testing.assert_close(got if blind is None else got.masked_fill(blind, 0), wanted)


def test_positions_differ_everywhere_and_stay_in_range():
    position = sine_position(3, 5, 16)
    assert position.shape == (15, 16) and position.abs().max() <= 1
    assert len(position.unique(dim=0)) == 15
    rows, columns = position.view(3, 5, 16)[..., :8], position.view(3, 5, 16)[..., 8:]
    assert torch.equal(rows[:, 0], rows[:, 4]) and torch.equal(columns[0], columns[2])
