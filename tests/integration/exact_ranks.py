"""Ranks of test_exact.py: train runs in one go, and others that are stopped and resumed in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import sys

from mf_scale.config.load import load_config
from mf_scale.distributed import comm
from mf_scale.distributed.env import world_from_environment
from mf_scale.errors import GuardError, StoppedOnRequest
from mf_scale.faults import VARIABLE
from mf_scale.training.preemption import install_handlers
from mf_scale.training.trainer import train_run
from mf_scale.training.watchdog import watched


def main() -> None:
    world = world_from_environment()
    with comm.process_group(world, timeout=300) as device:
        for overrides, fault in json.loads(sys.argv[1]):
            os.environ[VARIABLE] = fault
            config = load_config(None, overrides)
            with contextlib.suppress(StoppedOnRequest, GuardError), watched(config, world) as watchdog:
                train_run(config, world, device, install_handlers(), watchdog)


main()
# As the program itself ends: once in dozens of exits a native thread of the libraries aborts after all is done.
os._exit(0)
