"""Our MaskFormer against transformers', weights copied: the same logits, and folders that go both ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mf_scale.config.schema import Config, DecoderConfig, LossConfig, PixelDecoderConfig, PixelLevelConfig
from mf_scale.errors import UserError
from mf_scale.exchange import write_transformers_folder
from mf_scale.models.build import build_model
from mf_scale.models.exchange.families import FAMILIES, ResNet, Swin
from mf_scale.models.exchange.fit import fit
from mf_scale.models.exchange.transformers_config import class_names, expressible, model_json, settings
from mf_scale.models.exchange.transformers_names import (
    export_tensors,
    on_disk,
    relative_position_index,
    transformers_links,
    without_use,
)
from mf_scale.vocabulary import ClassInfo, Vocabulary
from tests.unit.maskformers import CLASSES, EVEN, NAMES, mask_logits, model_config, random_maskformer

transformers = pytest.importorskip("transformers")
ODD = (70, 90)
TOLERANCE = 1e-4
VOCABULARY = Vocabulary("seven", tuple(ClassInfo(name, i < 3, i) for i, name in enumerate(NAMES)))
THEIRS = sorted(n for n, made in FAMILIES.items() if isinstance(made, Swin) or not made.deep_stem)


def our_model(name: str, theirs: Any, divisor: int) -> nn.Module:
    """Ours with the weights of theirs."""
    config = model_config(name, size_divisor=divisor, layers=theirs.config.decoder_config.decoder_layers)
    ours = build_model(config, CLASSES, seed=1).eval()
    links = transformers_links(config, FAMILIES[name])
    fitted = fit(ours.state_dict(), links, on_disk(theirs.state_dict()), without_use)
    assert fitted.report.complete, fitted.report.table()
    ours.load_state_dict(fitted.tensors, strict=False)
    return ours


def assert_equal_logits(ours: nn.Module, theirs: Any, images: Tensor, pixel_mask: Tensor | None = None) -> None:
    with torch.no_grad():
        prediction = ours(images)
        answer = theirs(ours.prepare(images).contiguous(), pixel_mask=pixel_mask)  # type: ignore[operator]
    masks = mask_logits(prediction)
    height, width = masks.shape[-2:]
    assert (height, width) == (-(-images.shape[-2] // 4), -(-images.shape[-1] // 4))
    assert 1 < masks.std() < 10 and 1 < prediction.class_logits.std() < 10
    assert (prediction.class_logits - answer.class_queries_logits).abs().max() < TOLERANCE
    assert (masks - answer.masks_queries_logits[..., :height, :width]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        pytest.param("resnet101", marks=pytest.mark.soak),
        "swin_tiny_patch4_window7_224",
        pytest.param("swin_base_patch4_window12_384", marks=pytest.mark.soak),
    ],
)
def test_logits_equal_those_of_transformers(name: str) -> None:
    theirs, generator = random_maskformer(name), torch.Generator().manual_seed(0)
    for divisor in (32, 1):  # with padding to whole cells of the coarsest map, and without
        ours = our_model(name, theirs, divisor)
        for size in (EVEN, ODD):
            images = torch.randint(0, 256, (2, 3, *size), generator=generator, dtype=torch.uint8)
            padded = ours.prepare(images).shape[-2:]  # type: ignore[operator]
            assert padded == ((96, 96) if (divisor, size) == (32, ODD) else size)
            assert_equal_logits(ours, theirs, images)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_a_batch_padded_to_a_common_size_is_answered_alike_and_their_pixel_mask_changes_nothing(name: str) -> None:
    theirs = random_maskformer(name, layers=2)
    ours = our_model(name, theirs, 32)
    images = torch.randint(0, 256, (2, 3, *EVEN), generator=torch.Generator().manual_seed(0)).float()
    pixel_mask = torch.ones(2, *EVEN, dtype=torch.long)
    images[1, :, 40:] = images[1, :, :, 50:] = ours.prepare.mean  # type: ignore[assignment]
    pixel_mask[1, 40:] = pixel_mask[1, :, 50:] = 0
    assert not ours.prepare(images)[1, :, 40:].any()  # type: ignore[operator]
    assert_equal_logits(ours, theirs, images, pixel_mask)
    assert_equal_logits(ours, theirs, images)


@pytest.mark.parametrize(("name", "freeze"), [*((name, True) for name in THEIRS), ("resnet50", False)])
def test_every_name_of_every_backbone_has_its_counterpart(name: str, freeze: bool) -> None:
    config = model_config(name, layers=2)
    config = replace(config, backbone=replace(config.backbone, freeze_norm=freeze))
    described = model_json(config, LossConfig(), FAMILIES[name], NAMES)
    with torch.device("meta"):
        own = build_model(config, CLASSES, seed=0).state_dict()
        theirs = transformers.MaskFormerForInstanceSegmentation(transformers.MaskFormerConfig(**described))
    wanted = on_disk(theirs.state_dict())
    links = transformers_links(config, FAMILIES[name])
    report = fit(own, links, wanted, without_use).report
    assert report.complete and report.matched == len(own), report.table()
    written = export_tensors(config, FAMILIES[name], own, 0.1)
    assert {n: (t.shape, t.dtype) for n, t in written.items()} == {n: (t.shape, t.dtype) for n, t in wanted.items()}


@pytest.mark.parametrize("name", ["resnet50", "swin_tiny_patch4_window7_224"])
def test_transformers_opens_what_we_write(name: str, tmp_path: Path) -> None:
    config = Config(model=model_config(name, layers=2), loss=LossConfig(no_object_weight=0.2))
    ours = our_model(name, random_maskformer(name, layers=2), 32)
    write_transformers_folder(ours, config, VOCABULARY, tmp_path / "folder")
    theirs, info = transformers.MaskFormerForInstanceSegmentation.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.config.id2label == dict(enumerate(NAMES)) and theirs.config.no_object_weight == 0.2
    assert theirs.criterion.empty_weight.tolist() == pytest.approx([1.0] * CLASSES + [0.2])
    assert_equal_logits(ours, theirs.eval(), torch.randint(0, 256, (1, 3, *ODD)))
    processor = transformers.MaskFormerImageProcessor.from_pretrained(tmp_path / "folder")
    assert (processor.size_divisor, processor.ignore_index, processor.do_reduce_labels) == (32, 255, False)
    assert list(processor.image_mean) == list(ours.backbone.mean)  # type: ignore[arg-type]
    theirs.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / place / "model.safetensors") for place in ("folder", "again"))
    assert first.keys() == again.keys() and all(torch.equal(tensor, again[key]) for key, tensor in first.items())


@pytest.mark.parametrize("name", THEIRS)
def test_our_configuration_goes_through_config_json(name: str) -> None:
    config = model_config(name, layers=4, pixel_decoder=PixelDecoderConfig(width=128, mask_channels=96))
    described = json.loads(json.dumps(model_json(config, LossConfig(dice_weight=2.0), FAMILIES[name], NAMES)))
    values = settings(described, "here")
    assert (values["model.backbone.name"], values["model.pixel_decoder.width"]) == (name, 128)
    assert (values["model.pixel_decoder.mask_channels"], values["model.decoder.layers"]) == (96, 4)
    assert values["loss.dice_weight"] == 2.0 and class_names(described, "here") == NAMES
    ours, theirs = described["backbone_config"], transformers.MaskFormerConfig(**described).backbone_config
    assert all(list(getattr(theirs, key)) == value for key, value in ours.items() if isinstance(value, list))


def test_what_their_class_cannot_be_is_refused_by_name() -> None:
    impossible = model_config(
        "convnext_tiny",
        kind="per_pixel",
        pixel_decoder=PixelDecoderConfig(width=100, encoder_layers=6),
    )
    impossible = replace(impossible, decoder=DecoderConfig(pre_norm=True))
    with pytest.raises(UserError) as refusal:
        expressible(impossible)
    for reason in ("per_pixel", "convnext_tiny", "encoder_layers = 6", "width = 100", "pre_norm"):
        assert reason in str(refusal.value)
    for name in ("resnet101s", "resnet50d"):
        with pytest.raises(UserError, match=name):
            expressible(model_config(name))
    with pytest.raises(UserError, match="package:make"):
        expressible(model_config("resnet50", pixel_level=PixelLevelConfig(builder="package:make")))
    assert isinstance(expressible(model_config("resnet50.tv_in1k")), ResNet)


@pytest.mark.parametrize("window", [7, 12])
def test_positions_inside_a_window_are_numbered_as_theirs(window: int) -> None:
    config = transformers.MaskFormerSwinConfig(window_size=window)
    from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinSelfAttention

    index = MaskFormerSwinSelfAttention(config, 12, 3, window).relative_position_index
    assert torch.equal(relative_position_index(window), index)
