"""One rank of test_evaluate.py: evaluate the painted source and save into a run directory; then in part, then stop."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch import Tensor

from mf_scale.data.index import Index
from mf_scale.distributed import comm
from mf_scale.distributed.env import World, world_from_environment
from mf_scale.errors import UserError
from mf_scale.evaluation.results import save_evaluation
from mf_scale.evaluation.runner import evaluate
from mf_scale.models.outputs import MaskPrediction
from mf_scale.rundir import RunDir
from tests.unit.painted import ColorModel, painted_config


class FailingModel(ColorModel):
    """Refuses its second image on the last rank."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.left = 1 if world.rank == world.size - 1 else 10**6

    def forward(self, images: Tensor) -> MaskPrediction:
        if not self.left:
            raise UserError("an image that nobody can read")
        self.left -= 1
        return super().forward(images)


class Asked:
    """Asked to stop at its second turn, on rank 0 alone."""

    def __init__(self, world: World) -> None:
        self.turns_left = 1 if world.first else 10**6

    def __call__(self) -> bool:
        self.turns_left -= 1
        return self.turns_left < 0


def main(source: str, run: str) -> None:
    world = world_from_environment()
    config = painted_config(eval__boundary=True)
    with comm.process_group(world, timeout=60):
        index = Index.open(source)
        whole = evaluate(ColorModel(), index, config, world, split="val", pictures=3, progress=False)
        assert whole is not None
        save_evaluation(RunDir(Path(run)), whole, step=1)
        part = evaluate(ColorModel(), index, config, world, split="val", samples=4, stop=lambda: False, progress=False)
        assert part is not None
        model = ColorModel().train()
        assert evaluate(model, index, config, world, split="val", stop=Asked(world), progress=False) is None
        assert model.training, "the mode is restored"
        try:
            evaluate(FailingModel(world), index, config, world, split="val", stop=lambda: False, progress=False)
        except UserError as error:
            failure = error.what
        comm.barrier()  # nobody is left in another collective
        if world.first:
            part.results.pop("images_per_second")
            (Path(run) / "part.json").write_text(json.dumps({"results": part.results, "failure": failure}))


if __name__ == "__main__":
    main(*sys.argv[1:])
