"""The model zoo: every published recipe is a configuration, every fact in it is right, every model has its size.

The tables below restate MaskFormer's model zoo and training configurations; nothing in them is read from configs/.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from mf_scale.config.load import load_config
from mf_scale.config.schema import Config
from mf_scale.config.validate import plan_batch, validate
from mf_scale.models.build import build_model

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Data:
    """A data set's part of its recipes; sizes in pixels."""

    task: str
    classes: int
    crop: tuple[int, int]
    shorter: tuple[float, float]
    """Of the resized training image, smallest and largest."""
    test_size: tuple[int, int]
    """Shorter side, longer side at most."""
    steps: int
    batch: int
    gpus: int
    thresholds: tuple[float, float] = (0.8, 0.8)


@dataclass(frozen=True)
class Backbone:
    name: str
    lr: float
    multiplier: float
    decay: float
    warmup: int
    drop_path: float


DATA = {
    "ade20k_150": Data("semantic", 150, (512, 512), (256, 1024), (512, 2048), 160_000, 16, 8),
    "ade20k_full": Data("semantic", 847, (512, 512), (256, 1024), (512, 2048), 200_000, 16, 8),
    "coco_stuff_10k": Data("semantic", 171, (640, 640), (320, 960), (640, 2560), 60_000, 32, 8),
    "cityscapes": Data("semantic", 19, (512, 1024), (512, 2048), (1024, 2048), 90_000, 16, 8),
    "mapillary": Data("semantic", 65, (1280, 1280), (1024, 4096), (2048, 2048), 300_000, 16, 8),
    "ade20k_panoptic": Data("panoptic", 150, (640, 640), (320, 1280), (640, 2560), 720_000, 16, 8, (0.7, 0.8)),
    "coco_panoptic": Data("panoptic", 133, (1024, 1024), (512, 2048), (800, 1333), 554_400, 64, 64),
}
LARGE_ADE = replace(DATA["ade20k_150"], crop=(640, 640), shorter=(320, 1280), test_size=(640, 2560))
"""Swin-B and Swin-L train ADE20K-150 on crops of 640."""


def resnet(name: str) -> Backbone:
    return Backbone(name, 1e-4, 0.1, 1e-4, 0, 0.0)


def swin(name: str) -> Backbone:
    return Backbone(name, 6e-5, 1.0, 0.01, 1500, 0.3)


BACKBONES = {
    "resnet50": resnet("resnet50.tv_in1k"),
    "resnet101": resnet("resnet101.tv_in1k"),
    "resnet101c": resnet("resnet101s.gluon_in1k"),
    "swin_tiny": swin("swin_tiny_patch4_window7_224.ms_in1k"),
    "swin_small": swin("swin_small_patch4_window7_224.ms_in1k"),
    "swin_base": swin("swin_base_patch4_window12_384.ms_in22k"),
    "swin_large": swin("swin_large_patch4_window12_384.ms_in22k"),
}
# Recipe -> published mIoU or PQ, and millions of parameters where published.
ZOO: dict[str, tuple[float, float | None]] = {
    "ade20k_150/maskformer_resnet50": (44.5, 41.3),
    "ade20k_150/maskformer_resnet101": (45.5, 60.3),
    "ade20k_150/maskformer_resnet101c": (46.0, None),
    "ade20k_150/maskformer_swin_tiny": (46.7, 41.8),
    "ade20k_150/maskformer_swin_small": (49.8, 63.1),
    "ade20k_150/maskformer_swin_base": (52.7, 101.8),
    "ade20k_150/maskformer_swin_large": (54.1, 211.6),
    "ade20k_150/per_pixel_resnet50": (39.2, None),
    "ade20k_150/per_pixel_plus_resnet50": (41.9, None),
    "ade20k_full/maskformer_resnet50": (16.0, None),
    "ade20k_full/maskformer_resnet101": (16.8, None),
    "ade20k_full/maskformer_resnet101c": (17.4, None),
    "ade20k_full/per_pixel_resnet50": (12.4, None),
    "ade20k_full/per_pixel_plus_resnet50": (13.9, None),
    "coco_stuff_10k/maskformer_resnet50": (37.1, None),
    "coco_stuff_10k/maskformer_resnet101": (38.1, None),
    "coco_stuff_10k/maskformer_resnet101c": (38.0, None),
    "coco_stuff_10k/per_pixel_resnet50": (32.4, None),
    "coco_stuff_10k/per_pixel_plus_resnet50": (34.2, None),
    "cityscapes/maskformer_resnet101": (78.5, None),
    "cityscapes/maskformer_resnet101c": (79.7, None),
    "mapillary/maskformer_resnet50": (53.1, None),
    "coco_panoptic/maskformer_resnet50": (46.5, None),
    "coco_panoptic/maskformer_resnet101": (47.6, None),
    "coco_panoptic/maskformer_swin_tiny": (47.7, None),
    "coco_panoptic/maskformer_swin_small": (49.7, None),
    "coco_panoptic/maskformer_swin_base": (51.8, None),
    "coco_panoptic/maskformer_swin_large": (52.7, None),
    "ade20k_panoptic/maskformer_resnet50": (34.7, None),
    "ade20k_panoptic/maskformer_resnet101": (35.7, None),
}
every_recipe = pytest.mark.parametrize("recipe", ZOO)


def load(recipe: str) -> Config:
    config = load_config(CONFIGS / f"{recipe}.yaml")
    validate(config)
    return config


def parts(recipe: str) -> tuple[str, Data, str, Backbone]:
    """Kind, data set, its name, backbone."""
    folder, _, name = recipe.partition("/")
    kind = name.rpartition("_resnet" if "resnet" in name else "_swin")[0]
    data = LARGE_ADE if recipe.startswith("ade20k_150") and name.endswith(("base", "large")) else DATA[folder]
    return kind, data, folder, BACKBONES[name.removeprefix(f"{kind}_")]


def test_the_zoo_is_whole_and_nothing_else_lies_in_its_folders() -> None:
    found = {str(p.relative_to(CONFIGS).with_suffix("")) for folder in DATA for p in (CONFIGS / folder).glob("*.yaml")}
    assert found == set(ZOO)


@every_recipe
def test_the_first_line_says_what_it_is_and_what_was_published(recipe: str) -> None:
    lines = (CONFIGS / f"{recipe}.yaml").read_text().splitlines()
    metric = "PQ" if parts(recipe)[1].task == "panoptic" else "mIoU"
    assert lines[0].startswith("# ") and f"published: {ZOO[recipe][0]} {metric}" in lines[0]
    assert len(lines) < 40


@every_recipe
def test_the_data_and_its_schedule(recipe: str) -> None:
    config, (_, data, folder, _) = load(recipe), parts(recipe)
    assert config.run_dir == f"runs/{recipe.replace('/', '_')}"
    assert (config.data.train, config.data.val) == (f"data/{folder}/train", f"data/{folder}/val")
    assert (config.data.task, config.model.num_classes) == (data.task, data.classes)
    assert tuple(config.data.crop) == data.crop and config.data.flip == 0.5
    assert tuple(s * min(data.crop) for s in config.data.scale) == pytest.approx(data.shorter)
    assert (config.eval.short_side, config.eval.max_side) == data.test_size
    assert (config.eval.object_threshold, config.eval.overlap_threshold) == data.thresholds
    assert (config.train.steps, config.train.global_batch) == (data.steps, data.batch)
    assert plan_batch(config, data.gpus).accumulation == 1  # the published GPUs take the batch in one piece
    coco = folder == "coco_panoptic"
    assert config.data.resize == ("detr" if coco else "scale") and config.data.color is not coco
    expected = ("step", [369_600], 0.1) if coco else ("poly", [], 0.1)
    assert (config.schedule.name, config.schedule.milestones, config.schedule.gamma) == expected
    assert config.loss.ignored_pixels == ("exclude" if coco else "negative")
    assert config.schedule.power == 0.9


@every_recipe
def test_the_optimizer_follows_the_backbone(recipe: str) -> None:
    config, (_, _, _, backbone) = load(recipe), parts(recipe)
    own = config.model.backbone
    assert (own.name, own.weights, own.drop_path) == (backbone.name, "timm", backbone.drop_path)
    assert own.freeze_norm and (own.dropout, own.attention_dropout) == (0.0, 0.0)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.backbone_multiplier) == (backbone.lr, backbone.multiplier)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (backbone.decay, 0.01)
    assert config.schedule.warmup_updates == backbone.warmup
    assert backbone.warmup == 0 or config.schedule.warmup_start == 1e-6


@every_recipe
def test_the_model_and_its_loss(recipe: str) -> None:
    config, (kind, data, folder, _) = load(recipe), parts(recipe)
    kinds = {"maskformer": "mask_classification"}
    assert config.model.kind == kinds.get(kind, kind)
    decoder, masks = config.model.decoder, config.model.pixel_decoder
    assert (decoder.layers, decoder.width, decoder.heads, decoder.feedforward) == (6, 256, 8, 2048)
    assert (decoder.dropout, decoder.pre_norm, decoder.deep_supervision, decoder.queries) == (0.1, False, True, 100)
    assert (masks.width, masks.mask_channels) == (256, 256)
    assert masks.encoder_layers == (6 if data.task == "panoptic" and "resnet" in recipe else 0)
    assert config.model.size_divisor == (1 if folder == "coco_panoptic" else 32)  # published COCO models do not pad
    for weights in (config.loss, config.matching):
        assert (weights.class_weight, weights.focal_weight, weights.dice_weight) == (1.0, 20.0, 1.0)
    assert (config.loss.no_object_weight, config.loss.focal_alpha, config.loss.focal_gamma) == (0.1, 0.25, 2.0)


@every_recipe
def test_every_model_is_built_and_has_its_published_size(recipe: str) -> None:
    """With the weights that a frozen batch norm keeps as buffers: they are parameters in the published counts."""
    config = load(recipe)
    bare = replace(config.model, backbone=replace(config.model.backbone, weights="none"))
    assert config.model.num_classes is not None
    with torch.device("meta"):
        model = build_model(bare, config.model.num_classes, seed=0)
    frozen = sum(b.numel() for n, b in model.named_buffers() if n.endswith((".weight", ".bias")))
    count = sum(p.numel() for p in model.parameters()) + frozen
    published = ZOO[recipe][1]
    if published is not None:
        assert count / 1e6 == pytest.approx(published, abs=0.051)
    assert count == expected_size(recipe)


def swin_size(width: int, depths: list[int], window: int) -> int:
    """Blocks of 12 C^2 + 13 C and a table of position biases, heads of 32 channels; a norm for each of the features."""
    size = 48 * width + 3 * width
    for stage, depth in enumerate(depths):
        channels = width * 2**stage
        size += depth * (12 * channels**2 + 13 * channels + (2 * window - 1) ** 2 * channels // 32) + 2 * channels
        size += 8 * channels**2 + 8 * channels if stage < 3 else 0
    return size


RESNET101 = 42_500_160
STEM = 3 * 9 * 64 + 64 * 9 * 64 + 64 * 9 * 128 + 2 * (64 + 64 + 128) - (3 * 49 * 64 + 2 * 64) + 64 * (64 + 256)
"""What three 3x3 convolutions have more than one of 7x7, with what the first block has more for its 128 channels."""
BACKBONE_SIZES = {  # parameters without the classifier, channels of the coarsest feature
    "resnet50": (23_508_032, 2048),
    "resnet101": (RESNET101, 2048),
    "resnet101c": (RESNET101 + STEM, 2048),
    "swin_tiny": (swin_size(96, [2, 2, 6, 2], 7), 768),
    "swin_small": (swin_size(96, [2, 2, 18, 2], 7), 768),
    "swin_base": (swin_size(128, [2, 2, 18, 2], 12), 1024),
    "swin_large": (swin_size(192, [2, 2, 18, 2], 12), 1536),
}


def expected_size(recipe: str) -> int:
    """Counted by hand from the architecture: FPN, encoder, decoder, heads."""
    kind, data, _, backbone = parts(recipe)
    name = next(n for n, b in BACKBONES.items() if b == backbone)
    size, channels = BACKBONE_SIZES[name]
    width, wide, classes = 256, 2048, data.classes
    linear = lambda i, o: i * o + o  # noqa: E731
    norm = 2 * width
    attention, feedforward = 4 * linear(width, width), linear(width, wide) + linear(wide, width)
    encoder = data.task == "panoptic" and "resnet" in recipe
    top = width if encoder else channels
    laterals = sum(channels // 2**i * width + norm for i in (1, 2, 3))
    fpn = 9 * top * width + norm + laterals + 3 * (9 * width * width + norm) + linear(9 * width, width)
    if encoder:
        fpn += linear(channels, width) + 6 * (attention + feedforward + 2 * norm)
    if kind == "per_pixel":
        return size + fpn + linear(width, classes)
    queries = classes if kind == "per_pixel_plus" else 100
    project = 0 if encoder else linear(channels, width)
    decoder = project + queries * width + 6 * (2 * attention + feedforward + 3 * norm) + norm
    heads = 3 * linear(width, width) + (0 if kind == "per_pixel_plus" else linear(width, classes + 1))
    return size + fpn + decoder + heads
