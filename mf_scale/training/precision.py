"""The numbers a run computes with: autocast, TF32, and what makes it repeat bit by bit. All of it is said at the start.

Full-precision islands under autocast: matching and losses (which switch it off themselves) and the norms that
`models.norms` widens.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from mf_scale.config.schema import Config
from mf_scale.models.attention import resolve_kernel

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_REPEATING_WORKSPACES = (":4096:8", ":16:8")
"""With any other, cuBLAS may add the parts of a product in an order that changes; torch refuses them."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The block in which a model of train.precision runs; for fp32 one that changes nothing."""
    return torch.autocast(device.type, _DTYPES[precision], enabled=precision != "fp32")


def set_numerics(config: Config, device: torch.device) -> list[str]:
    """Set what the process computes with, and say it; before the first product on a GPU.

    Everything is set, whatever the process had before, so it may be called again for another run. Raises nothing:
    with train.deterministic, torch raises RuntimeError naming the operator where a model of the user's own has one
    that cannot repeat.
    """
    deterministic = config.train.deterministic
    notes = [_fp32_products(config.train.tf32, device)]
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.deterministic = deterministic
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
        resolve_kernel.cache_clear()  # auto means another one now
    if deterministic:
        notes.append(_switched_off(device))
    if config.train.precision == "fp16" and device.type == "cpu":
        # The demo's step took 12.5 s instead of 0.24 in fp32; no product was refused.
        notes.append("train.precision = fp16 has no fast products on a CPU: a step takes tens of times as long")
    return notes


def _fp32_products(tf32: bool, device: torch.device) -> str:
    """torch's setting for each library that multiplies; IEEE is the whole of fp32."""
    backends: Any = torch.backends  # its stubs know no operators
    if device.type != "cuda":
        for operator in (backends.mkldnn.matmul, backends.mkldnn.conv):
            operator.fp32_precision = "ieee"
        # Resumed with another number of them a run's losses differ in the 8th digit, from the first step on.
        count = torch.get_num_threads()
        own = f"{count} thread" if count == 1 else f"{count} threads"
        threads = f"sums: by {own} (OMP_NUM_THREADS), another number rounds otherwise"
        return f"products in fp32: whole (TF32 is CUDA's); {threads}"
    chosen = "tf32" if tf32 else "ieee"
    for operator in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
        operator.fp32_precision = chosen
    said = "TF32, inputs rounded to 10 bits" if tf32 else "whole (TF32 is off)"
    return f"products in fp32: {said}; {_half_products()}"


def _half_products() -> str:
    """torch lets cuBLAS add partial sums of a half-precision product in half precision, unless told otherwise."""
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = False
    products.allow_fp16_reduced_precision_reduction = False
    products.allow_fp16_accumulation = False
    return "in bf16 and fp16: summed in fp32 (reduced-precision reductions are off)"


def _switched_off(device: torch.device) -> str:
    said = "deterministic: torch takes operators that repeat bit by bit"
    if device.type != "cuda":
        return f"{said}; on a CPU nothing had to be switched off"
    before = os.environ.get(_WORKSPACE)
    if before not in _REPEATING_WORKSPACES:
        os.environ[_WORKSPACE] = _REPEATING_WORKSPACES[0]
    instead = f" instead of {before}" if before not in (None, *_REPEATING_WORKSPACES) else ""
    return (
        f"{said}; off: cuDNN's search for the fastest convolution, xformers (torch SDPA serves), grid_sample in the "
        f"point loss (gathers serve), antialiased resizing of position embeddings by torch (products serve); "
        f"{_WORKSPACE}={os.environ[_WORKSPACE]}{instead}"
    )
