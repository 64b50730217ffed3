"""What a run computes with: TF32, deterministic mode, norms in fp32 under autocast."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mf_scale.config.load import load_config
from mf_scale.config.schema import Config
from mf_scale.config.validate import validate
from mf_scale.errors import UserError
from mf_scale.losses.choose import choose_criterion
from mf_scale.losses.point_loss import gather_bilinear, sample_bilinear
from mf_scale.models.attention import resolve_kernel
from mf_scale.models.build import build_model
from mf_scale.models.norms import widen_norms
from mf_scale.models.resizing import RepeatingResizes, repeating_resizes, resize_by_products
from mf_scale.training.precision import autocast, set_numerics
from mf_scale.training.seeding import seed_model
from mf_scale.training.transfer import Transfer
from tests.random_batches import CLASSES, random_batch

CPU = torch.device("cpu")
SMALL = [
    "model.backbone.weights=none",
    "model.pixel_decoder.width=32",
    "model.pixel_decoder.mask_channels=32",
    "model.decoder.layers=2",
    "model.decoder.queries=10",
    "model.decoder.width=32",
    "model.decoder.heads=2",
    "model.decoder.feedforward=64",
]


HALF_SUMS = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
"""What lets cuBLAS add in half precision."""


def config(*overrides: str) -> Config:
    made = load_config(None, [*SMALL, *overrides])
    validate(made)
    return made


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """The process's settings are put back: other tests share it."""
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    backends: Any = torch.backends
    operators = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    operators += [backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [operator.fp32_precision for operator in operators]
    sums = [getattr(backends.cuda.matmul, name) for name in HALF_SUMS]
    benchmark, repeating = backends.cudnn.benchmark, backends.cudnn.deterministic
    yield
    for operator, value in zip(operators, before, strict=True):
        operator.fp32_precision = value
    for name, allowed in zip(HALF_SUMS, sums, strict=True):
        setattr(backends.cuda.matmul, name, allowed)
    backends.cudnn.benchmark, backends.cudnn.deterministic = benchmark, repeating
    torch.use_deterministic_algorithms(False)
    resolve_kernel.cache_clear()
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if workspace is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


@pytest.mark.parametrize(("tf32", "chosen"), [("true", "tf32"), ("false", "ieee")])
def test_tf32_is_set_and_said_without_a_warning(tf32: str, chosen: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (note,) = set_numerics(config(f"train.tf32={tf32}"), torch.device("cuda"))
    backends: Any = torch.backends
    found = [o.fp32_precision for o in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)]
    assert found == [chosen] * 3
    assert ("rounded" in note) == (tf32 == "true")
    assert backends.cudnn.benchmark


def test_products_in_half_precision_are_summed_in_fp32_and_it_is_said() -> None:
    products: Any = torch.backends.cuda.matmul
    for name in HALF_SUMS:
        setattr(products, name, True)
    (note,) = set_numerics(config(), CPU)
    assert "bf16" not in note and products.allow_bf16_reduced_precision_reduction, "these are CUDA's"
    (note,) = set_numerics(config(), torch.device("cuda"))
    assert "in bf16 and fp16: summed in fp32" in note
    assert [getattr(products, name) for name in HALF_SUMS] == [False] * 3


def test_the_number_of_threads_that_sum_on_a_cpu_is_said() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        (note,) = set_numerics(config(), CPU)
    finally:
        torch.set_num_threads(before)
    assert "by 3 threads (OMP_NUM_THREADS), another number rounds otherwise" in note
    (note,) = set_numerics(config(), torch.device("cuda"))
    assert "OMP_NUM_THREADS" not in note


def test_deterministic_mode_switches_off_what_breaks_it_and_says_so() -> None:
    wanted = config("train.deterministic=true")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":1:1"
    _, note = set_numerics(wanted, torch.device("cuda"))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    for said in ("xformers", "grid_sample", ":4096:8 instead of :1:1"):
        assert said in note
    assert isinstance(repeating_resizes(torch.device("cuda")), RepeatingResizes)
    assert not isinstance(repeating_resizes(CPU), RepeatingResizes)
    set_numerics(config(), torch.device("cuda"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_auto_attention_takes_no_kernel_that_adds_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mf_scale.models.attention._why_not", lambda *_: None)
    resolve_kernel.cache_clear()
    half = torch.bfloat16
    assert resolve_kernel("auto", "cuda", half) == "xformers"
    set_numerics(config("train.deterministic=true"), torch.device("cuda"))
    assert resolve_kernel("auto", "cuda", half) == "sdpa"
    set_numerics(config(), torch.device("cuda"))
    assert resolve_kernel("auto", "cuda", half) == "xformers"
    with pytest.raises(UserError, match=r"with train\.deterministic take auto or sdpa"):
        config("train.deterministic=true", "model.attention=xformers")


def test_fp16_on_a_cpu_is_said_to_be_slow() -> None:
    assert "tens of times" in set_numerics(config("train.precision=fp16"), CPU)[-1]
    assert len(set_numerics(config("train.precision=bf16"), CPU)) == 1


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_of_a_precision(precision: str, dtype: torch.dtype | None) -> None:
    with autocast(CPU, precision):
        assert torch.is_autocast_enabled("cpu") == (dtype is not None)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)


@pytest.mark.parametrize("backbone", ["resnet10t", "swin_tiny_patch4_window7_224", "convnextv2_atto"])
def test_norms_take_and_give_fp32_under_autocast_on_a_cpu(backbone: str) -> None:
    model = build_model(config(f"model.backbone.name={backbone}").model, CLASSES, seed=0)
    names = list(model.state_dict())
    seen: dict[str, set[torch.dtype]] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__.lower()
        if "norm" in kind and "batchnorm" not in kind and not kind.endswith("mlp"):

            def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                seen.setdefault(name, set()).update((inputs[0].dtype, output.dtype))

            module.register_forward_hook(note)
    with autocast(CPU, "bf16"):
        prediction = model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert prediction.pixel_embeddings.dtype == torch.bfloat16  # the rest is half
    assert len(seen) > 6
    assert {dtype for dtypes in seen.values() for dtype in dtypes} == {torch.float32}
    assert names == list(model.state_dict())


OWN_NORMS = {
    "layer": lambda: nn.LayerNorm(16),
    "group": lambda: timm.layers.GroupNorm(16, num_groups=4),
    "rms": lambda: timm.layers.RmsNorm(16),
    "simple": lambda: timm.layers.SimpleNorm(16),
    "response": lambda: timm.layers.grn.GlobalResponseNorm(16),
    "evo": lambda: timm.layers.EvoNorm2dS0(16, group_size=4),
}


@pytest.mark.parametrize("kind", list(OWN_NORMS))
def test_a_norm_computes_in_fp32_from_half_inputs(kind: str) -> None:
    norm = nn.Sequential(OWN_NORMS[kind]())
    assert widen_norms(norm) == 1
    shape = (2, 16, 16, 16)
    x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1).bfloat16()
    with autocast(CPU, "bf16"):
        out = norm(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, norm(x.float()))


def test_batch_norms_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), timm.layers.BatchNormAct2d(8), timm.layers.FrozenBatchNormAct2d(8))
    assert widen_norms(model) == 0


def test_gathers_sample_what_grid_sample_does() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 2, 5, 7, dtype=torch.float64, generator=generator)
    points = torch.rand(3, 50, 2, dtype=torch.float64, generator=generator)
    points[0, :4] = torch.tensor([[0, 0], [1, 1], [0, 1], [1, 0]], dtype=torch.float64)
    gradients = []
    for sample in (sample_bilinear, gather_bilinear):
        leaf = maps.clone().requires_grad_()
        value = sample(leaf, points)
        (value**2).sum().backward()
        gradients.append((value.detach(), leaf.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(9, 20), (4, 5), (7, 6)])
def test_products_resize_as_torch_does(mode: str, size: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(0))
    gradients = []
    for resize in (F.interpolate, lambda x, size, mode, **_: resize_by_products(x, size, mode)):
        leaf = maps.clone().requires_grad_()
        value = resize(leaf, size=size, mode=mode, antialias=True)
        (value**2).sum().backward()
        gradients.append((value.detach(), leaf.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_only_antialiased_resizes_are_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[Any, ...]] = []

    def take(x: Tensor, *rest: Any) -> Tensor:
        taken.append(rest)
        return x

    monkeypatch.setattr("mf_scale.models.resizing.resize_by_products", take)
    x = torch.zeros(1, 1, 4, 4)
    with RepeatingResizes():
        assert F.interpolate(x, size=(8, 8), mode="nearest").shape == (1, 1, 8, 8)
        assert F.interpolate(x, scale_factor=2, mode="bilinear").shape == (1, 1, 8, 8)
        F.interpolate(x, size=(8, 8), mode="bicubic", antialias=True)
    assert taken == [((8, 8), "bicubic", False)]


def _two_steps(wanted: Config, device: torch.device) -> list[Tensor]:
    """Parameters after two updates, from a fresh model."""
    set_numerics(wanted, device)
    model = build_model(wanted.model, CLASSES, seed=0).to(device)
    criterion = choose_criterion(wanted, CLASSES)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    transfer = Transfer(device)
    for step in range(2):
        batch = random_batch([3, 5, 0, 4], (128, 160), seed=step)
        if wanted.model.kind != "mask_classification":
            batch.segment_map = batch.segment_map[:, :1]
        normalisers = criterion.normalisers(criterion.totals(batch))
        for number, micro in enumerate(transfer.micro_batches(batch, 2)):
            seed_model(0, step, 2 * number)
            with autocast(device, wanted.train.precision):
                prediction = model(micro.images)
            criterion(prediction, micro, normalisers).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().cpu() for p in model.parameters()]


CASES = {
    "resnet": ["model.backbone.name=resnet10t", "model.backbone.freeze_norm=false"],
    "swin": ["model.backbone.name=swin_tiny_patch4_window7_224", "model.backbone.drop_path=0.2"],
    "vit": ["model.backbone.name=vit_tiny_patch16_224"],
    "points": ["model.backbone.name=resnet10t", "loss.points=200"],
    "per-pixel": ["model.backbone.name=resnet10t", "model.kind=per_pixel_plus", "data.task=semantic"],
    "encoder": ["model.backbone.name=resnet10t", "model.pixel_decoder.encoder_layers=1", "loss.kernels=eager"],
}


@pytest.mark.parametrize("case", ["resnet", "points"])
def test_a_deterministic_run_repeats_on_a_cpu(case: str) -> None:
    wanted = config("train.deterministic=true", "train.precision=bf16", *CASES[case])
    assert all(torch.equal(a, b) for a, b in zip(_two_steps(wanted, CPU), _two_steps(wanted, CPU), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("case", list(CASES))
def test_a_deterministic_run_repeats_on_cuda(case: str, precision: str) -> None:
    """No operator refuses, and two runs end with the same bits."""
    device = torch.device("cuda", 0)
    wanted = config("train.deterministic=true", f"train.precision={precision}", *CASES[case])
    first = _two_steps(wanted, device)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, _two_steps(wanted, device), strict=True))
