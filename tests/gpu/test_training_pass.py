"""Forward, matching, loss and backward on a GPU: one wait, the CPU's numbers, the same bits every time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mf_scale.bench.launches import count_syncs
from mf_scale.config.schema import LossConfig, MatchingConfig, ModelConfig
from mf_scale.data.batch import Batch
from mf_scale.kernels.choose import choose_kernels
from mf_scale.losses.criterion import Criterion
from mf_scale.models.build import build_model
from tests.random_batches import CLASSES, random_batch

pytestmark = pytest.mark.gpu
BACKBONES = ["resnet10t", "swin_tiny_patch4_window7_224"]
SIZE = (160, 224)


def _model(backbone: str, *, dropout: float = 0.0) -> nn.Module:
    config = ModelConfig()
    config.backbone = replace(config.backbone, name=backbone, weights="none", freeze_norm=True)
    config.pixel_decoder = replace(config.pixel_decoder, width=32, mask_channels=32, encoder_layers=1)
    config.decoder = replace(
        config.decoder, layers=2, queries=20, width=32, heads=2, feedforward=64, dropout=dropout, pre_norm=False
    )
    return build_model(config, CLASSES, seed=0).train()


def _on_gpu(batch: Batch) -> Batch:
    names = ("images", "segment_map", "labels", "segment_layer")
    return replace(batch, **{name: getattr(batch, name).cuda() for name in names})


def _work(model: nn.Module, batch: Batch, precision: torch.dtype | None) -> Callable[[], Tensor]:
    """One pass on the batch's device; its loss."""
    criterion = Criterion(LossConfig(), MatchingConfig(), CLASSES, 20)
    step = criterion.normalisers(criterion.totals(batch))
    kind = batch.images.device.type

    def work() -> Tensor:
        with torch.autocast(kind, precision, enabled=precision is not None):
            prediction = model(batch.images)
        terms = criterion(prediction, batch, step)
        terms.total.backward()
        return terms.total.detach()

    return work


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_pass_waits_for_the_gpu_once(backbone: str, precision: torch.dtype | None) -> None:
    """For the matcher's copy to the host; the fast kernels must serve for that."""
    assert choose_kernels("auto", "cuda", torch.float32) == "triton"
    batch = _on_gpu(random_batch([3, 5], SIZE))
    work = _work(_model(backbone, dropout=0.1).cuda(), batch, precision)
    for _ in range(2):  # the first passes probe and compile
        work()
    torch.cuda.synchronize()
    assert count_syncs(work) == 1


@pytest.mark.parametrize("backbone", BACKBONES)
def test_loss_and_gradients_are_the_cpus(backbone: str) -> None:
    """In fp32 without TF32, so that nothing but the order of sums differs; the matching is discrete and must agree."""
    cudnn: Any = torch.backends.cudnn
    settings = torch.backends.cuda.matmul, cudnn.conv
    before = [setting.fp32_precision for setting in settings]
    model, batch = _model(backbone), random_batch([3, 5], SIZE)
    on_gpu = copy.deepcopy(model).cuda()
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        got = _work(on_gpu, _on_gpu(batch), None)().cpu()
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
    wanted = _work(model, batch, None)()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=0)  # the loss's own products stay in TF32
    mine, right = _gradients(on_gpu), _gradients(model)
    assert mine.keys() == right.keys()
    off = sum(float((mine[n].cpu() - g).square().sum()) for n, g in right.items())
    assert off**0.5 <= 5e-3 * sum(float(g.square().sum()) for g in right.values()) ** 0.5


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_same_pass_gives_the_same_bits(backbone: str) -> None:
    """With dropout, whose numbers come from the seed; under torch's own watch, which raises for what may differ."""
    batch = _on_gpu(random_batch([3, 5], SIZE))
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            model = _model(backbone, dropout=0.1).cuda()
            torch.manual_seed(7)
            found.append((_work(model, batch, torch.bfloat16)(), _gradients(model)))
    finally:
        torch.use_deterministic_algorithms(False)
    for loss, gradients in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert [n for n, g in gradients.items() if not torch.equal(g, found[0][1][n])] == []
