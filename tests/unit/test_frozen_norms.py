"""Frozen batch norms: one operator that computes in fp32 and gives back its input's dtype."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torchvision.ops.misc import FrozenBatchNorm2d

from mf_scale.config.schema import BackboneConfig, ModelConfig, PixelLevelConfig
from mf_scale.models import norms as norms_module
from mf_scale.models.backbones import build_backbone, freeze_norms
from mf_scale.models.convert import pixel_level
from mf_scale.training.precision import autocast

CPU = torch.device("cpu")
WIDTH = 6
KINDS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm2d(WIDTH),
    "synchronised": lambda: nn.SyncBatchNorm(WIDTH),
    "without affine": lambda: nn.BatchNorm2d(WIDTH, eps=1e-3, affine=False),
    "with activation": lambda: BatchNormAct2d(WIDTH, eps=1e-3, act_layer=nn.SiLU),
    "in-place activation": lambda: BatchNormAct2d(WIDTH),
    "with drop": lambda: BatchNormAct2d(WIDTH, drop_layer=nn.Hardtanh, act_layer=nn.Sigmoid),
}
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of one value: to float order, or half a unit in the last place and a little."""


def _trained(model: nn.Module) -> nn.Module:
    """With statistics and affine that a norm could have after training."""
    torch.manual_seed(0)
    for module in model.modules():
        for tensor in (getattr(module, name, None) for name in ("running_mean", "bias")):
            if tensor is not None and hasattr(module, "running_mean"):
                nn.init.normal_(tensor)
        for tensor in (getattr(module, name, None) for name in ("running_var", "weight")):
            if tensor is not None and hasattr(module, "running_mean"):
                nn.init.uniform_(tensor, 0.2, 3)
    return model


def _both(kind: str) -> tuple[Any, Any]:
    """Ours, and what timm makes of the same norm."""
    norm = _trained(KINDS[kind]())
    return freeze_norms(nn.Sequential(copy.deepcopy(norm))), freeze_batch_norm_2d(nn.Sequential(norm))


def _x(dtype: torch.dtype = torch.float32, *, channels_last: bool = False) -> Tensor:
    x = (2 * torch.randn(2, WIDTH, 9, 7, generator=torch.Generator().manual_seed(1)) + 1).to(dtype)
    return (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_values_and_gradients_are_those_of_scale_and_shift(kind: str, dtype: torch.dtype, channels_last: bool) -> None:
    ours, theirs = _both(kind)
    x = _x(dtype, channels_last=channels_last)
    wide = x.detach().float().requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    with autocast(CPU, "bf16"):
        out = ours(x)
        expected = theirs(wide)
    out.backward(grad)
    expected.backward(grad.float())
    assert out.dtype == dtype and x.grad is not None and x.grad.dtype == dtype  # theirs: fp32 whatever comes in
    assert out.is_contiguous(memory_format=torch.channels_last) == channels_last
    # An activation that rounds behind the norm rounds twice, and its slope is taken at a rounded value.
    several = 1 if kind in ("plain", "synchronised", "without affine") else 4
    assert wide.grad is not None
    torch.testing.assert_close(out.float(), expected, rtol=several * ROUNDING[dtype], atol=several * ROUNDING[dtype])
    torch.testing.assert_close(
        x.grad.float(), wide.grad, rtol=several * ROUNDING[dtype], atol=several * ROUNDING[dtype]
    )


class _Operators(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
def test_it_is_one_operator_and_keeps_no_activation(grad: bool) -> None:
    ours, _ = _both("plain")
    x, saved = _x(torch.bfloat16), []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with (
        autocast(CPU, "bf16"),
        torch.set_grad_enabled(grad),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        _Operators() as forward,
    ):
        out = ours(x)
    assert len([name for name in forward.names if "batch_norm" in name]) == 1
    assert [name for name in forward.names if "batch_norm" not in name and name not in ("empty", "detach")] == []
    assert all(count == WIDTH for count in saved) and out.requires_grad == grad
    if grad:
        with _Operators() as backward:
            out.backward(torch.ones_like(out))
        assert not {"mul", "sum", "_to_copy", "native_batch_norm_backward"} & set(backward.names)


def test_gradients_of_gradients_are_right() -> None:
    ours = _both("with activation")[0].double()
    assert torch.autograd.gradcheck(ours, (_x(torch.float64),))
    assert torch.autograd.gradgradcheck(ours, (_x(torch.float64),))


def test_classes_names_and_copies_stay() -> None:
    for kind, family in (("plain", FrozenBatchNorm2d), ("with activation", FrozenBatchNormAct2d)):
        ours, theirs = _both(kind)
        assert type(ours[0]) is family
        assert list(ours.state_dict()) == list(theirs.state_dict()) and not list(ours.parameters())
        assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        for second in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
            with torch.no_grad():
                second[0].bias += 1
                assert not torch.equal(second(_x()), ours(_x()))  # it looks at its own numbers
        frozen: Any = freeze_norms(nn.Sequential(_trained(KINDS[kind]())))
        frozen.load_state_dict({**ours.state_dict(), "0.num_batches_tracked": torch.tensor(3)})


def test_recomputed_blocks_get_the_same_gradients() -> None:
    conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
    net = nn.Sequential(conv, _both("in-place activation")[0])
    gradients = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
        net.zero_grad()
        run(_x()).square().sum().backward()
        assert conv.weight.grad is not None
        gradients.append(conv.weight.grad.clone())
    assert torch.equal(*gradients)


def test_a_norm_of_another_make_computes_as_it_likes() -> None:
    class Louder(FrozenBatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = _x()
    assert torch.equal(freeze_norms(nn.Sequential(Louder(WIDTH)))(x), 2 * FrozenBatchNorm2d(WIDTH)(x))


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0"])
def test_a_backbones_activations_stay_half_under_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BackboneConfig(name, "none", freeze_norm=True)
    ours = build_backbone(config)
    monkeypatch.setattr(norms_module, "partial", lambda _, norm: type(norm).forward.__get__(norm))
    theirs = build_backbone(config)
    theirs.load_state_dict(_trained(ours).state_dict())
    images, kept, features = torch.randn(1, 3, 128, 160), [], []
    for backbone in (ours, theirs):
        dtypes: set[torch.dtype] = set()
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        for module in backbone.modules():
            if isinstance(module, FrozenBatchNorm2d | FrozenBatchNormAct2d):
                module.register_forward_hook(lambda _, __, out, dtypes=dtypes: dtypes.add(out.dtype))
        with torch.no_grad():
            features.append(backbone(images))
        assert dtypes == {torch.float32}
        dtypes.clear()
        with autocast(CPU, "bf16"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            backbone(images)
        kept.append((dtypes, sum(sizes.values())))
    (half, less), (full, more) = kept
    assert half == {torch.bfloat16} and full == {torch.float32}
    assert less < 0.85 * more, less / more
    with torch.no_grad():
        exact = theirs.double()(images.double())
    for ours_out, theirs_out, wanted in zip(*features, exact, strict=True):
        # 1e-3 in a deep network with numbers drawn at random, where rounding grows from layer to layer: in both alike.
        assert float((ours_out - wanted).norm()) < 1.5 * float((theirs_out - wanted).norm()) + 1e-6 * wanted.norm()


def _own() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1))


@pytest.mark.parametrize("freeze", [False, True])
def test_a_model_of_the_users_own_stays_half_too(freeze: bool) -> None:
    """Also with its batch norms left as they are, in eval mode: torch's is one operator."""
    own = PixelLevelConfig(builder=f"{__name__}:_own")
    backbone, _ = pixel_level(ModelConfig(pixel_level=own, backbone=BackboneConfig(freeze_norm=freeze)))
    norm = next(m for m in backbone.eval().modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d))
    assert isinstance(norm, FrozenBatchNorm2d) == freeze
    seen = []
    norm.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with autocast(CPU, "bf16"):
        backbone(torch.randn(1, 3, 64, 64))
    assert set(seen) == {torch.bfloat16}
