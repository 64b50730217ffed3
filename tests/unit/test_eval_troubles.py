"""What goes wrong with one sample or class is a fault that names it; stops are honoured between classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from mf_scale.data.index import Index
from mf_scale.data.loader import EvalSample
from mf_scale.distributed.env import World
from mf_scale.errors import FaultError, UserError
from mf_scale.evaluation import instances, results, runner
from mf_scale.evaluation.results import make_room, save_evaluation
from mf_scale.evaluation.runner import evaluate
from mf_scale.evaluation.turns import in_turns
from mf_scale.models.outputs import MaskPrediction
from mf_scale.rundir import RunDir
from tests.unit.painted import ColorModel, painted_config, painted_source


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return painted_source(tmp_path_factory.mktemp("painted"))


class Failing(ColorModel):
    """Raises an error at one of its calls."""

    def __init__(self, call: int, error: Exception) -> None:
        super().__init__()
        self.left, self.error = call, error

    def forward(self, images: Tensor) -> MaskPrediction:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().forward(images)


def _evaluate(index: Index, model: ColorModel | None = None, **options: object) -> object:
    told = {"split": "val", "progress": False, **options}
    return evaluate(model or ColorModel(), index, painted_config(eval__boundary=True), World(), **told)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more words"),
        cv2.error("no room"),
        ValueError("odd"),
        ZeroDivisionError("zero"),
        MemoryError(),
    ],
)
def test_an_error_on_a_sample_is_a_fault_that_names_it(index: Index, error: Exception) -> None:
    with pytest.raises(FaultError) as met:
        _evaluate(index, Failing(3, error))
    name = f"sample {index.sample(3).key} could not be evaluated: {type(error).__name__}"
    assert met.value.what.startswith(name) and "more words" not in met.value.what
    assert met.value.what.endswith(str(error).splitlines()[0].rstrip(".") if str(error) else "MemoryError")
    assert met.value.where == index.source and "eval.short_side" in met.value.remedy
    assert met.value.__cause__ is error


def test_a_users_mistake_stays_one(index: Index) -> None:
    with pytest.raises(UserError, match="nobody") as met:
        _evaluate(index, Failing(1, UserError("nobody can read it")))
    assert type(met.value) is UserError


def test_an_error_in_the_second_look_names_the_sample(index: Index) -> None:
    with pytest.raises(FaultError, match=r"sample \S+ could not be evaluated: RuntimeError: late"):
        _evaluate(index, Failing(5, RuntimeError("late")), pictures=2)


def test_an_error_in_reading_names_the_sample(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the reader itself cannot be made."""
    whole = runner.eval_samples

    def broken(*given: Any, **options: Any):
        yield next(whole(*given, **options))
        raise MemoryError

    def none(*_: object, **__: object) -> None:
        raise ValueError("no reader")

    for start, position in ((broken, 1), (none, 0)):
        monkeypatch.setattr(runner, "eval_samples", start)
        with pytest.raises(FaultError, match=f"sample {index.sample(position).key} could not be evaluated"):
            _evaluate(index)


def test_an_error_on_a_class_or_its_share_names_it(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "class_ap", _raiser(2, MemoryError("big")))
    with pytest.raises(FaultError, match="class number 1 could not be evaluated: MemoryError: big"):
        _evaluate(index)
    monkeypatch.setattr(instances, "_parsed", _raiser(0, ValueError("torn")))
    with pytest.raises(FaultError, match="a share of the classes could not be evaluated: ValueError: torn"):
        _evaluate(index)
    monkeypatch.setattr(instances.InstanceRecords, "share", _raiser(0, OSError("bad disk")))
    with pytest.raises(FaultError, match="what was found could not be evaluated: OSError: bad disk"):
        _evaluate(index)


def _raiser(calls: int, error: Exception) -> Callable[..., np.ndarray]:
    left = iter(range(calls))

    def act(*_: object, **__: object) -> np.ndarray:
        if next(left, None) is None:
            raise error
        return np.zeros(6)

    return act


def test_an_error_in_a_picture_names_its_sample(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = _evaluate(index, pictures=1)
    monkeypatch.setattr(results, "write_png", _raiser(0, cv2.error("odd picture")))
    with pytest.raises(FaultError, match=r"sample \S+ could not be evaluated: error: odd picture"):
        save_evaluation(RunDir(tmp_path), evaluation, step=1)  # type: ignore[arg-type]


def test_a_report_folder_that_takes_no_file_is_found_before_the_work(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.report.write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        make_room(run, "val")


def test_a_stop_is_honoured_after_every_class_and_kind_of_iou(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []

    def ap(*_: object, boundary: bool, **__: object) -> np.ndarray:
        made.append(boundary)
        return np.zeros(6)

    monkeypatch.setattr(instances, "class_ap", ap)
    for last in (1, 2, 3, 4):
        made.clear()
        assert _evaluate(index, stop=lambda last=last: len(made) >= last) is None
        assert made == [False, True, False, True][:last]


def test_turns_end_when_the_items_do_and_after_an_error() -> None:
    seen: list[tuple[int, str]] = []
    assert in_turns(iter("abc"), lambda turn, item: seen.append((turn, item)))
    assert seen == [(0, "a"), (1, "b"), (2, "c")]
    assert not in_turns(iter("abc"), lambda turn, item: seen.append((turn, item)), lambda: len(seen) > 3)
    assert seen[3:] == [(0, "a")]

    def refuse(turn: int, sample: EvalSample | str) -> None:
        seen.append((turn, str(sample)))
        raise UserError("no")

    with pytest.raises(UserError):
        in_turns(iter("abc"), refuse)
    assert len(seen) == 5
