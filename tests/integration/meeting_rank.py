"""Rank of test_meeting.py: joins the others under SLURM's variables, compares programs, adds up the ranks.

Arguments: the folder to meet in, seconds a collective may take, a setting.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np

from mf_scale.distributed import comm
from mf_scale.distributed.env import world_from_environment
from mf_scale.distributed.same_program import refuse_mixture
from mf_scale.errors import UserError


def main() -> int:
    world, began = world_from_environment(), time.monotonic()
    try:
        with comm.process_group(world, timeout=float(sys.argv[2]), meeting=Path(sys.argv[1])):
            refuse_mixture(world, {"train": {"steps": 10, "name": sys.argv[3]}})
            print(f"sum {comm.sum_array(np.array([world.rank]))[0]} after {time.monotonic() - began:.2f} s", flush=True)
    except UserError as error:
        if not error.said_by_first_rank:
            print(f"mf-scale: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


code = main()
sys.stdout.flush()
os._exit(code)
