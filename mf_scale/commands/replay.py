"""`mf-scale replay`: one step of a run again, to see where it stops being finite."""

from __future__ import annotations

import argparse
from typing import Any

from mf_scale.commands.arguments import OVERRIDES, add_command, count
from mf_scale.errors import EXIT_GUARD

_TEXT = "run one step of a run again under anomaly detection (exit code 3: it is not finite); changes nothing"


def add(commands: Any) -> None:
    """Its arguments."""
    command = add_command(commands, "replay", _TEXT, _run)
    command.add_argument("run", metavar="RUN", help="run directory")
    command.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    command.add_argument(
        "--step", type=count, required=True, metavar="S", help="the step, as metrics.jsonl counts them (from 1)"
    )
    command.add_argument(
        "--catch-up", action="store_true", help="first train the steps from the checkpoint to S - 1, in memory"
    )


def _run(options: argparse.Namespace, _: list[str]) -> int:
    import torch
    from tqdm import tqdm

    from mf_scale.training.replay.look import replay
    from mf_scale.training.replay.plan import plan_replay
    from mf_scale.training.replay.table import headline, tables

    plan = plan_replay(options.run, options.step, options.overrides)
    print(headline(plan, catching_up=options.catch_up), flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    behind = plan.behind if options.catch_up else 0
    with tqdm(total=behind, desc="catch up", unit="step", disable=not behind, mininterval=5) as bar:
        step = replay(plan, device, catching_up=options.catch_up, done=bar.update)
    print(tables(plan, step, catching_up=options.catch_up))
    return 0 if step.finite else EXIT_GUARD
