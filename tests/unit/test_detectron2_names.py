"""Checkpoints of the original MaskFormer: their names, and pickles that are read without being run."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from mf_scale.config.schema import DecoderConfig, ModelConfig, PixelDecoderConfig
from mf_scale.errors import UserError
from mf_scale.models.build import build_model
from mf_scale.models.exchange.detectron2_names import as_saved_today, detectron2_links, without_use
from mf_scale.models.exchange.families import FAMILIES
from mf_scale.models.exchange.fit import fit
from mf_scale.models.exchange.links import to_theirs
from mf_scale.models.pickles import read_pickle
from mf_scale.models.weights import read_weights
from tests.unit.maskformers import CLASSES, model_config

SWIN = "swin_tiny_patch4_window7_224"
HAND_WRITTEN = {
    "resnet50": {
        "backbone.stem.conv1.weight": ("backbone.net.conv1.weight", (64, 3, 7, 7)),
        "backbone.stem.conv1.norm.running_var": ("backbone.net.bn1.running_var", (64,)),
        "backbone.res2.0.conv1.weight": ("backbone.net.layer1.0.conv1.weight", (64, 64, 1, 1)),
        "backbone.res2.0.shortcut.weight": ("backbone.net.layer1.0.downsample.0.weight", (256, 64, 1, 1)),
        "backbone.res3.0.shortcut.norm.running_mean": ("backbone.net.layer2.0.downsample.1.running_mean", (512,)),
        "backbone.res4.5.conv2.norm.bias": ("backbone.net.layer3.5.bn2.bias", (256,)),
        "backbone.res5.2.conv3.norm.weight": ("backbone.net.layer4.2.bn3.weight", (2048,)),
        "sem_seg_head.pixel_decoder.adapter_1.weight": ("pixel_decoder.laterals.2.0.weight", (256, 256, 1, 1)),
        "sem_seg_head.pixel_decoder.adapter_3.norm.bias": ("pixel_decoder.laterals.0.1.bias", (256,)),
        "sem_seg_head.pixel_decoder.layer_1.weight": ("pixel_decoder.smooths.2.0.weight", (256, 256, 3, 3)),
        "sem_seg_head.pixel_decoder.layer_4.weight": ("pixel_decoder.coarsest.0.weight", (256, 2048, 3, 3)),
        "sem_seg_head.pixel_decoder.layer_4.norm.weight": ("pixel_decoder.coarsest.1.weight", (256,)),
        "sem_seg_head.pixel_decoder.mask_features.bias": ("pixel_decoder.mask_features.bias", (256,)),
        "sem_seg_head.predictor.query_embed.weight": ("transformer_decoder.queries.weight", (100, 256)),
        "sem_seg_head.predictor.input_proj.weight": ("transformer_decoder.project.weight", (256, 2048, 1, 1)),
        "sem_seg_head.predictor.transformer.decoder.layers.5.multihead_attn.out_proj.bias": (
            "transformer_decoder.layers.5.cross_attention.output.bias",
            (256,),
        ),
        "sem_seg_head.predictor.transformer.decoder.layers.0.linear1.weight": (
            "transformer_decoder.layers.0.widen.weight",
            (2048, 256),
        ),
        "sem_seg_head.predictor.transformer.decoder.layers.3.norm3.bias": (
            "transformer_decoder.layers.3.norms.2.bias",
            (256,),
        ),
        "sem_seg_head.predictor.transformer.decoder.norm.weight": ("transformer_decoder.norm.weight", (256,)),
        "sem_seg_head.predictor.class_embed.bias": ("heads.class_head.bias", (CLASSES + 1,)),
        "sem_seg_head.predictor.mask_embed.layers.1.weight": ("heads.mask_head.2.weight", (256, 256)),
    },
    "resnet101s": {
        "backbone.stem.conv1.weight": ("backbone.net.conv1.0.weight", (64, 3, 3, 3)),
        "backbone.stem.conv2.norm.running_mean": ("backbone.net.conv1.4.running_mean", (64,)),
        "backbone.stem.conv3.weight": ("backbone.net.conv1.6.weight", (128, 64, 3, 3)),
        "backbone.stem.conv3.norm.weight": ("backbone.net.bn1.weight", (128,)),
        "backbone.res4.22.conv3.weight": ("backbone.net.layer3.22.conv3.weight", (1024, 256, 1, 1)),
    },
    SWIN: {
        "backbone.patch_embed.proj.weight": ("backbone.net.patch_embed.proj.weight", (96, 3, 4, 4)),
        "backbone.layers.0.downsample.reduction.weight": (
            "backbone.net.layers_1.downsample.reduction.weight",
            (192, 384),
        ),
        "backbone.layers.2.downsample.norm.bias": ("backbone.net.layers_3.downsample.norm.bias", (1536,)),
        "backbone.layers.2.blocks.5.attn.qkv.bias": ("backbone.net.layers_2.blocks.5.attn.qkv.bias", (1152,)),
        "backbone.layers.3.blocks.1.attn.relative_position_bias_table": (
            "backbone.net.layers_3.blocks.1.attn.relative_position_bias_table",
            (169, 24),
        ),
        "backbone.layers.1.blocks.0.mlp.fc2.weight": ("backbone.net.layers_1.blocks.0.mlp.fc2.weight", (192, 768)),
        "backbone.norm3.weight": ("backbone.norms.3.weight", (768,)),
        "sem_seg_head.predictor.input_proj.weight": ("transformer_decoder.project.weight", (256, 768, 1, 1)),
    },
    "encoder": {
        "sem_seg_head.pixel_decoder.input_proj.weight": ("pixel_decoder.encoder.project.weight", (256, 512, 1, 1)),
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.5.norm2.weight": (
            "pixel_decoder.encoder.layers.5.norms.1.weight",
            (256,),
        ),
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.out_proj.weight": (
            "pixel_decoder.encoder.layers.0.self_attention.output.weight",
            (256, 256),
        ),
        "sem_seg_head.pixel_decoder.layer_4.weight": ("pixel_decoder.coarsest.0.weight", (256, 256, 3, 3)),
    },
}
"""Their name: our name and the shape, written by hand from the sources of MaskFormer and detectron2."""


def config_of(kind: str) -> ModelConfig:
    if kind == "encoder":  # the paper's panoptic setting
        return model_config("resnet18", pixel_decoder=PixelDecoderConfig(encoder_layers=6))
    return model_config(kind)


def names_of(config: ModelConfig) -> Any:
    return detectron2_links(config, FAMILIES[config.backbone.name])


def small(**other: Any) -> ModelConfig:
    decoder = DecoderConfig(layers=2, width=32, heads=4, feedforward=48, queries=5)
    config = model_config("resnet18", pixel_decoder=PixelDecoderConfig(32, 16, encoder_layers=1), **other)
    return replace(config, decoder=decoder)


def as_numpy(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", HAND_WRITTEN)
def test_the_names_are_those_of_the_original(kind: str) -> None:
    config = config_of(kind)
    with torch.device("meta"):
        own = build_model(config, CLASSES, seed=0).state_dict()
    theirs = to_theirs(names_of(config), own)
    assert not theirs.missing and not theirs.unexpected
    ours = {link.theirs[0]: link.ours[0] for link in names_of(config)}
    for name, (our_name, shape) in HAND_WRITTEN[kind].items():
        assert (ours[name], tuple(theirs.tensors[name].shape)) == (our_name, shape), name
    report = fit(own, names_of(config), theirs.tensors, without_use).report
    assert report.complete and report.matched == len(own), report.table()


def test_where_the_encoder_has_the_decoders_width_nothing_is_projected_twice() -> None:
    names = {name for link in names_of(config_of("encoder")) for name in link.theirs}
    assert not any(name.startswith("sem_seg_head.predictor.input_proj") for name in names)


@pytest.mark.parametrize("attention", ["self_attn", "multihead_attn"])
def test_joined_projections_are_split_as_torch_joins_them(attention: str) -> None:
    ours = build_model(small(), CLASSES, seed=3).eval()
    prefix = f"sem_seg_head.predictor.transformer.decoder.layers.1.{attention}."
    theirs = to_theirs(names_of(small()), ours.state_dict()).tensors
    reference = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    reference.load_state_dict({n.removeprefix(prefix): t for n, t in theirs.items() if n.startswith(prefix)})
    layer: Any = ours.transformer_decoder.layers[1]  # type: ignore[union-attr,index]
    own = layer.self_attention if attention == "self_attn" else layer.cross_attention
    query, key, value = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    torch.testing.assert_close(own(query, key, value), reference(query, key, value)[0])


@pytest.mark.parametrize("published", [True, False], ids=["older names", "names of today"])
def test_a_pickle_of_the_original_goes_into_a_model_bit_by_bit(published: bool, tmp_path: Path) -> None:
    source = build_model(small(), CLASSES, seed=3)
    content = to_theirs(names_of(small()), source.state_dict()).tensors
    content |= {"criterion.empty_weight": torch.ones(8), "pixel_mean": torch.ones(3, 1, 1)}
    arrays_of = as_numpy(content)
    if published:  # MaskFormer's model zoo: the pixel decoder's parts lie in the head itself
        arrays_of = {name.replace("head.pixel_decoder.", "head."): array for name, array in arrays_of.items()}
    file = tmp_path / "model_final.pkl"
    file.write_bytes(pickle.dumps({"model": arrays_of, "__author__": "someone", "matching_heuristics": True}))
    model = build_model(small(), CLASSES, seed=4)
    fitted = fit(model.state_dict(), names_of(small()), as_saved_today(read_weights(file)), without_use)
    assert fitted.report.complete, fitted.report.table()
    assert len(fitted.notes) == 2 and fitted.notes[0].startswith("left out: 1 x the loss's class weights")
    model.load_state_dict(fitted.tensors)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_what_does_not_fit_is_named_as_the_file_names_it() -> None:
    model = build_model(small(), CLASSES, seed=3)
    content = to_theirs(names_of(small()), model.state_dict()).tensors
    layer = "sem_seg_head.predictor.transformer.decoder.layers.0"
    del content[f"{layer}.self_attn.in_proj_weight"]
    content[f"{layer}.norm4.weight"] = torch.ones(32)
    content[f"{layer}.norm2.bias"] = torch.ones(31)
    table = fit(model.state_dict(), names_of(small()), content, without_use).report.table()
    assert "1 unexpected, 1 of another shape" in table
    assert f"missing    {layer}.self_attn.in_proj_weight" in table
    assert f"unexpected {layer}.norm4.weight" in table
    assert f"transformer_decoder.layers.0.norms.1.bias ({layer}.norm2.bias): [31] in the file, [32] here" in table


def test_a_torch_checkpoint_with_everything_around_it_is_read(tmp_path: Path) -> None:
    tensors = {"sem_seg_head.predictor.query_embed.weight": torch.randn(3, 4)}
    torch.save({"model": tensors, "iteration": 9, "optimizer": {"state": {}}}, tmp_path / "model_final.pth")
    assert torch.equal(read_weights(tmp_path / "model_final.pth").popitem()[1], next(iter(tensors.values())))


class Spell:
    """Runs when unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "content",
    [
        Spell(),
        {"model": {"a": np.ones(3), "b": Spell()}},
        {"model": {"a": np.array([Spell()], dtype=object)}},
        {"model": {"a": torch.ones(3)}},
        {"model": {"a": np.array(["text"])}},
        {"model": {"a": np.zeros(2, [("x", "f4"), ("y", "f4")])}},
        {"model": Path("somewhere")},
        {"model": print},
        {"model": np.random.default_rng},
    ],
    ids=["spell", "in a model", "in an array", "torch", "text", "record", "class", "builtin", "numpy's function"],
)
def test_a_pickle_with_more_than_arrays_is_refused_and_not_run(
    content: Any, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.pkl").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(UserError, match="nothing in it was run"):
        read_weights(Path("bad.pkl"))
    assert not Path("ran").exists()
    if isinstance(content, Spell):  # the test can fail: Python's own reader runs it
        pickle.loads(Path("bad.pkl").read_bytes())  # noqa: S301
        assert Path("ran").exists()


def test_a_hostile_pickle_cannot_reach_numpy_or_the_file_system() -> None:
    names = [("numpy", "fromfile"), ("numpy", "load"), ("builtins", "eval"), ("builtins", "getattr"), ("io", "open")]
    names += [("numpy.core.multiarray", "fromfile"), ("mf_scale.models.pickles", "np.load"), ("os", "system")]
    for module, name in names:
        with pytest.raises(UserError, match="nothing in it was run"):
            _read(f"c{module}\n{name}\n(S'x'\ntR.".encode())


def test_damage_is_said() -> None:
    whole = pickle.dumps({"model": {"a": np.arange(100.0)}})
    for length in (0, 1, 20, len(whole) // 2, len(whole) - 1):
        with pytest.raises(UserError, match="cannot be read"):
            _read(whole[:length])
    short = whole.replace(b"Kd\x85", b"Ke\x85")  # the tuple (100,) becomes (101,)
    assert short != whole
    with pytest.raises(UserError, match="shape"):
        _read(short)


NUMBERS = st.sampled_from(["<f4", ">f4", "<f8", "<f2", "<i8", ">i4", "|u1", "|i1", "|b1"])


@given(
    NUMBERS.flatmap(
        lambda kind: arrays.arrays(np.dtype(kind), arrays.array_shapes(min_dims=0, min_side=0, max_dims=4))
    ),
    st.sampled_from("CFT"),
    st.integers(0, pickle.HIGHEST_PROTOCOL),
)
def test_arrays_of_every_kind_and_order_are_read_as_they_are(array: Any, order: str, protocol: int) -> None:
    array = array.T if order == "T" else np.array(array, order=order)  # type: ignore[call-overload]
    content = OrderedDict(model={"a": array, "b": array.dtype.type(1)}, __author__="someone", numbers=[1, 2.5, None])
    read = _read(pickle.dumps(content, protocol))
    assert read["__author__"] == "someone" and read["numbers"] == [1, 2.5, None]
    assert read["model"]["b"].item() == 1
    tensor = read["model"]["a"].numpy()
    assert tensor.shape == array.shape and tensor.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(tensor, array, equal_nan=array.dtype.kind == "f")


def _read(content: bytes) -> Any:
    class InMemory:
        """A file that `read_pickle` opens."""

        def open(self, _: str) -> io.BytesIO:
            return io.BytesIO(content)

    return read_pickle(InMemory())  # type: ignore[arg-type]
