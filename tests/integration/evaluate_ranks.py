"""One rank of test_evaluate.py: evaluate the painted source and save into a run directory; then in part, then stop,
then with a rank that fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mf_scale.data.index import Index
from mf_scale.distributed import comm
from mf_scale.distributed.env import World, world_from_environment
from mf_scale.errors import UserError
from mf_scale.evaluation import instances
from mf_scale.evaluation.results import Evaluation, save_evaluation, write_evaluation
from mf_scale.evaluation.runner import evaluate
from mf_scale.models.outputs import MaskPrediction
from mf_scale.rundir import RunDir
from tests.unit.painted import ColorModel, painted_config

FAILING = 2
"""The sample at which a model fails: one after which every rank still has another."""
REFUSED = 4
"""The sample whose picture cannot be written, as something else stands in its place."""


class FailingModel(ColorModel):
    """Raises an error at one sample, on the rank that has it."""

    def __init__(self, world: World, error: Exception) -> None:
        super().__init__()
        self.seen, self.error = 0, error
        self.last = FAILING // world.size if world.rank == FAILING % world.size else 10**6

    def forward(self, images: Tensor) -> MaskPrediction:
        self.seen += 1
        if self.seen > self.last:
            raise self.error
        return super().forward(images)


class Asked:
    """Asked to stop at its second turn, on rank 0 alone."""

    def __init__(self, world: World) -> None:
        self.turns_left = 1 if world.first else 10**6

    def __call__(self) -> bool:
        self.turns_left -= 1
        return self.turns_left < 0


def failure_of(action: Callable[[], object]) -> str:
    """What a UserError says that every rank meets; nobody is left in another collective."""
    try:
        action()
    except UserError as error:
        said = f"{type(error).__name__}: {error.what}"
    heard = comm.broadcast_object(said)
    assert heard == said, f"{said!r} here, {heard!r} on rank 0"
    return said


def failing_samples(world: World, evaluated: Callable[..., Any]) -> list[str]:
    """With and without a question to stop: the other ranks leave at the next image."""
    told = []
    unread = "an image that nobody can read"
    cases: list[tuple[Exception, dict[str, Any]]] = [
        (UserError(unread), {"stop": lambda: False}),
        (UserError(unread), {}),
        (RuntimeError("CUDA out of memory"), {}),
    ]
    for error, options in cases:
        model = FailingModel(world, error)
        told.append(failure_of(partial(evaluated, model, **options)))
        assert model.seen == FAILING // world.size + 1, "no rank went on to its next image"
    return told


def failing_class(world: World, evaluated: Callable[..., Any]) -> str:
    """Class 1 is too large for the rank that has it: with one rank the second to be evaluated, else its first."""
    whole, left = instances.class_ap, [1 // world.size if world.rank == 1 % world.size else 10**6]

    def large(*given: Any, **options: Any) -> np.ndarray:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("a large class")
        return whole(*given, **options)

    instances.class_ap = large
    said = failure_of(lambda: evaluated(ColorModel()))
    instances.class_ap = whole
    return said


def failing_picture(world: World, run: RunDir, evaluation: Evaluation) -> str:
    """A picture that one rank cannot write; afterwards what was there before is as it was."""
    place = run.report / f"val-2-{REFUSED:02d}-image.png"
    place.mkdir(exist_ok=True)
    comm.barrier()
    said = failure_of(lambda: write_evaluation(run, evaluation, step=2))
    results = json.loads((run.report / "evaluation-val.json").read_text())
    assert results["step"] == 1
    assert all((run.report / view["file"]).is_file() for one in results["pictures"] for view in one["views"])
    comm.barrier()
    if world.first:
        place.rmdir()
    return said


def main(source: str, path: str) -> None:
    world, run = world_from_environment(), RunDir(Path(path))
    config = painted_config(eval__boundary=True)
    with comm.process_group(world, timeout=60):
        index = Index.open(source)

        def evaluated(model: ColorModel, settings: Any = config, **options: Any) -> Evaluation | None:
            return evaluate(model, index, settings, world, split="val", progress=False, **options)

        whole = evaluated(ColorModel(), pictures=3)
        assert whole is not None
        save_evaluation(run, whole, step=1)
        part = evaluated(ColorModel(), samples=4, stop=lambda: False)
        assert part is not None
        model = ColorModel().train()
        assert evaluated(model, stop=Asked(world)) is None
        assert model.training, "the mode is restored"
        failures = failing_samples(world, evaluated)
        failures.append(failing_class(world, lambda model: evaluated(model, painted_config())))
        failures.append(failing_picture(world, run, whole))
        write_evaluation(run, whole, step=3)
        if world.first:
            part.results.pop("images_per_second")
            (run.path / "part.json").write_text(json.dumps({"results": part.results, "failures": failures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
