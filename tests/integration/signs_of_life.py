"""A small training of one rank for test_hang.py that prints its signs of life. Arguments: overrides."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from mf_scale.config.load import load_config
from mf_scale.distributed import comm
from mf_scale.distributed.env import World
from mf_scale.training.preemption import install_handlers
from mf_scale.training.trainer import train_run
from mf_scale.training.watchdog import Watchdog

SIGNS: list[tuple[str, int]] = []


class Listener(Watchdog):
    """Keeps the signs."""

    def alive(self, phase: str, step: int, turn: int = 0) -> None:
        SIGNS.append((phase, step))


config = load_config(None, sys.argv[1:])
listener = Listener(World(), Path("unused"), timeout=0, last_resort=0)
with comm.process_group(World(), timeout=60) as device:
    train_run(config, World(), device, install_handlers(), listener)
print(json.dumps(SIGNS))
sys.stdout.flush()
os._exit(0)
