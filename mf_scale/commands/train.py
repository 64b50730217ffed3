"""`mf-scale train`: train a run, or go on where it stopped."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from mf_scale.commands.arguments import OVERRIDES, add_command, add_processes, wanted_ranks
from mf_scale.errors import UserError

if TYPE_CHECKING:
    from mf_scale.config.schema import Config
    from mf_scale.training.evaluating import Evaluate


def add(commands: Any) -> None:
    """Its arguments."""
    command = add_command(commands, "train", "train a run, or go on where it stopped", _run)
    command.add_argument("config", metavar="CONFIG", help="configuration file, for example configs/demo.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    command.add_argument(
        "--reinit-head",
        action="store_true",
        help="take all but the class head from train.init_from, whose vocabulary may be another",
    )
    add_processes(command)


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    from mf_scale.training.preemption import configure, install_handlers

    flag = install_handlers()  # before the slow imports: a signal's default would kill
    from mf_scale.config.load import load_config
    from mf_scale.config.validate import plan_batch, validate
    from mf_scale.distributed.env import world_from_environment
    from mf_scale.distributed.launch import launch

    world = world_from_environment()
    try:
        anew = ["train.reinit_head=true"] if options.reinit_head else []
        config = load_config(options.config, [*options.overrides, *anew])
        validate(config)
        notes = configure(flag, config)
        ranks = world.size if world.size > 1 else wanted_ranks(options.processes)
        plan_batch(config, ranks)
    except UserError as error:
        error.said_by_first_rank = not world.first  # every rank of srun or torchrun makes the same mistake
        raise
    if world.size == 1 and ranks > 1:
        return launch(arguments, ranks, flag.signals, config.train.stop_signals)
    for note in notes if world.first else ():
        print(f"mf-scale: {note}", file=sys.stderr)
    from mf_scale.training.trainer import train

    train(config, world, flag, _evaluate(config))
    return 0


def _evaluate(config: Config) -> Evaluate | None:
    """What evaluates the run on its way; what it needs is imported now, so that nothing is missing then."""
    if not config.eval.metrics_every_steps or config.data.val is None:
        return None
    from mf_scale.commands.evaluate_in_training import evaluate_in_training

    return evaluate_in_training
