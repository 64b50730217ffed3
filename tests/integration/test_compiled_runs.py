"""Runs of a compiled model, and runs with a new class head: real processes, real DeepSpeed at ZeRO stage 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mf_scale.export import export_run
from tests.integration.program import Run
from tests.unit.painted import painted_source

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

# A small backbone: compiling is what takes the time here.
SHORT = ["train.steps=4", "checkpoint.every_steps=2", "eval.every_steps=2", "eval.loss_samples=5"]
SHORT += ["train.micro_batch=2", "model.backbone.name=resnet10t", "model.decoder.layers=1"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> tuple[Run, dict[str, Any]]:
    """Four steps of two ranks, compiled, dropout on; and the environment it ran in."""
    folder = tmp_path_factory.mktemp("compiled")
    environment: dict[str, Any] = {"TORCH_LOGS": "recompiles,graph_breaks"}
    run = Run(folder / "run", packed)
    done = run.train(*SHORT, "model.compile=true", timeout=800, **environment)
    assert done.returncode == 0, done.stderr
    said = done.stderr
    assert said.count("Recompiling function") == said.count("grad_mode") == 2, "once a rank: validation's graph"
    assert "Graph break" not in said
    assert list(run.series("validation", "loss")) == [2, 4]
    return run, environment


def _weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    return load_file(run.folder / f"checkpoints/step-{step:08d}/weights.safetensors")


def _copy(run: Run, folder: Path, packed: Path) -> Run:
    """The run as it was at step 2."""
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "checkpoints/step-00000004")
    return Run(folder, packed)


def test_a_compiled_run_repeats_itself_when_resumed(compiled, tmp_path, packed):
    """Dropout included: it is drawn from the seed of the micro-batch by the compiled code too."""
    run, environment = compiled
    again = _copy(run, tmp_path / "again", packed)
    done = again.train(*SHORT, "model.compile=true", timeout=800, **environment)
    assert done.returncode == 0, done.stderr
    before, after = _weights(run, 4), _weights(again, 4)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not all(torch.equal(value, _weights(run, 2)[name]) for name, value in before.items())


def test_checkpoints_go_from_compiled_to_eager_and_the_losses_agree(compiled, tmp_path, packed):
    """Without dropout, whose numbers the compiler draws otherwise."""
    run, environment = compiled
    losses = []
    for name, wish in (("eager", "model.compile=false"), ("compiled", "model.compile=true")):
        other = _copy(run, tmp_path / name, packed)
        (other.folder / "metrics.jsonl").unlink()
        # One rank: two compile the same graphs side by side.
        done = other.train(*SHORT, wish, "model.decoder.dropout=0", processes=1, timeout=800, **environment)
        assert done.returncode == 0, done.stderr
        losses.append([other.series(event, "loss") for event in ("step", "validation")])
    for eager, with_compiler in zip(*losses, strict=True):
        assert list(eager) == list(with_compiler) and 4 in eager
        assert all(abs(with_compiler[step] - loss) < 1e-4 * loss for step, loss in eager.items())
    assert set(_weights(run, 4)) == set(_weights(other, 4))


def test_without_a_compiler_nothing_is_started(tmp_path, packed):
    run = Run(tmp_path / "run", packed)
    environment: dict[str, Any] = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run.train(*SHORT, "model.compile=true", processes=1, **environment)
    assert done.returncode == 2
    assert "No working C++ compiler found" in done.stderr and "model.compile=false" in done.stderr
    assert "Traceback" not in done.stderr and not (run.folder / "checkpoints").exists()


def test_a_run_of_another_vocabulary_lends_all_but_its_class_head(tmp_path, packed):
    old = Run(tmp_path / "old", packed)
    one_step = ["train.steps=1", "eval.every_steps=0"]
    assert old.train(*one_step, processes=1).returncode == 0
    source = painted_source(tmp_path / "painted").source
    new = [*one_step, f"data.train={source}", "data.val=null", f"train.init_from={old.folder}"]
    lent = Run(tmp_path / "lent", packed)
    done = lent.train(*new, processes=1)
    assert done.returncode == 0, done.stderr
    assert "2 of 4 classes take their rows" in done.stdout + done.stderr
    whole = json.loads((lent.folder / "classes-from-checkpoint.json").read_text())
    assert list(whole["kept"]) == ["cat", "dog"] and whole["anew"] == ["sky", "grass"] and len(whole["not_used"]) == 131
    # The weights and no more: a bundle has no state of an optimizer, and starts the same run.
    export_run(str(old.folder), str(tmp_path / "bundle"), format="safetensors", size=None, overrides=[])
    twin = Run(tmp_path / "twin", packed)
    done = twin.train(*new, f"train.init_from={tmp_path / 'bundle'}", processes=1)
    assert done.returncode == 0, done.stderr
    ours, twins = _weights(lent, 1), _weights(twin, 1)
    assert all(torch.equal(value, twins[name]) for name, value in ours.items())
    run = Run(tmp_path / "new", packed)
    done = run.train(*new, "--reinit-head", processes=2)
    assert done.returncode == 0, done.stderr
    assert "the class head starts anew" in done.stdout + done.stderr
    assert _weights(run, 1)["heads.class_head.weight"].shape[0] == 5
    resumed = run.train(*new, "train.steps=2", "--reinit-head", processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "the class head starts anew" not in resumed.stdout + resumed.stderr and run.state(2)["updates"] == 2
