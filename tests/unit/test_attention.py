"""All attention kernels that run here agree; what they make of masks; the choice of a kernel."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
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
            windowed = (
                bias.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            )  # as Swin's: the heads lie side by side
            for some_bias, some_mask in ((None, None), (bias, mask), (windowed, None)):
                inputs = (q, k, v, some_bias, some_mask)
                wanted, got = (attention(*inputs, kernel) for kernel in ("reference", "xformers"))
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
    shared = bias[:1, :1].transpose(-1, -2).contiguous().transpose(-1, -2)  # rows do not lie side by side
    windowed = bias.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as Swin's: the heads lie side by side
    column = bias[..., :1].detach()
    given = ((None, None), (bias, None), (shared, mask), (windowed, None), (None, mask), (column, mask[:, :, :1]))
    for some_bias, some_mask in given:
        wanted = attention(q, k, v, some_bias, some_mask, "reference", open_rows=True)
        got = room._xformers(q, k, v, room._merged(q.dtype, length, some_bias, some_mask), 0.0)
        rows = wanted.isfinite()
        torch.testing.assert_close(got[rows], wanted[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xformers_own_rules_have_nothing_against_the_bias(dtype, monkeypatch):
    """Its operators do not run here, but its rules say why: the device, never the bias."""
    fmha = pytest.importorskip("xformers.ops.fmha")

    def complaints(bias):
        inputs = fmha.Inputs(q, k, k, bias)
        operators = (fmha.cutlass.FwOp, fmha.cutlass.BwOp)
        return [
            reason for operator in operators for reason in operator.not_supported_reasons(inputs) if "bias" in reason
        ]

    given: dict[str, torch.Tensor] = {}
    operations = SimpleNamespace(
        memory_efficient_attention=lambda q, *_, attn_bias, **__: given.update(bias=attn_bias) or q
    )
    monkeypatch.setattr(room, "_xformers_ops", lambda: operations)
    for length in range(1, 18):
        q, k = (torch.zeros(6, n, 3, 32, dtype=dtype, requires_grad=True) for n in (5, length))
        room._xformers(q, k, k, torch.nn.Parameter(torch.zeros(1, 3, 5, length, dtype=dtype)), 0.0)
        assert complaints(given["bias"]) == [] and given["bias"].shape == (6, 3, 5, length)
        assert given["bias"].untyped_storage().nbytes() <= 3 * 5 * 24 * dtype.itemsize
        assert length % 4 == 0 or complaints(torch.zeros(6, 3, 5, length, dtype=dtype)) != []


def test_what_the_batch_shares_is_never_copied_out():
    """40 windows share a bias [1,2,49,49]: for all of them it would be 40 times as large."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes())
            return out

    q, bias = torch.randn(40, 49, 2, 8), torch.randn(1, 2, 49, 49)
    keys = torch.rand(1, 1, 1, 49) > 0.3
    with torch.no_grad():
        wanted = attention(q, q, q, bias, keys, "reference")
        with Largest() as seen:
            got = attention(q, q, q, bias, keys, "sdpa")
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert seen.largest <= q.nbytes < 40 * bias.nbytes / 4


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_a_parameter_as_bias_learns(kernel):
    q, k, v, bias, mask = _inputs(7)
    table = torch.nn.Parameter(bias.detach()[:1, :, :1])
    attention(q, k, v, table, mask, kernel).square().sum().backward()
    small = table.grad
    whole = bias.detach()[:1, :, :1].expand(2, 3, 5, 7).clone().requires_grad_()
    attention(q, k, v, whole, mask, "reference").square().sum().backward()
    torch.testing.assert_close(small, whole.grad.sum((0, 2), keepdim=True))


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_it_compiles_without_a_break_in_the_graph(kernel):
    q, k, v, bias, mask = (t.detach().float() if t.is_floating_point() else t for t in _inputs(6))
    resolve_kernel.cache_clear()
    compiled = torch.compile(
        lambda q, k, v, bias, mask: attention(q, k, v, bias, mask, kernel), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(q, k, v, bias, mask), attention(q, k, v, bias, mask, kernel))


def test_where_a_kernel_is_chosen_does_not_matter():
    resolve_kernel.cache_clear()
    with torch.inference_mode():
        assert resolve_kernel("reference", "cpu", torch.float32) == "reference"
    q = torch.empty(1, 3, 2, 8, device="meta")
    assert attention(q, q, q, torch.zeros(3, 3, device="meta"), kernel="xformers").shape == q.shape
    resolve_kernel.cache_clear()


_LIBRARY_WITHOUT_AND_WITH_THE_RUNTIME = """
import glob, importlib.util, pathlib
real = glob.glob  # newer torch loads whatever runtime it finds by this; older does not
glob.glob = lambda pattern, *rest, **named: [] if "cuda_runtime" in str(pattern) else real(pattern, *rest, **named)
import torch
from mf_scale.models import attention as room
library = pathlib.Path(importlib.util.find_spec("xformers").origin).parent / "_C.so"
try:
    torch.ops.load_library(library)
except OSError as error:
    print(error.__cause__)
room._xformers_ops()
from xformers import _cpp_lib
print("loaded" if _cpp_lib._cpp_library_load_exception is None else _cpp_lib._cpp_library_load_exception)
"""


def test_xformers_library_loads_once_the_old_cuda_runtime_is_there():
    pytest.importorskip("xformers")
    if torch.version.cuda is None or torch.version.cuda.startswith("12."):
        pytest.skip("this torch is not of CUDA 13 or later")
    try:
        importlib.metadata.files("nvidia-cuda-runtime-cu12")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the wheel nvidia-cuda-runtime-cu12 is not installed")
    command = [sys.executable, "-c", _LIBRARY_WITHOUT_AND_WITH_THE_RUNTIME]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    without, *_, with_it = answer.stdout.splitlines()
    assert "libcudart.so.12: cannot open shared object file" in without and with_it == "loaded"


def test_a_missing_runtime_is_no_error(monkeypatch):
    monkeypatch.setattr(room, "_OLD_RUNTIME", "no-such-distribution")
    room._load_old_runtime()


def test_positions_differ_everywhere_and_stay_in_range():
    position = sine_position(3, 5, 16)
    assert position.shape == (15, 16) and position.abs().max() <= 1
    assert len(position.unique(dim=0)) == 15
    rows, columns = position.view(3, 5, 16)[..., :8], position.view(3, 5, 16)[..., 8:]
    assert torch.equal(rows[:, 0], rows[:, 4]) and torch.equal(columns[0], columns[2])
