"""Ranks of test_looks.py: train runs that are evaluated on their way as `mf-scale train` does, then their checkpoints.

Arguments: [[overrides, fault], ...] and [checkpoint folder, ...] as JSON, a file for the numbers of the latter.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from mf_scale.commands.evaluate_in_training import evaluate_in_training
from mf_scale.config.load import load_config
from mf_scale.data.index import Index
from mf_scale.distributed import comm
from mf_scale.distributed.env import world_from_environment
from mf_scale.errors import StoppedOnRequest
from mf_scale.evaluation.loading import load_checkpoint
from mf_scale.evaluation.runner import evaluate
from mf_scale.faults import VARIABLE
from mf_scale.training.preemption import install_handlers
from mf_scale.training.trainer import train_run
from mf_scale.training.watchdog import watched


def main() -> None:
    world = world_from_environment()
    with comm.process_group(world, timeout=60) as device:
        for overrides, fault in json.loads(sys.argv[1]):
            os.environ[VARIABLE] = fault
            config = load_config(None, overrides)
            with contextlib.suppress(StoppedOnRequest), watched(config, world) as watchdog:
                train_run(config, world, device, install_handlers(), watchdog, evaluate_in_training)
        numbers = {}
        for folder in json.loads(sys.argv[2]):
            loaded = load_checkpoint(None, Path(folder), [], device)
            index = Index.open(loaded.config.data.val or "")
            samples = loaded.config.eval.metrics_samples
            found = evaluate(loaded.model, index, loaded.config, world, split="val", samples=samples)
            assert found is not None
            numbers[folder] = found.results
        if world.first:
            Path(sys.argv[3]).write_text(json.dumps(numbers))


main()
# As the program itself ends: once in dozens of exits a native thread of the libraries aborts after all is done.
os._exit(0)
