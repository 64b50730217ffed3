"""`mf-scale wandb-sync`: one clean W&B run from a run's metrics.jsonl."""

from __future__ import annotations

import argparse
from typing import Any

from mf_scale.commands.arguments import add_command


def add(commands: Any) -> None:
    """Its arguments."""
    command = add_command(commands, "wandb-sync", "write one clean W&B run from metrics.jsonl", _run)
    command.add_argument("run", metavar="RUN", help="run directory")
    mode = command.add_mutually_exclusive_group()
    mode.add_argument("--online", action="store_true", help="to the service (default with WANDB_API_KEY)")
    mode.add_argument("--offline", action="store_true", help="to files in RUN/wandb (default without)")
    command.add_argument("--id", help="id of the W&B run, which is written anew (default: that of RUN, with -clean)")


def _run(options: argparse.Namespace, _: list[str]) -> int:
    import os

    from mf_scale.rundir import RunDir, existing_run
    from mf_scale.tracking.wandb_sync import sync

    online = options.online or (not options.offline and bool(os.environ.get("WANDB_API_KEY")))
    done = sync(RunDir(existing_run(options.run)), online=online, id=options.id)
    print(f"W&B run {done.id}: {done.rows:,} steps, up to step {done.last_step:,}")
    if done.folder is not None:
        print(f"upload it with: wandb sync {done.folder}")
    return 0
