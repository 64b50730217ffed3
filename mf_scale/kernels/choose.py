"""Which kernels serve the mask loss and the matching cost: found by running them once, never by version."""

from __future__ import annotations

import functools
import math

import torch

from mf_scale.errors import UserError
from mf_scale.kernels import native, triton_cost
from mf_scale.kernels.mask_loss import run
from mf_scale.kernels.settings import Settings
from mf_scale.kernels.triton_cost import CostWeights

KERNELS = ("triton", "native", "eager")


@functools.cache
def choose_kernels(requested: str, device_type: str, dtype: torch.dtype) -> str:
    """The kernels that `requested` means for logits on this device and in this dtype; each was run before it is named.

    auto takes triton on CUDA and native on a CPU where they run, else eager, which runs anywhere and in fp64 too.
    Raises UserError for kernels that were asked for and cannot run.
    """
    if requested == "auto":
        return _fast(device_type) if fallback_reason(requested, device_type, dtype) is None else "eager"
    reason = why_not(requested, device_type, dtype)
    if reason is not None:
        raise UserError(
            f"the {requested} kernels cannot run here on {device_type} in {dtype}: {reason}",
            where="loss.kernels",
            remedy="Use auto, which takes the first kernels that run.",
        )
    return requested


def fallback_reason(requested: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why auto means eager here, in one line to be logged; None where it does not or where eager was asked for."""
    if requested != "auto" or (reason := why_not(_fast(device_type), device_type, dtype)) is None:
        return None
    return f"the {_fast(device_type)} kernels cannot run here on {device_type} in {dtype}: {reason}"


def _fast(device_type: str) -> str:
    return "triton" if device_type == "cuda" else "native"


@functools.cache
def why_not(kernels: str, device_type: str, dtype: torch.dtype) -> str | None:
    """None when one tiny loss comes out right, else the reason in one line."""
    if kernels == "eager":
        return None
    wanted = "cuda" if kernels == "triton" else "cpu"
    if device_type != wanted:
        return f"they are for {wanted}"
    if dtype == torch.float64:
        return "they compute in fp32"
    try:
        return _trial(kernels, torch.device(device_type))
    except Exception as error:  # no compiler, no driver, a foreign binary: the reason is reported
        return f"{type(error).__name__} {' '.join(str(error).split())[:400]}"


def _trial(kernels: str, device: torch.device) -> str | None:
    """One pair with logits of 0 and a mask of half the pixels: focal = ln 2 / 8 with alpha 0.5, dice = 1 - 9 / 17."""
    segment_map = torch.tensor([0, -1], dtype=torch.int16, device=device).repeat(4, 2)[None, None]
    pair = torch.zeros(1, 1, dtype=torch.int64, device=device)
    logits = torch.zeros(1, 1, 2, 2, dtype=torch.float32, device=device)
    settings = Settings(focal_weight=1.0, dice_weight=1.0, alpha=0.5, gamma=2.0, exclude=False)
    arguments = (logits, segment_map, pair, pair, pair[0] + 1, settings)
    focal, dice, gradient = run(kernels, *arguments, want_gradient=True)
    by_eager = run("eager", *arguments, want_gradient=True)[2]
    assert gradient is not None and by_eager is not None
    right = math.isclose(float(focal), math.log(2) / 8, rel_tol=1e-4) and math.isclose(
        float(dice), 8 / 17, rel_tol=1e-4
    )
    if not right or not torch.allclose(gradient, by_eager, rtol=1e-4, atol=1e-7):
        return f"a trial gave {float(focal)}, {float(dice)} and the gradient {gradient.flatten().tolist()}"
    return _trial_of_cost(device) if kernels == "triton" else _trial_of_sums()


def _trial_of_sums() -> str | None:
    """The matching sums of three pixels with logits of 0, one of them inside the segment; alpha is 0.25."""
    sums = native.PairSums(1, torch.zeros(1, dtype=torch.int64, device="cpu"), alpha=0.25, gamma=2.0, exclude=False)
    maps = torch.tensor([[-1, 0, -1]], dtype=torch.int16, device="cpu")
    sums.add(torch.zeros(3, 1, dtype=torch.float32, device="cpu"), maps, 0)
    got = [float(part) for part in (sums.inside_focal, sums.inside_mass, sums.outside, sums.mass)]
    wanted = [-math.log(2) / 8, 0.5, math.log(2) * 9 / 16, 1.5]
    right = all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(got, wanted, strict=True))
    return None if right else f"a trial of the matching sums gave {got}"


def _trial_of_cost(device: torch.device) -> str | None:
    """The matching cost at the size of a real block: it is what needs most of a GPU's registers and shared memory."""
    N, C, T = 128, 256, 16
    weights = CostWeights(1.0, 20.0, 1.0, 0.25, 2.0, exclude=False)
    layers = torch.zeros(1, T, dtype=torch.int64, device=device)
    probability = torch.zeros(1, N, T, device=device)
    segment_map = torch.zeros(1, 1, 64, 64, dtype=torch.int16, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        embeddings, pixels = (torch.zeros(1, *s, device=device, dtype=dtype) for s in ((N, C), (C, 32, 32)))
        total = triton_cost.pairwise_cost(probability, embeddings, pixels, segment_map, layers, weights)[3]
        if not bool(total.isfinite().all()):
            return "the matching cost of zeros is not finite"
    return None
