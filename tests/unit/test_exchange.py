"""`mf-scale import` and the folders of transformers, as a user meets them; bundles."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mf_scale.bundle import write_bundle
from mf_scale.cli import main
from mf_scale.config.load import config_to_yaml, load_config
from mf_scale.config.schema import Config
from mf_scale.errors import UserError
from mf_scale.evaluation.loading import LoadedModel, load_model
from mf_scale.exchange import import_model, write_transformers_folder
from mf_scale.models.build import build_model
from mf_scale.models.exchange.detectron2_names import caveat, detectron2_links
from mf_scale.models.exchange.families import FAMILIES
from mf_scale.models.exchange.links import to_theirs
from mf_scale.rundir import WEIGHTS
from mf_scale.vocabulary import ClassInfo, Vocabulary
from tests.conftest import SAMPLE
from tests.unit.maskformers import CLASSES, NAMES, mask_logits, model_config, random_maskformer, saved

NAME = "resnet18"
VOCABULARY = Vocabulary("seven", tuple(ClassInfo(name, i < 3, 10 + i) for i, name in enumerate(NAMES)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random MaskFormer as transformers saves it."""
    return saved(random_maskformer(NAME, layers=1), tmp_path_factory.mktemp("hub") / "maskformer-r18")


@pytest.fixture
def ours(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A configuration, a vocabulary and the weights that go with them."""
    config = Config(model=model_config(NAME, layers=1))
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    (tmp_path / "vocabulary.json").write_text(json.dumps(VOCABULARY.to_dict()))
    state = build_model(config.model, CLASSES, seed=2).state_dict()
    return tmp_path / "config.yaml", tmp_path / "vocabulary.json", state


def run(source: Path, out: Path, *overrides: str, config: Path | None = None, vocabulary: Path | None = None) -> str:
    files = {"config": config and str(config), "vocabulary": vocabulary and str(vocabulary)}
    return import_model(source, out, overrides=overrides, **files)  # type: ignore[arg-type]


def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder), (), torch.device("cpu"))


def copied(folder: Path, place: Path, **changes: Any) -> Path:
    """The folder with other values in its config.json; a change may be a dictionary inside."""
    place.mkdir()
    for file in folder.iterdir():
        os.link(file, place / file.name)
    data = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and key != "id2label" else value
    (place / "config.json").unlink()
    (place / "config.json").write_text(json.dumps(data))
    return place


def test_a_folder_of_transformers_predicts_here_and_goes_back_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    assert main(["import", str(folder), "--out", str(tmp_path / "ours"), "eval.object_threshold=0.5"]) == 0
    said = capsys.readouterr().out
    assert "0 missing, 0 unexpected, 0 of another shape" in said and "all are things" in said
    assert "(20 counters of batch norms" in said and "1 x the loss's class weights" in said
    model = loaded(tmp_path / "ours")
    assert (model.config.model.backbone.name, model.config.model.decoder.layers) == (NAME, 1)
    assert (model.config.eval.short_side, model.config.eval.max_side) == (96, 128)
    assert model.config.eval.object_threshold == 0.5 and model.vocabulary.names == NAMES

    image = sorted(SAMPLE.rglob("*.jpg"))[0]
    arguments = ["predict", str(image), "--run", str(tmp_path / "ours"), "--out", str(tmp_path / "seen")]
    assert main(arguments) == 0 and list((tmp_path / "seen").iterdir())

    write_transformers_folder(model.model, model.config, model.vocabulary, tmp_path / "back")
    first, back = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert first.keys() == back.keys() and all(torch.equal(tensor, back[key]) for key, tensor in first.items())
    theirs, info = transformers.MaskFormerForInstanceSegmentation.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(info.values()), info
    images = torch.randint(0, 256, (1, 3, 64, 96))
    with torch.no_grad():
        prediction, answer = model.model(images), theirs.eval()(model.model.prepare(images).contiguous())  # type: ignore[operator]
    assert (prediction.class_logits - answer.class_queries_logits).abs().max() < 1e-4
    assert (mask_logits(prediction) - answer.masks_queries_logits).abs().max() < 1e-4


def test_weights_in_several_files_and_in_torch_files_are_read(folder: Path, tmp_path: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    shards = {"one": names[:100], "two": names[100:]}
    for kind in ("bin", "safetensors"):
        place = copied(folder, tmp_path / kind)
        (place / "model.safetensors").unlink()
        stem = "model" if kind == "safetensors" else "pytorch_model"
        for shard, members in shards.items():
            content = {name: whole[name] for name in members}
            file = place / f"{stem}-{shard}.{kind}"
            save_file(content, file) if kind == "safetensors" else torch.save(content, file)
        index = {"weight_map": {name: f"{stem}-{shard}.{kind}" for shard, m in shards.items() for name in m}}
        (place / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
        run(place, tmp_path / f"ours-{kind}")
    run(folder, tmp_path / "ours")
    wanted = (tmp_path / "ours" / WEIGHTS).read_bytes()
    assert wanted == (tmp_path / "ours-bin" / WEIGHTS).read_bytes()
    assert wanted == (tmp_path / "ours-safetensors" / WEIGHTS).read_bytes()
    (tmp_path / "bin" / "pytorch_model-two.bin").rename(tmp_path / "outside.bin")
    with pytest.raises(UserError, match="does not exist"):
        run(tmp_path / "bin", tmp_path / "none")
    index = {"weight_map": {"a": "pytorch_model-one.bin", "b": "../outside.bin"}}  # an index does not lead outside
    (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"does not exist \(.*bin/outside.bin\)"):
        run(tmp_path / "bin", tmp_path / "none")


def test_a_vocabulary_says_what_things_are_and_must_have_as_many_classes(
    folder: Path, tmp_path: Path, ours: tuple[Path, Path, Any]
) -> None:
    assert "things" not in run(folder, tmp_path / "ours", vocabulary=ours[1])
    assert loaded(tmp_path / "ours").vocabulary == VOCABULARY
    fewer = {**VOCABULARY.to_dict(), "classes": VOCABULARY.to_dict()["classes"][:5]}
    ours[1].write_text(json.dumps(fewer))
    with pytest.raises(UserError, match=r"the weights know 7 classes, but vocabulary 'seven' has 5"):
        run(folder, tmp_path / "none", vocabulary=ours[1])
    with pytest.raises(UserError, match=r"model.num_classes = 9, but vocabulary"):
        run(folder, tmp_path / "none", "model.num_classes=9")


def test_what_does_not_fit_is_shown_in_a_table_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    queries, norm = "model.transformer_module.queries_embedder.weight", "model.transformer_module.decoder.layernorm"
    tensors["surplus"] = tensors.pop(f"{norm}.bias")
    tensors[queries] = torch.zeros(99, 256)
    place = copied(folder, tmp_path / "off")
    (place / "model.safetensors").unlink()
    save_file(tensors, place / "model.safetensors")
    with pytest.raises(UserError) as refusal:
        run(place, tmp_path / "ours")
    text = str(refusal.value)
    assert "1 missing, 1 unexpected, 1 of another shape" in text and "unexpected surplus" in text
    assert f"missing    {norm}.bias" in text
    assert f"transformer_decoder.queries.weight ({queries}): [99, 256] in the file, [100, 256] here" in text
    assert [entry.name for entry in tmp_path.iterdir()] == ["off"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mask2former"}, "a 'mask2former' model"),
        ({"backbone_config": {"model_type": "timm_backbone"}}, "model_type timm_backbone"),
        ({"backbone_config": {"depths": [2, 2, 2, 3]}}, "depths"),
        ({"backbone_config": {"depths": 3}}, "depths 3"),
        ({"backbone_config": {"downsample_in_bottleneck": True}}, "downsample_in_bottleneck = True"),
        ({"decoder_config": {"activation_function": "gelu"}}, "activation_function = 'gelu'"),
        ({"decoder_config": None}, "no decoder_config"),
        ({"decoder_config": {"d_model": "wide"}}, "model.decoder.width"),
        ({"id2label": None}, "no id2label"),
        ({"id2label": {"0": "a", "2": "b"}}, "are not 0, 1, 2"),
        ({"id2label": dict.fromkeys(map(str, range(7)), "same")}, "same name"),
        ({"dice_weight": "${oc.env:HOME}"}, "reads the environment"),
    ],
)
def test_a_config_json_that_is_not_understood_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match="(?s)" + words.replace("$", r"\$").replace("(", r"\(")):
        run(copied(folder, tmp_path / "other", **changes), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_what_a_folder_does_otherwise_is_said(folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path / "other", decoder_config={"auxiliary_loss": True, "attention_dropout": 0.3})
    (place / "preprocessor_config.json").unlink()
    (place / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "size": 64, "max_size": 96, "size_divisibility": 0})
    )
    said = run(place, tmp_path / "ours")
    assert "auxiliary_loss" in said and "'attention_dropout': 0.3" in said
    assert "image_mean = [0.5, 0.5, 0.5], here it is [0.485, 0.456, 0.406]: predictions will differ" in said
    config = loaded(tmp_path / "ours").config
    assert (config.eval.short_side, config.eval.max_side, config.model.size_divisor) == (64, 96, 1)


@pytest.mark.parametrize("freeze", [True, False])
def test_counters_of_batch_norms_may_be_missing_on_either_side(
    tmp_path: Path, ours: tuple[Path, Path, Any], freeze: bool
) -> None:
    config, vocabulary, _ = ours
    other = model_config(NAME, layers=1)
    other.backbone.freeze_norm = not freeze
    state = build_model(other, CLASSES, seed=2).state_dict()
    save_file(state, tmp_path / "own.safetensors")
    override = f"model.backbone.freeze_norm={freeze}"
    said = run(tmp_path / "own.safetensors", tmp_path / "ours", override, config=config, vocabulary=vocabulary)
    assert "0 missing, 0 unexpected" in said and "(20 counters of batch norms" in said
    for name, tensor in loaded(tmp_path / "ours").model.state_dict().items():
        assert torch.equal(tensor, state.get(name, torch.tensor(0)))


def test_a_file_needs_a_configuration_and_a_vocabulary(tmp_path: Path, ours: tuple[Path, Path, Any]) -> None:
    config, vocabulary, state = ours
    save_file(state, tmp_path / "own.safetensors")
    with pytest.raises(UserError, match="--config CONFIG is needed"):
        run(tmp_path / "own.safetensors", tmp_path / "none", vocabulary=vocabulary)
    with pytest.raises(UserError, match="--vocabulary FILE is needed"):
        run(tmp_path / "own.safetensors", tmp_path / "none", config=config)
    said = run(tmp_path / "own.safetensors", tmp_path / "ours", config=config, vocabulary=vocabulary)
    assert f"{len(state)} tensors fit" in said
    assert said.startswith(f"read: {tmp_path / 'own.safetensors'}")
    model = loaded(tmp_path / "ours")
    assert model.vocabulary == VOCABULARY and model.step == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.model.state_dict().items())
    with pytest.raises(UserError, match="1 missing, 0 unexpected"):
        save_file({name: t for name, t in state.items() if "queries" not in name}, tmp_path / "less.safetensors")
        run(tmp_path / "less.safetensors", tmp_path / "none", config=config, vocabulary=vocabulary)


def test_a_checkpoint_of_the_original_is_imported(tmp_path: Path, ours: tuple[Path, Path, Any]) -> None:
    config, vocabulary, state = ours
    links = detectron2_links(load_config(config).model, FAMILIES[NAME])
    arrays = {name: tensor.numpy() for name, tensor in to_theirs(links, state).tensors.items()}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))
    run(tmp_path / "model_final.pkl", tmp_path / "ours", config=config, vocabulary=vocabulary)
    model = loaded(tmp_path / "ours").model
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    other = ["model.backbone.name=resnet34"]
    with pytest.raises(UserError, match=r"missing    backbone.res2.2.conv1.weight"):
        run(tmp_path / "model_final.pkl", tmp_path / "none", *other, config=config, vocabulary=vocabulary)
    with pytest.raises(UserError, match="known for MaskFormer with these backbones only: resnet18"):
        run(
            tmp_path / "model_final.pkl",
            tmp_path / "none",
            "model.backbone.name=resnet26",
            config=config,
            vocabulary=vocabulary,
        )


def test_what_the_names_of_the_original_cannot_say_is_said(tmp_path: Path, ours: tuple[Path, Path, Any]) -> None:
    config, vocabulary, _ = ours
    model, file, override = model_config("resnet50s", layers=1), tmp_path / "c.pth", "model.backbone.name=resnet50s"
    links = detectron2_links(model, FAMILIES["resnet50s"])
    torch.save(to_theirs(links, build_model(model, CLASSES, seed=2).state_dict()).tensors, file)
    assert "RES5_MULTI_GRID" in run(file, tmp_path / "ours", override, config=config, vocabulary=vocabulary)
    assert caveat(model_config("resnet101"), FAMILIES["resnet101"]) is None
    dilated = replace(model, backbone=replace(model.backbone, multi_grid=[1, 2, 4]))
    assert caveat(dilated, FAMILIES["resnet50s"]) is None


def test_mistakes_end_with_exit_code_2_and_leave_nothing(
    folder: Path,
    tmp_path: Path,
    ours: tuple[Path, Path, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Spell:
        def __reduce__(self) -> Any:
            return os.system, ("touch ran",)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"model": Spell()}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    run(folder, tmp_path / "done")
    before, described = sorted(tmp_path.iterdir()), ["--config", str(ours[0]), "--vocabulary", str(ours[1])]
    for arguments, words in (
        (["bad.pkl", "--out", "new", *described], "nothing in it was run"),
        (["empty", "--out", "new"], "holds no config.json"),
        (["bad.pkl", "--out", "new"], "--config CONFIG is needed"),
        (["nowhere.pth", "--out", "new"], "neither a file nor a folder"),
        (["done", "--out", "new"], "a checkpoint of mf_scale already"),
        ([str(folder), "--out", "full"], "nothing is overwritten"),
        ([str(folder), "--out", "full/file"], "a file, not a folder"),
        ([str(folder), "--out", "new", "model.decoder.hedas=4"], "model.decoder.heads"),
    ):
        assert main(["import", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_bundle_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"a": torch.ones(3)}
    (tmp_path / "out").mkdir()
    write_bundle(tmp_path / "out", state, Config(), VOCABULARY, step=7)
    assert json.loads((tmp_path / "out" / "state.json").read_text()) == {"step": 7}
    with pytest.raises(UserError, match="nothing is overwritten"):
        write_bundle(tmp_path / "out", state, Config(), VOCABULARY, step=7)
    (tmp_path / "out" / WEIGHTS).write_bytes(b"altered")
    with pytest.raises(UserError, match="damaged"):
        loaded(tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mf_scale.bundle.write_atomically", full)
    with pytest.raises(UserError, match="Free some space"):
        write_bundle(tmp_path / "second", state, Config(), VOCABULARY, step=7)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_model_with_a_builder_comes_over_and_only_with_consent(tmp_path: Path) -> None:
    builder = "tests.segmentation_models:Own"
    settings = [f"model.pixel_level.builder={builder}", "model.decoder.layers=1", "model.decoder.queries=5"]
    config = load_config(None, settings)
    vocabulary = Vocabulary("two", (ClassInfo("a", True, 1), ClassInfo("b", False, 2)))
    model = build_model(config.model, 2, seed=0)
    write_bundle(tmp_path / "bundle", model.state_dict(), config, vocabulary, step=3)
    files = {name: str(tmp_path / "bundle" / name) for name in ("config.yaml", "vocabulary.json")}

    def bring(*overrides: str) -> str:
        weights, out = tmp_path / "bundle/weights.safetensors", tmp_path / "out"
        given = {"config": files["config.yaml"], "vocabulary": files["vocabulary.json"]}
        return import_model(weights, out, **given, overrides=overrides)

    with pytest.raises(UserError, match="only the checkpoint's own configuration names"):
        bring()
    assert "0 missing, 0 unexpected" in bring(f"model.pixel_level.builder={builder}")
