"""Norms under autocast: computed in fp32, frozen batch norms by one operator."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)
_FROZEN = (("timm", "FrozenBatchNormAct2d"), ("torchvision", "FrozenBatchNorm2d"))
"""Package and class; a subclass of somebody else's may compute something else."""


def widen_norms(model: nn.Module) -> int:
    """Under autocast the norms of `model` take and give fp32, on a CPU as on CUDA; how many there are.

    CUDA's autocast does so for torch's own; a CPU's leaves them in half, where torch's kernels compute in fp32 and
    round, and timm's that are written in plain operators (SimpleNorm, GlobalResponseNorm, EvoNorm) compute in half.
    Batch norms stay, frozen ones too: their kernels compute in fp32 and give back their input's dtype; wide outputs
    would double the memory of a backbone's activations. Hooks, so that no parameter changes its name.
    """
    norms = [module for module in model.modules() if _is_norm(module)]
    for norm in norms:
        norm.register_forward_pre_hook(_in_fp32)
    return len(norms)


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, _NORMS):
        return True
    name = type(module).__name__.lower()
    # timm's own derive from none of torch's; a block or head that has a norm in its name holds no weights itself.
    return "norm" in name and "batchnorm" not in name and next(module.parameters(recurse=False), None) is not None


def _in_fp32(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    x = inputs[0] if inputs else None
    if not isinstance(x, Tensor) or x.dtype not in (torch.bfloat16, torch.float16):
        return None
    return (x.float(), *inputs[1:]) if torch.is_autocast_enabled(x.device.type) else None


def narrow_frozen_norms(model: nn.Module) -> nn.Module:
    """Frozen batch norms of timm and torchvision compute in fp32 by one operator and give back their input's dtype.

    Their own `x * scale + bias` with fp32 buffers made every activation of a ResNet-50 fp32 under autocast: 1.3 times
    the peak memory and 8 ms of a step of 56 on an H100.
    """
    for norm in model.modules():
        if (type(norm).__module__.partition(".")[0], type(norm).__name__) in _FROZEN:
            norm.forward = partial(_frozen, norm)
    return model


def _frozen(norm: Any, x: Tensor) -> Tensor:
    numbers = norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    trains = torch.is_grad_enabled() and x.requires_grad
    out: Tensor = _FrozenNorm.apply(x, *numbers) if trains else _normalised(x, *numbers)
    return norm.act(norm.drop(out)) if hasattr(norm, "act") else out


def _normalised(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)


class _FrozenNorm(torch.autograd.Function):
    """torch's own backward wants the input, for gradients that nobody asks for: in fp32 that is an activation more
    to keep for each norm than `x * scale + bias` keeps. The gradient is the norm of the gradient around zero."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(variance, weight)
        ctx.eps = eps
        return _normalised(x, mean, variance, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        variance, weight = ctx.saved_tensors
        grad = _normalised(grads[0], torch.zeros_like(variance), variance, weight, None, ctx.eps)
        return grad, None, None, None, None, None
