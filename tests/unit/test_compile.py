"""torch.compile of the model: the same numbers and names as eager, one graph a mode, a paragraph without a compiler."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mf_scale.config.schema import ModelConfig
from mf_scale.models.build import build_model
from mf_scale.training.compiling import compile_model

SIZE = (2, 3, 64, 96)


def _model(backbone: str, *, dropout: float = 0.0) -> nn.Module:
    """Small; of each stage of a Swin one block, the first one shifted: its backward takes minutes to compile."""
    config = ModelConfig()
    config.backbone = replace(config.backbone, name=backbone, weights="none", freeze_norm=True)
    config.pixel_decoder = replace(
        config.pixel_decoder, width=16, mask_channels=16, encoder_layers=0 if "swin" in backbone else 1
    )
    config.decoder = replace(config.decoder, layers=1, queries=6, width=16, heads=2, feedforward=16, dropout=dropout)
    model = build_model(config, 5, seed=0)
    if "swin" in backbone:
        stages: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "blocks", None), nn.Sequential)]
        for number, stage in enumerate(stages):
            stage.blocks = stage.blocks[1:2] if number == 0 else stage.blocks[:1]
    return model.train()


def _images(seed: int) -> Tensor:
    return torch.randint(0, 256, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def _loss(model: nn.Module, images: Tensor) -> Tensor:
    prediction = model(images)
    masks = torch.einsum("bqc,bchw->bqhw", prediction.mask_embeddings, prediction.pixel_embeddings)
    return prediction.class_logits.square().mean() + masks.square().mean()


def _worst(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest distance of two tensors of a name, by the larger of its norm and 1e-3 of the largest norm of all."""
    floor = 1e-3 * max(float(value.norm()) for value in expected.values())
    return max(float((got[n] - e).norm()) / max(float(e.norm()), floor) for n, e in expected.items())


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "backbone", ["resnet10t", pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.soak)]
)
def test_compiled_and_eager_agree_in_one_graph_for_training_and_one_for_validation(backbone: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    eager = _model(backbone)
    compiled = copy.deepcopy(eager)
    compile_model(compiled, torch.device("cpu"))
    assert list(compiled.state_dict()) == list(eager.state_dict())
    before = counters["stats"]["unique_graphs"]
    for step in range(3):
        for model in (eager, compiled):
            _loss(model, _images(step)).backward()
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in (compiled, eager)]
    assert set(gradients[0]) == set(gradients[1]) and _worst(*gradients) < 1e-4
    with torch.no_grad():
        for step in range(2):
            got, expected = (vars(model.eval()(_images(step))) for model in (compiled, eager))
            names = ("class_embeddings", "mask_embeddings", "pixel_embeddings")
            assert _worst({n: got[n] for n in names}, {n: expected[n] for n in names}) < 1e-4
    assert counters["stats"]["unique_graphs"] - before == 2 and not counters["graph_break"]


@pytest.mark.integration
def test_compiled_dropout_is_a_function_of_the_seed() -> None:
    torch._dynamo.reset()
    model = _model("resnet10t", dropout=0.5)
    compile_model(model, torch.device("cpu"))

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(_images(0)).class_logits.detach()

    first = draw(1)
    assert not torch.equal(draw(2), first)
    assert torch.equal(draw(1), first)


WITHOUT_COMPILER = """
import torch
from mf_scale.errors import UserError
from mf_scale.training.compiling import compile_model
model = torch.nn.Linear(2, 2)
try:
    compile_model(model, torch.device("cpu"))
except UserError as error:
    print(error)
assert model._compiled_call_impl is None
"""


def test_without_a_compiler_a_paragraph_says_so(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_COMPILER],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "No working C++ compiler found" in done.stdout and "model.compile=false" in done.stdout
    assert len(done.stdout.splitlines()) == 1
