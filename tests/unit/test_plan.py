"""`mf-scale plan`: parameters and FLOPs against published measurements, batches, memory, and what it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from mf_scale.cli import main
from mf_scale.config.load import load_config
from mf_scale.data.index import Index
from mf_scale.errors import UserError
from mf_scale.models.outputs import PixelPrediction
from mf_scale.plan.activations import Tracer
from mf_scale.plan.parts import PRODUCT, count_parts
from mf_scale.plan.planning import plan_config
from tests.unit.packing import pack

CONFIGS = Path(__file__).parents[2] / "configs"
R50 = str(CONFIGS / "ade20k_150/maskformer_resnet50.yaml")


def gflop(recipe: str, *overrides: str) -> dict[str, float]:
    parts = count_parts(load_config(CONFIGS / f"{recipe}.yaml", overrides))
    return {part.name: part.flops / 1e9 for part in parts}


# Forward of one image, 2 x multiply-accumulate, measured with transformers' MaskFormer (../shared/design/recipes.md).
@pytest.mark.parametrize(
    ("recipe", "measured", "within"),
    [
        (
            "maskformer_resnet50",
            {"backbone": 42.7, "pixel decoder": 50.9, "transformer decoder": 2.6, "sum": 97.1},
            0.01,
        ),
        ("maskformer_swin_tiny", {"sum": 101.4}, 0.02),
        # Ours is less: transformers projects what pads the windows too (at 640 a 40 x 40 map is padded to 48 x 48).
        ("maskformer_swin_large", {"pixel decoder": 77.1, "transformer decoder": 3.0, "sum": 735.0}, 0.03),
    ],
)
def test_flops_are_those_measured_elsewhere(recipe: str, measured: dict[str, float], within: float) -> None:
    counted = gflop(f"ade20k_150/{recipe}")
    counted["sum"] = sum(counted.values())
    assert {name: counted[name] for name in measured} == pytest.approx(measured, rel=within)


def test_every_product_of_the_decoder_is_counted_whatever_the_kernel() -> None:
    """By hand: Q = 100 queries on the 16 x 16 map of a 512 image, d = 256; the mask product on 128 x 128."""
    layer = 6 * 2 * 100 * 256**2 + 2 * 2 * 256 * 256**2  # projections: all of queries but the keys and values of memory
    layer += 2 * 2 * 100 * 100 * 256 + 2 * 2 * 100 * 256 * 256  # scores and sums, of queries and of memory
    layer += 2 * 2 * 100 * 256 * 2048
    expected = {
        "transformer decoder": 6 * layer + 2 * 256 * 2048 * 256,
        "heads": 6 * 2 * 100 * 256 * (3 * 256 + 151),
        PRODUCT: 2 * 100 * 256 * 128 * 128,
    }
    for kernel in ("auto", "xformers", "reference"):
        counted = gflop("ade20k_150/maskformer_resnet50", f"model.attention={kernel}")
        assert {name: round(counted[name] * 1e9) for name in expected} == expected


def test_the_per_pixel_baselines_are_counted() -> None:
    plain = gflop("ade20k_150/per_pixel_resnet50")
    assert plain["backbone"] == pytest.approx(42.7, rel=0.01) and "transformer decoder" not in plain
    assert plain[PRODUCT] * 1e9 == 2 * 150 * 256 * 128 * 128
    assert gflop("ade20k_150/per_pixel_plus_resnet50")[PRODUCT] == plain[PRODUCT]


def test_a_frozen_norm_is_a_parameter_that_does_not_train() -> None:
    backbone = count_parts(load_config(R50))[0]
    assert (backbone.parameters, backbone.parameters - backbone.trainable) == (23_508_032, 53_120)
    free = count_parts(load_config(R50, ["model.backbone.freeze_norm=false"]))[0]
    assert free.parameters == free.trainable == backbone.parameters


def test_batches_for_every_number_of_ranks_and_the_reason_where_there_is_none() -> None:
    plan = plan_config(R50, ["train.global_batch=12", "data.crop=[64,64]"], 6)
    assert [(b.world_size, b.accumulation) for b in plan.batches] == [(1, 6), (2, 3), (3, 2), (4, 3), (6, 1)]
    assert plan.refusal is None
    began = time.process_time()
    many = plan_config(R50, ["train.global_batch=12", "data.crop=[64,64]"], 1_000_000)
    assert many.batches[-1].world_size == 12 and "cannot be shared by 1000000 ranks" in (many.refusal or "")
    assert time.process_time() - began < 20, "seconds of this process: not every number is tried"
    plan = plan_config(R50, ["train.global_batch=12", "data.crop=[64,64]"], 5)
    assert [b.world_size for b in plan.batches] == [1, 2, 3, 4]
    assert plan.refusal is not None and "cannot be shared by 5 ranks" in plan.refusal


def test_the_page_of_a_batch_that_cannot_be_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", R50, "--processes", "5", "model.compile=true"]) == 0
    page = capsys.readouterr().out
    for words in (
        "150 classes, image 512x512",
        "pixel decoder           7,540,480    7,540,480     50.87",
        "41,307,863",
        "    4            16            2             2",
        "cannot be shared by 5 ranks",
        "steps 160,000, images seen 2,560,000",
        "checkpoint, computed: weights 0.15 GiB + moments 0.31 GiB",
        "torch.compile: on",
    ):
        assert words in page
    assert max(len(line) for line in page.splitlines() if "cannot be shared" not in line) <= 160


def test_the_table_of_several_and_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    files = [R50, str(CONFIGS / "coco_stuff_10k/per_pixel_resnet50.yaml")]
    assert main(["plan", *files, "data.crop=[64,64]", "--processes", "3"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(CONFIGS))]
    assert len(rows) == 2 and "not cut" in rows[0] and "not cut" in rows[1]
    assert main(["plan", "--json", *files, "data.crop=[64,64]"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert [p["config"] for p in plans] == files and [p["num_classes"] for p in plans] == [150, 171]
    first = plans[0]
    assert first["parameters"] == sum(p["parameters"] for p in first["parts"]) == 41_307_863
    assert first["batches"][-1] == {"global_batch": 16, "micro_batch": 2, "accumulation": 1, "world_size": 8}
    assert first["memory_bytes"]["total"] == sum(v for k, v in first["memory_bytes"].items() if k != "total")


def small(*more: str) -> list[str]:
    return [R50, "data.crop=[128,128]", *more]


def test_the_page_says_what_fits_and_where_every_figure_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    placed = ["--nodes", "2", "--gpus-per-node", "4", "--gpu-memory", "4GiB", "--stages"]
    rates = ["--images-per-second", "100", "--worker-rate", "30"]
    assert main(["plan", *small("model.backbone.recompute_stages=[1,2]", "ema.decay=0.9"), *placed, *rates]) == 0
    page = " ".join(capsys.readouterr().out.split())
    for words in (
        "memory of each of 8 GPUs in GiB, micro-batch 2, computed:",
        "*2 0.15",
        " 3 + optimizer, weights offloaded",
        "bf16, attention auto, on cuda, stages 1, 2 recomputed, 30 segments an image (assumed)",
        "of 4.00 GiB given, 2.50 GiB are planned with (10% are left free, at least 1.50 GiB)",
        "take zero.stage=0 with train.micro_batch=2",
        "steps 160,000, images seen 2,560,000, epochs unknown (there is no index in",
        "time: 0.9 h of training alone, computed from 100.0 images/s of one GPU (given) x 8 = 800.0 images/s",
        "30.0 images/s (given), so 32 loader processes are needed, computed: 4 a rank, 20 cores a node",
        "data.workers=2 is too few: take data.workers=4",
        "+ average 0.15 GiB",
    ):
        assert words in page, words


def test_nothing_fits_says_what_would_help_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *small("zero.bucket_mib=8"), "--gpu-memory", "1.8GiB"]) == 2
    printed = capsys.readouterr()
    assert "nothing fits" in printed.out and "none fits" in printed.out
    for words in (
        "no ZeRO stage and no micro-batch fits into 0.30 GiB",
        "model.backbone.recompute_stages=[1,2,3,4]: ",
        "data.crop=[64,64]: ",
        "zero.offload_optimizer=true and zero.offload_parameters=true: ",
        "16 GPUs instead of 8: ",
    ):
        assert words in printed.err, words
    assert printed.err.count("\n") == 1


def test_the_source_tells_classes_epochs_and_segments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    assert pack(packed) == 0
    capsys.readouterr()
    demo = [str(CONFIGS / "demo.yaml"), f"data.train={packed}", "model.num_classes=null", "--json", "--processes", "2"]
    assert main(["plan", *demo, "--device", "cpu"]) == 0
    plan = json.loads(capsys.readouterr().out)[0]
    index = Index.open(packed)
    assert plan["num_classes"] == len(index.vocabulary)
    assert plan["segments"] == index.column("segments").max()
    assert plan["duration"]["epochs"] == 400 * 8 / index.samples
    assert plan["stages"][2]["activations"]["inputs"] == 0
    wrong = [str(CONFIGS / "demo.yaml"), f"data.train={packed}", "model.num_classes=9000"]
    for said, words in (
        (wrong, "num_classes = 9000, but"),
        ([*wrong[:2], "data.merge=[nowhere.json]"], "nowhere.json"),
    ):
        assert main(["plan", *said]) == 2  # what a training refuses, a plan does not promise
        assert words in capsys.readouterr().err
    assert plan["memory_bytes"]["total"] == plan["stages"][2]["total"] - plan["stages"][2]["activations"]["peak"]


def test_a_model_that_needs_numbers_is_refused_in_a_paragraph(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading(nn.Module):
        def forward(self, images: torch.Tensor) -> None:
            images.sum().item()

    monkeypatch.setattr("mf_scale.plan.activations.bare_model", lambda _: Reading())
    with pytest.raises(UserError, match="needs numbers to run"):
        Tracer(load_config(R50), segments=3, device="cpu")(1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([str(CONFIGS / "demo.yaml"), "model.num_classes=null", "data.train=nowhere"], "model.num_classes is not set"),
        ([R50, "--gpu-memory", "80"], "'80' is no size of a memory"),
        ([R50, "--gpu-memory", "0GB"], "'0GB' is no size of a memory"),
        ([R50, "--gpu-memory", "1GiB"], "1GiB is less than the 1.5 GiB that are left free"),
        ([R50, "--gpu-memory", "1.5GiB"], "1.5GiB is no more than the 1.5 GiB that are left free"),
        ([R50, "--nodes", "100000000"], "800,000,000 ranks are more than can be planned for"),
        ([R50, "--processes", "1048577"], "1,048,577 ranks are more than can be planned for"),
        ([R50, "--nodes", "2", "--processes", "8"], "--processes counts all ranks"),
        ([R50, R50, "--measure"], "--measure runs one configuration"),
        ([R50, "model.backbone.name=resnet5O"], "Nearest names"),
        ([R50, "train.stpes=1"], "Did you mean train.steps?"),
        ([str(CONFIGS / "nothing.yaml")], "does not exist"),
        (["train.steps=1"], "no configuration file to plan"),
        ([R50, "data.crop=[8,8]"], "each at least 64"),
    ],
)
def test_mistakes_are_one_paragraph(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


class Loose(nn.Module):
    """A model with a parameter and a product of its own, outside of its children."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Conv2d(3, 8, 1, bias=False)
        self.own = nn.Parameter(torch.zeros(8, 8))

    def forward(self, images: torch.Tensor) -> PixelPrediction:
        return PixelPrediction(torch.zeros(1, 5, 8), torch.einsum("bchw,cd->bdhw", self.inside(images), self.own))


def test_what_belongs_to_no_part_is_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mf_scale.models.build.build_model", lambda *_, **__: Loose())
    parts = count_parts(load_config(R50, ["data.crop=[64,64]"]))
    pixels = 64 * 64
    assert [(p.name, p.parameters, p.flops) for p in parts] == [
        ("inside", 24, 2 * 24 * pixels),
        ("other", 64, 2 * 64 * pixels),
        (PRODUCT, 0, 2 * 40 * pixels),
    ]


def test_a_model_that_wants_memory_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: object, **__: object) -> None:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors\nsecond line")

    monkeypatch.setattr("mf_scale.models.build.build_model", build)
    assert main(["plan", R50]) == 2
    said = capsys.readouterr().err
    assert "cannot be counted on torch's meta device: RuntimeError Tensor.item() cannot" in said
    assert R50 in said and "second line" not in said


def test_one_that_cannot_be_planned_does_not_hide_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("model: {backbone: {name: resnt50}}\n")
    files = ["configs/ade20k_150/per_pixel_resnet50.yaml", str(tmp_path / "bad.yaml")]
    assert main(["plan", *files, "model.num_classes=5"]) == 2
    printed = capsys.readouterr()
    assert "per_pixel_resnet50" in printed.out and "resnt50" in printed.err


@pytest.mark.parametrize("beside", ["manifest.json", "metrics.jsonl", "checkpoints"])
def test_code_that_only_a_checkpoint_names_is_not_run(
    beside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint is data, and `plan` builds the model."""
    (tmp_path / beside).mkdir() if beside == "checkpoints" else (tmp_path / beside).write_text("{}")
    victim = tmp_path / "ran"
    call = f"pixel_level: {{builder: 'os:mkdir', kwargs: {{path: '{victim}'}}}}"
    (tmp_path / "config.yaml").write_text(f"model: {{num_classes: 5, {call}}}\n")
    assert main(["plan", str(tmp_path / "config.yaml")]) == 2
    assert "os:mkdir" in capsys.readouterr().err and not victim.exists()
    assert main(["plan", str(tmp_path / "config.yaml"), "model.pixel_level.builder=os:mkdir"]) == 2
    assert victim.exists(), "asked for by name it is called (and returns no model)"
