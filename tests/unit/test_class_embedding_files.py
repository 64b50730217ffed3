"""Files of class embeddings that cannot be used: said in one paragraph, before anything starts."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mf_scale.config.load import load_config
from mf_scale.data.index import Index
from mf_scale.distributed.env import World
from mf_scale.doctor.examination import _model
from mf_scale.doctor.finding import PROBLEM
from mf_scale.doctor.node import Node, Sources
from mf_scale.doctor.wanted import Wanted
from mf_scale.errors import UserError
from mf_scale.plan.planning import plan_config
from mf_scale.rundir import RunDir
from mf_scale.training.preflight import examine
from tests.unit.painted import painted_source
from tests.unit.test_class_embeddings import text_config


def _save(matrix: Tensor, path: Path, **metadata: str) -> None:
    save_file({"x": matrix}, path, metadata or None)


def _npy(path: Path, header: str) -> None:
    """A file with this header and 64 bytes of numbers."""
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64))


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(painted_source(tmp_path_factory.mktemp("source")).source)


@pytest.fixture
def lock() -> list[int]:
    return []


class _Trap:
    """Unpickled, it leaves a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._folder),)


BROKEN = {
    "wrong size": (lambda p: np.save(p / "x.npy", np.ones((3, 8), np.float32)), r"3 rows, vocabulary 'painted' has 4"),
    "not a matrix": (lambda p: np.save(p / "x.npy", np.ones(4, np.float32)), r"are \[4\] of float32"),
    "double": (lambda p: np.save(p / "x.npy", np.ones((4, 8))), r"\[4, 8\] of float64.*float16 or float32"),
    "pickled": (
        lambda p: np.save(p / "x.npy", np.array([_Trap(p / "sprung")], object), allow_pickle=True),
        r"cannot be read: Array can't be memory-mapped: Python objects",
    ),
    "cut short": (lambda p: (p / "x.npy").write_bytes(b"\x93NUMPY\x01"), r"cannot be read"),
    "a broken archive": (lambda p: (p / "x.npy").write_bytes(b"PK\x03\x04 and no more"), r"cannot be read"),
    "a broken header": (lambda p: _npy(p / "x.npy", "{'descr': '<f4', 'shape': (4, 8), 'x"), r"cannot be read"),
    "petabytes": (
        lambda p: _npy(p / "x.npy", f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**12}, 1000)}}"),
        r"cannot be read",
    ),
    "not finite": (lambda p: _save(_with(1, torch.nan), p / "x.safetensors"), r"1 of 4 .* not finite: row 1"),
    "infinite": (lambda p: _save(_with(2, -torch.inf), p / "x.safetensors"), r"1 of 4 .* not finite: row 2"),
    "zero row": (lambda p: _save(_with(3, 0.0), p / "x.safetensors"), r"1 of 4 .* are zero.*row 3"),
    "damaged": (lambda p: (p / "x.safetensors").write_bytes(b"nothing"), r"cannot be read"),
    "two tensors": (lambda p: save_file({"a": _with(0, 1), "b": _with(0, 1)}, p / "x.safetensors"), r"holds 2 tensors"),
    "unknown names": (
        lambda p: _save(_with(0, 1), p / "x.safetensors", names='["cat", "Dog", "sky", "lawn"]'),
        r"2 of 4 classes .* have no class embedding: 'dog', 'grass'.*matched exactly.*'cat', 'Dog', 'sky', 'lawn'",
    ),
    "names twice": (
        lambda p: _save(_with(0, 1), p / "x.safetensors", names='["cat", "dog", "sky", "cat"]'),
        r"name several times: 'cat'",
    ),
    "names too few": (lambda p: _save(_with(0, 1), p / "x.safetensors", names='["cat"]'), r"4 rows .* have 1 names"),
    "names no list": (lambda p: _save(_with(0, 1), p / "x.safetensors", names='"cat"'), r"not a JSON list"),
    "names no JSON": (lambda p: _save(_with(0, 1), p / "x.safetensors", names="cat"), r'"names" .* is not JSON'),
    "another ending": (lambda p: (p / "x.pt").write_bytes(b""), r"not read from \.pt"),
    "missing": (lambda p: None, r"does not exist"),
}


def _with(row: int, value: float) -> Tensor:
    matrix = torch.ones(4, 8)
    matrix[row] = value
    return matrix


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_with_a_file_is_said_before_training(
    tmp_path: Path, what: str, painted: str, lock: list[int]
) -> None:
    make, sentence = BROKEN[what]
    make(tmp_path)
    found = list(tmp_path.glob("x.*"))
    config = text_config(found[0] if found else tmp_path / "x.npy")
    config.data.train = painted
    with pytest.raises(UserError, match=sentence):
        examine(config, RunDir(tmp_path / "run"), World(), lock)
    assert not (tmp_path / "run").exists() and not (tmp_path / "sprung").exists()


def test_plan_and_doctor_say_it_too(tmp_path: Path, painted: str) -> None:
    np.save(tmp_path / "x.npy", np.ones((3, 8), np.float32))
    said = [f"data.train={painted}", f"model.class_embeddings={tmp_path / 'x.npy'}", "train.global_batch=2"]
    sentence = r"3 rows, vocabulary 'painted' has 4"
    with pytest.raises(UserError, match=sentence):
        plan_config("configs/base.yaml", said, 1)
    config = load_config("configs/base.yaml", said)
    wanted = Wanted("configs/base.yaml", tuple(said), config, None, 1, 60.0, 0.0, False, False, False)
    node = Node(sources=Sources(opened=[Index.open(Path(painted))]))
    model, (found,) = _model(wanted, node)
    assert model is None and found.level == PROBLEM and re.search(sentence, found.text)
