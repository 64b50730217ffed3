"""One rank of test_evaluate.py: evaluate the painted source and save into a run directory."""

from __future__ import annotations

import sys
from pathlib import Path

from mf_scale.data.index import Index
from mf_scale.distributed import comm
from mf_scale.distributed.env import world_from_environment
from mf_scale.evaluation.results import save_evaluation
from mf_scale.evaluation.runner import evaluate
from mf_scale.rundir import RunDir
from tests.unit.painted import ColorModel, painted_config


def main(source: str, run: str) -> None:
    world = world_from_environment()
    with comm.process_group(world, timeout=60):
        index = Index.open(source)
        evaluation = evaluate(ColorModel(), index, painted_config(), world, split="val", pictures=3, progress=False)
        save_evaluation(RunDir(Path(run)), evaluation, step=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
