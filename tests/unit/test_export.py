"""Exports: what is written, that it answers like the model, and that nothing is left behind where it does not."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mf_scale import export
from mf_scale.cli import main
from mf_scale.errors import GuardError, UserError
from mf_scale.evaluation.loading import load_model
from mf_scale.export import export_run
from mf_scale.models.build import build_model
from mf_scale.rundir import RunDir, resolve_checkpoint
from mf_scale.vocabulary import Vocabulary
from tests.unit.painted import VOCABULARY_4, painted_config, painted_source, write_checkpoint


def _run(folder: Path, task: str = "panoptic", **model: Any) -> str:
    """A run directory with a small real model of random weights."""
    config = painted_config(eval__short_side=64, data__task=task)
    config.model = replace(config.model, **model)
    config.model.backbone = replace(config.model.backbone, name="resnet10t", weights="none")
    config.model.pixel_decoder = replace(config.model.pixel_decoder, width=16, mask_channels=16)
    config.model.decoder = replace(config.model.decoder, layers=1, queries=5, width=16, heads=2, feedforward=16)
    write_checkpoint(RunDir(folder), config, build_model(config.model, 4, seed=0).eval(), 3)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def torch_program(run: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder, and what was told."""
    folder = tmp_path_factory.mktemp("torch") / "out"
    return folder, _export(run, folder, "torch", (72, 100))


@pytest.fixture(scope="module")
def onnx_program(run: str) -> tuple[Path, str]:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    return Path(run) / "export-onnx", _export(run, None, "onnx")


def _export(run: str, out: Path | None, format: str, size: tuple[int, int] | None = None, *overrides: str) -> str:
    return export_run(run, str(out) if out else None, format=format, size=size, overrides=overrides)


def _eager(run: str, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        prediction = load_model(run, [], torch.device("cpu")).model(images)
    masks = torch.einsum("bqc,bchw->bqhw", prediction.mask_embeddings, prediction.pixel_embeddings)
    return prediction.class_logits, masks


def test_a_bundle_is_the_same_model(run: str) -> None:
    assert _export(run, None, "safetensors") == f"export: {run}/export"
    bundle = Path(run) / "export"
    assert sorted(f.name for f in bundle.iterdir()) == [
        "config.yaml",
        "manifest.json",
        "state.json",
        "vocabulary.json",
        "weights.safetensors",
    ]
    one, other = (load_model(str(path), [], torch.device("cpu")) for path in (bundle, run))
    assert one.step == 3 and one.run_dir is None and one.vocabulary == other.vocabulary and one.config == other.config
    state = other.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.model.state_dict().items())
    assert resolve_checkpoint(str(bundle)) == (None, bundle), "train.init_from takes it"
    with pytest.raises(UserError, match="not empty"):
        _export(run, None, "safetensors")
    with pytest.raises(UserError, match="--out DIR"):
        _export(str(bundle), None, "safetensors")


WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None
from mf_scale.cli import main
image, out, bundle, source = sys.argv[1:]
sys.exit(main(["predict", image, "--run", bundle, "--out", out])
         or main(["evaluate", bundle, f"data.val={source}", "--processes", "1"]))
"""


def test_a_bundle_serves_where_deepspeed_is_not_installed(run: str, tmp_path: Path) -> None:
    _export(run, tmp_path / "bundle", "safetensors")
    source = painted_source(tmp_path / "source").source
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    arguments = [*(str(tmp_path / name) for name in ("a.png", "out", "bundle")), str(source)]
    command = [sys.executable, "-c", WITHOUT_DEEPSPEED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "a.json").exists() and "mIoU" in done.stdout


def test_a_torch_program_answers_like_the_model_at_its_size(run: str, torch_program: tuple[Path, str]) -> None:
    folder, told = torch_program
    assert "images [batch, 3, 72, 100]" in told and "largest difference from the eager model" in told
    assert sorted(f.name for f in folder.iterdir()) == ["export.json", "model.pt2", "vocabulary.json"]
    assert Vocabulary.load(folder / "vocabulary.json") == VOCABULARY_4
    program = torch.export.load(folder / "model.pt2").module()
    for batch in (1, 3):
        images = torch.rand(batch, 3, 72, 100) * 255
        for got, expected in zip(program(images), _eager(run, images), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    described = json.loads((folder / "export.json").read_text())
    assert described["outputs"] == {"class_logits": ["batch", 5, 5], "mask_logits": ["batch", 5, 18, 25]}
    assert described["step"] == 3 and 0 <= described["largest_difference"] < 1e-4


def test_an_onnx_file_answers_like_the_model_in_onnxruntime(run: str, onnx_program: tuple[Path, str]) -> None:
    import onnxruntime

    folder, told = onnx_program
    assert "images [batch, 3, 64, 64]" in told, "eval.short_side squared"
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    images = torch.rand(2, 3, 64, 64) * 255
    got = session.run(["class_logits", "mask_logits"], {"images": images.numpy()})
    for one, other in zip(got, _eager(run, images), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["per_pixel", "per_pixel_plus"])
def test_per_pixel_models_are_exported_as_class_logits(tmp_path: Path, kind: str) -> None:
    run = _run(tmp_path / "run", "semantic", kind=kind)
    _export(run, None, "torch")
    described = json.loads((tmp_path / "run" / "export-torch" / "export.json").read_text())
    assert described["outputs"] == {"logits": ["batch", 4, 16, 16]}
    images = torch.rand(1, 3, 64, 64) * 255
    (got,) = torch.export.load(tmp_path / "run" / "export-torch" / "model.pt2").module()(images)
    with torch.no_grad():
        expected = load_model(run, [], torch.device("cpu")).model(images).logits()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_what_transformers_cannot_express_is_said(run: str, tmp_path: Path) -> None:
    """What it can is held to tests/unit/test_exchange.py; this model's backbone is none of its."""
    with pytest.raises(UserError, match="resnet10t"):
        _export(run, tmp_path / "out", "transformers")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["torch_program", "onnx_program"])
def test_programs_carry_no_path_of_the_machine_that_wrote_them(
    run: str, program: str, request: pytest.FixtureRequest
) -> None:
    folder, _ = request.getfixturevalue(program)
    here = [str(Path(torch.__file__).parents[1]), str(Path(export.__file__).parent), str(Path.home()), run]
    for file in folder.iterdir():
        data = file.read_bytes()
        assert not [path for path in here if path.encode() in data], file


@pytest.mark.parametrize(("off", "told"), [(0.01, "differs by up to 0.01"), (torch.nan, "differs by up to nan")])
def test_a_program_that_answers_otherwise_is_not_left_behind(
    run: str,
    tmp_path: Path,
    off: float,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def wrong(_: Any, place: Path, names: Any) -> Any:
        (place / "model.pt2").write_text("whatever")
        return place / "model.pt2", lambda images: [_eager(run, images)[0], _eager(run, images)[1] + off]

    monkeypatch.setattr(export, "_trace", lambda *_: export._Traced(None, True))  # type: ignore[arg-type]
    monkeypatch.setitem(export._WRITERS, "torch", wrong)
    assert main(["export", run, "--out", str(tmp_path / "out"), "--format", "torch"]) == GuardError.exit_code == 3
    assert f"mask_logits {told}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    tiny = torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    monkeypatch.setattr(export, "_trace", lambda *_: export._Traced(tiny, True))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"No space left on device.*Free some space"):
        _export(run, tmp_path / "out", "torch")
    assert not list(tmp_path.iterdir())


def test_wishes_that_cannot_be_met(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="--size does nothing with --format safetensors"):
        _export(run, tmp_path / "out", "safetensors", (64, 64))
    with pytest.raises(UserError, match="smaller than one cell"):
        _export(run, tmp_path / "out", "torch", (16, 64))
    with pytest.raises(UserError, match=r"model\.num_classes = 7.*4 classes"):
        _export(run, tmp_path / "out", "torch", None, "model.num_classes=7")
    with pytest.raises(SystemExit):
        main(["export", run, "--format", "tflite"])
    assert "invalid choice: 'tflite'" in capsys.readouterr().err
    find = export.importlib.util.find_spec
    monkeypatch.setattr(
        export.importlib.util, "find_spec", lambda name, *rest: None if "onnx" in name else find(name, *rest)
    )
    with pytest.raises(UserError, match=r"onnx, onnxscript, onnxruntime.*pip install \"mf_scale\[onnx\]\""):
        _export(run, tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())
