"""The evaluation that `mf-scale train` hands to the training, which does not know what an evaluation is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from mf_scale.config.schema import Config
from mf_scale.data.index import Index
from mf_scale.distributed import comm
from mf_scale.distributed.env import World
from mf_scale.evaluation.results import make_room, write_evaluation
from mf_scale.evaluation.runner import PICTURES, evaluate
from mf_scale.rundir import RunDir
from mf_scale.training.fence import Fence

SPLIT = "val"


def evaluate_in_training(
    model: nn.Module,
    index: Index,
    config: Config,
    world: World,
    *,
    run: RunDir,
    fence: Fence,
    step: int,
    stop: Callable[[], bool],
) -> dict[str, Any] | None:
    """`training.evaluating.Evaluate`: what `mf-scale evaluate` does, without the event, which is the training's."""
    samples = config.eval.metrics_samples
    told: dict[str, Any] = {"split": SPLIT, "pictures": PICTURES, "progress": False, "samples": samples, "stop": stop}
    evaluation = evaluate(model, index, config, world, **told)
    if evaluation is None:
        return None

    def room() -> None:
        fence.check()
        make_room(run, SPLIT)

    comm.on_first_rank(room)
    return write_evaluation(run, evaluation, step=step, write=fence.write)
