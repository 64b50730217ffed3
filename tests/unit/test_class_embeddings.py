"""The class head by text embeddings: files, the head, and another vocabulary for a trained model."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mf_scale.config.schema import Config
from mf_scale.distributed.env import World
from mf_scale.errors import UserError
from mf_scale.evaluation.loading import load_model
from mf_scale.evaluation.runner import evaluate_run
from mf_scale.export import export_run
from mf_scale.losses.class_loss import class_loss
from mf_scale.models.build import build_model
from mf_scale.models.class_embeddings import class_rows, read_class_embeddings, write_class_embeddings
from mf_scale.models.outputs import Classifier
from mf_scale.models.text_head import CLASS_ROWS, FIRST_SCALE, LARGEST_SCALE, TextClassHead
from mf_scale.plan.activations import Tracer
from mf_scale.plan.parts import count_parts
from mf_scale.rundir import RunDir
from mf_scale.training.initial import initial_model
from mf_scale.training.optimizer import parameter_groups
from mf_scale.vocabulary import ClassInfo, Vocabulary
from tests.unit.painted import VOCABULARY_4, painted_config, painted_source, write_checkpoint

CPU = torch.device("cpu")
WIDTH = 24
SOUNDS = Vocabulary("sounds", tuple(ClassInfo(n, n != "grass", i) for i, n in enumerate(("dog", "hound", "grass"))))


def letters(names: list[str]) -> Tensor:
    """A stand-in for an encoder of text: the sum of a fixed vector for each pair of neighbouring letters [K,D]."""
    rows = []
    for name in names:
        pairs = [f"^{name}$"[i : i + 2] for i in range(len(name) + 1)]
        seeds = [int.from_bytes(hashlib.sha256(pair.encode()).digest()[:4], "big") for pair in pairs]
        rows.append(sum(np.random.default_rng(seed).standard_normal(WIDTH) for seed in seeds))
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def text_config(file: Path | str) -> Config:
    config = painted_config(train__global_batch=2)
    config.model.class_embeddings = str(file)
    config.model.backbone = replace(config.model.backbone, name="resnet10t", weights="none")
    config.model.pixel_decoder = replace(config.model.pixel_decoder, width=16, mask_channels=16)
    config.model.decoder = replace(config.model.decoder, layers=1, queries=4, width=16, heads=2, feedforward=16)
    return config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "painted.safetensors"
    write_class_embeddings(path, letters(VOCABULARY_4.names), VOCABULARY_4)
    return path


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_rows_are_read_by_name_or_in_order_and_have_length_1(tmp_path: Path, kind: str) -> None:
    rows = letters(VOCABULARY_4.names).to(getattr(torch, kind))
    np.save(tmp_path / "a.npy", rows.numpy())
    order = [2, 0, 3, 1]
    names = [VOCABULARY_4.names[i] for i in order] + ["unused"]
    save_file({"x": torch.cat((rows[order], rows[:1]))}, tmp_path / "a.safetensors", {"names": json.dumps(names)})
    expected = F.normalize(rows.double(), dim=1).float()
    for name in ("a.npy", "a.safetensors"):
        found = class_rows(str(tmp_path / name), VOCABULARY_4)
        assert found is not None and torch.equal(found, expected), name
    np.save(tmp_path / "tiny.npy", rows.float().numpy() * np.float32(1e-30))
    tiny = class_rows(str(tmp_path / "tiny.npy"), VOCABULARY_4)
    assert tiny is not None and torch.allclose(tiny.norm(dim=1), torch.ones(4)), "a direction is one however short"
    assert class_rows(None, VOCABULARY_4) is None


def _save(matrix: Tensor, path: Path, **metadata: str) -> None:
    save_file({"x": matrix}, path, metadata or None)


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(painted_source(tmp_path_factory.mktemp("source")).source)


def test_logits_are_cosines_times_a_bounded_learned_scale() -> None:
    torch.manual_seed(0)
    rows = F.normalize(letters(VOCABULARY_4.names), dim=1)
    head, queries = TextClassHead(16, rows), torch.randn(3, 5, 16)
    torch.nn.init.normal_(head.no_object, std=3)  # of another length than it began with
    embeddings, weight, bias = head(queries)
    logits = Classifier(weight, bias).logits(embeddings)
    expected = F.cosine_similarity(head.project(queries)[..., None, :], torch.cat((rows, head.no_object[None])), dim=-1)
    assert logits.shape == (3, 5, 5) and torch.allclose(logits, FIRST_SCALE * expected, atol=1e-5)
    for value, scale in ((1e4, LARGEST_SCALE), (-1e4, 1.0)):
        torch.nn.init.constant_(head.scale, value)
        assert math.isclose(head(queries)[1][0].norm().item(), scale, rel_tol=1e-5)
    torch.nn.init.zeros_(head.scale)
    total, _ = class_loss(
        head(queries)[0].requires_grad_(), Classifier(head(queries)[1]), torch.randint(0, 5, (3, 5)), torch.ones(5)
    )
    total.backward()
    assert head.scale.grad is not None and head.no_object.grad is not None
    assert head.scale.grad.abs().sum() > 0 and head.no_object.grad.abs().sum() > 0 and not head.rows.requires_grad


def test_the_rows_are_kept_and_scale_and_no_object_do_not_decay(file: Path) -> None:
    config = text_config(file)
    model, _ = initial_model(config, VOCABULARY_4, None)
    rows = class_rows(str(file), VOCABULARY_4)
    state = model.state_dict()
    assert rows is not None and torch.equal(state[CLASS_ROWS], rows) and f"{CLASS_ROWS[:-4]}weight" not in state
    kept = {id(p) for g in parameter_groups(model, config.optimizer) if "no_decay" in g["name"] for p in g["params"]}
    parameters = dict(model.named_parameters())
    assert {n for n in parameters if "class_head" in n and id(parameters[n]) in kept} == {
        "heads.class_head.scale",
        "heads.class_head.no_object",
    }
    # Under autocast too the cosines are made in fp32.
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model.eval()(torch.zeros(1, 3, 64, 64))
    assert prediction.class_embeddings.dtype == prediction.classifier.weight.dtype == torch.float32


def test_it_is_planned_without_numbers(file: Path) -> None:
    """On the meta device, where autocast cannot even be switched off; and a micro-batch with everything it keeps."""
    config = text_config(file)
    config.model.num_classes = 4
    config.train.precision = "bf16"
    parts = {part.name: part for part in count_parts(config)}
    projection, scale_and_no_object, mask_head = 16 * WIDTH + WIDTH, 1 + WIDTH, 3 * (16 * 16 + 16)
    assert parts["heads"].trainable == projection + scale_and_no_object + mask_head
    assert Tracer(config, segments=3, device="cuda", where="x")(2).peak > 0


def test_a_checkpoint_alone_has_its_rows_and_a_file_at_inference_is_another_vocabulary(
    tmp_path: Path, file: Path, painted: str
) -> None:
    config = text_config(file)
    config.data.val = painted
    model, _ = initial_model(config, VOCABULARY_4, None)
    write_checkpoint(RunDir(tmp_path / "run"), config, model, 3, VOCABULARY_4)
    run, image = str(tmp_path / "run"), torch.randint(0, 256, (1, 3, 64, 64)).float()
    with torch.no_grad():
        before = model.eval()(image).class_logits
    file.rename(tmp_path / "elsewhere.safetensors")
    alone = load_model(run, [], CPU)
    assert torch.equal(alone.model(image).class_logits, before)
    other = tmp_path / "sounds.safetensors"
    write_class_embeddings(other, letters(SOUNDS.names), SOUNDS)
    loaded = load_model(run, [f"model.class_embeddings={other}"], CPU)
    assert loaded.vocabulary == SOUNDS and loaded.vocabulary.digest == SOUNDS.digest
    logits = loaded.model(image).class_logits
    # The same word is the same row, whichever vocabulary it stands in; so is no-object.
    assert logits.shape[-1] == 4 and torch.allclose(logits[..., [0, 2, 3]], before[..., [1, 3, 4]], atol=1e-5)
    with pytest.raises(UserError, match=r"'painted' \(4 classes\).*'sounds' \(3 classes\)"):
        evaluate_run(run, [f"model.class_embeddings={other}"], World(), split="val")
    table = evaluate_run(run, [f"model.class_embeddings={tmp_path / 'elsewhere.safetensors'}"], World(), split="val")
    assert "mIoU" in table


@pytest.mark.parametrize(
    ("matrix", "metadata", "sentence"),
    [
        (torch.ones(3, WIDTH + 1), {}, rf"{WIDTH + 1} wide, the model was trained with {WIDTH}"),
        (torch.ones(3, WIDTH), {}, r"3 rows, vocabulary 'painted' has 4 classes"),
        (torch.ones(2, WIDTH), {"names": '["cat", "cow"]'}, r"1 of 2 .* things or stuff: 'cow'"),
    ],
)
def test_a_file_that_does_not_fit_the_trained_model_is_refused(
    tmp_path: Path, file: Path, matrix: Tensor, metadata: dict[str, str], sentence: str
) -> None:
    config = text_config(file)
    write_checkpoint(RunDir(tmp_path / "run"), config, initial_model(config, VOCABULARY_4, None)[0], 3)
    _save(matrix, tmp_path / "x.safetensors", **metadata)
    said = [f"model.class_embeddings={tmp_path / 'x.safetensors'}"]
    with pytest.raises(UserError, match=sentence):
        load_model(str(tmp_path / "run"), said, CPU)


def test_names_alone_choose_among_the_classes_of_the_checkpoint(tmp_path: Path, file: Path) -> None:
    config = text_config(file)
    write_checkpoint(RunDir(tmp_path / "run"), config, initial_model(config, VOCABULARY_4, None)[0], 3)
    _save(letters(["sky", "dog"]), tmp_path / "x.safetensors", names='["sky", "dog"]')
    said = [f"model.class_embeddings={tmp_path / 'x.safetensors'}", "model.num_classes=2"]
    loaded = load_model(str(tmp_path / "run"), said[:1], CPU)
    assert loaded.vocabulary.names == ["sky", "dog"] and loaded.vocabulary.things == [False, True]


def test_a_linear_head_has_no_classes_to_exchange(tmp_path: Path, file: Path) -> None:
    config = text_config(file)
    config.model.class_embeddings = None
    write_checkpoint(RunDir(tmp_path / "run"), config, build_model(config.model, 4, seed=0), 3)
    with pytest.raises(UserError, match="linear class head: its classes cannot be exchanged"):
        load_model(str(tmp_path / "run"), [f"model.class_embeddings={file}"], CPU)


def test_a_new_run_takes_the_head_but_the_rows_of_its_own_file(tmp_path: Path, file: Path) -> None:
    config = text_config(file)
    old, _ = initial_model(config, VOCABULARY_4, None)
    torch.nn.init.constant_(old.get_parameter("heads.class_head.scale"), 0.7)
    write_checkpoint(RunDir(tmp_path / "run"), config, old, 3)
    other = tmp_path / "sounds.safetensors"
    write_class_embeddings(other, letters(SOUNDS.names), SOUNDS)
    fresh = text_config(other)
    fresh.seed, fresh.train.init_from = 5, str(tmp_path / "run")
    model, notes = initial_model(fresh, SOUNDS, None)
    rows = class_rows(str(other), SOUNDS)
    assert notes == [] and rows is not None and torch.equal(model.state_dict()[CLASS_ROWS], rows)
    given = old.state_dict()
    assert all(torch.equal(value, given[n]) for n, value in model.state_dict().items() if n != CLASS_ROWS)
    # A run that goes on has the rows that it was trained with, or says so.
    resumed, _ = initial_model(config, VOCABULARY_4, RunDir(tmp_path / "run").checkpoint(3))
    assert torch.equal(resumed.state_dict()[CLASS_ROWS], given[CLASS_ROWS])
    write_class_embeddings(file, letters(["kat", *VOCABULARY_4.names[1:]]), VOCABULARY_4)
    with pytest.raises(UserError, match="trained with other class embeddings"):
        initial_model(config, VOCABULARY_4, RunDir(tmp_path / "run").checkpoint(3))
    write_class_embeddings(other, torch.ones(3, WIDTH + 1), SOUNDS)
    with pytest.raises(
        UserError, match=rf"{WIDTH + 1} wide, the checkpoint of train.init_from was trained with {WIDTH}"
    ):
        initial_model(fresh, SOUNDS, None)
    fresh.train.reinit_head = True
    _, (note,) = initial_model(fresh, SOUNDS, None)
    assert "the class head starts anew" in note
    fresh.train.reinit_head = False
    fresh.model.class_embeddings = None
    with pytest.raises(UserError, match=r"a class head by text embeddings.*, the model a linear.*--reinit-head"):
        initial_model(fresh, VOCABULARY_4, None)


def test_float64_matrices_are_narrowed_when_written(tmp_path: Path) -> None:
    write_class_embeddings(tmp_path / "x.safetensors", letters(SOUNDS.names).double().numpy(), SOUNDS)
    found = read_class_embeddings(str(tmp_path / "x.safetensors"))
    assert found.vocabulary == SOUNDS and found.rows.dtype == torch.float32


def test_a_bundle_has_the_rows_and_transformers_has_no_such_head(tmp_path: Path, file: Path) -> None:
    config = text_config(file)
    write_checkpoint(RunDir(tmp_path / "run"), config, initial_model(config, VOCABULARY_4, None)[0], 3)
    file.unlink()
    export_run(str(tmp_path / "run"), str(tmp_path / "out"), format="safetensors", size=None, overrides=[])
    given, bundle = (load_model(str(tmp_path / place), [], CPU).model.state_dict() for place in ("run", "out"))
    assert CLASS_ROWS in bundle and all(torch.equal(value, bundle[name]) for name, value in given.items())
    with pytest.raises(UserError, match=r"cannot be this model: .*model\.class_embeddings"):
        export_run(str(tmp_path / "run"), str(tmp_path / "hf"), format="transformers", size=None, overrides=[])
