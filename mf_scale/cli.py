"""The command line: parse, call, print. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mf_scale import __version__
from mf_scale.errors import StoppedOnRequest, UserError

_INTERRUPTED = 130
_OVERRIDES = "any key of the configuration, for example train.steps=500"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mf-scale`; the exit code: 0 done, 2 a user's mistake, 3 a guard, 85 stopped on request."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(arguments)
    try:
        return int(options.call(options, arguments) or 0)
    except UserError as error:
        if options.debug:
            raise
        if not error.said_by_first_rank:
            print(f"mf-scale: {error}", file=sys.stderr)
        return error.exit_code
    except StoppedOnRequest as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        print("mf-scale: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read what a command prints has left; what training prints is not awaited by anybody.
        return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Options may stand anywhere between the overrides, which argparse does not allow by itself."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [item for item in rest if item.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mf-scale", description="Large-scale distributed pretraining of MaskFormer.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"mf-scale {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_train(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_report(commands)
    return parser


def _command(commands, name: str, text: str, call) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    command.set_defaults(call=call)
    return command


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes, 1 or more")
    return int(text)


def _add_train(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(commands, "train", "train a run, or go on where it stopped", _train)
    command.add_argument("config", metavar="CONFIG", help="configuration file, for example configs/demo.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    command.add_argument(
        "--processes", type=_count, metavar="N", help="ranks on this machine (default: one a GPU, or 1)"
    )


def _add_evaluate(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(commands, "evaluate", "mIoU and PQ of a run or checkpoint", _evaluate)
    command.add_argument("run", metavar="RUN", help="run directory or checkpoint folder")
    command.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    command.add_argument("--split", choices=("val", "train"), default="val", help="which source (default: val)")
    command.add_argument(
        "--processes", type=_count, metavar="N", help="ranks on this machine (default: one a GPU, or 1)"
    )


def _add_predict(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(commands, "predict", "segment images with a run or checkpoint", _predict)
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders")
    command.add_argument("--set", nargs="+", default=[], metavar="key=value", dest="settings", help=_OVERRIDES)
    command.add_argument("--run", required=True, metavar="RUN", help="run directory or checkpoint folder")
    command.add_argument("--task", choices=("semantic", "panoptic"), default="panoptic", help="default: panoptic")
    command.add_argument("--out", required=True, metavar="DIR", help="folder for overlays, maps and segment lists")


def _add_report(commands) -> None:  # type: ignore[no-untyped-def]
    command = _command(commands, "report", "write the page of a run: curves, tables, pictures", _report)
    command.add_argument("run", metavar="RUN", help="run directory")


def _train(options: argparse.Namespace, arguments: list[str]) -> int:
    from mf_scale.training.preemption import install_handlers

    flag = install_handlers()  # before the slow imports: a signal's default would kill
    from mf_scale.config.load import load_config
    from mf_scale.config.validate import plan_batch, validate
    from mf_scale.distributed.env import world_from_environment
    from mf_scale.distributed.launch import launch

    world = world_from_environment()
    try:
        config = load_config(options.config, options.overrides)
        validate(config)
        ranks = world.size if world.size > 1 else _wanted_ranks(options.processes)
        plan_batch(config, ranks)
    except UserError as error:
        error.said_by_first_rank = not world.first  # every rank of srun or torchrun makes the same mistake
        raise
    if world.size == 1 and ranks > 1:
        return launch(arguments, ranks, flag.signals)
    from mf_scale.training.trainer import train

    train(config, world, flag)
    return 0


def _wanted_ranks(processes: int | None) -> int:
    """Ranks to start on this machine: as many as asked for, else one a GPU, at least one."""
    from mf_scale.distributed.env import visible_gpus

    return max(1, visible_gpus()) if processes is None else processes


def _evaluate(options: argparse.Namespace, arguments: list[str]) -> int:
    from mf_scale.distributed.env import world_from_environment
    from mf_scale.distributed.launch import allow_stop_signals, launch
    from mf_scale.training.preemption import install_handlers

    world = world_from_environment()
    if world.size == 1 and (ranks := _wanted_ranks(options.processes)) > 1:
        return launch(arguments, ranks, install_handlers().signals)
    allow_stop_signals()
    from mf_scale.evaluation.runner import evaluate_run

    table = evaluate_run(options.run, options.overrides, world, split=options.split)
    if world.first:
        print(table)
    return 0


def _predict(options: argparse.Namespace, _: list[str]) -> int:
    from mf_scale.evaluation.predict import predict_images

    return predict_images(options.images, options.run, options.out, task=options.task, overrides=options.settings)


def _report(options: argparse.Namespace, _: list[str]) -> int:
    from mf_scale.evaluation.results import run_table
    from mf_scale.rundir import RunDir, existing_run
    from mf_scale.tracking.metrics import read_metrics
    from mf_scale.tracking.report import headline, write_report

    run = RunDir(existing_run(options.run))
    page = write_report(run)
    for card in headline(read_metrics(run.metrics), []):
        print(f"{card['name']:<22}{card['value']}")
    print(run_table(run))
    print(f"report: {page}")
    return 0


def run() -> NoReturn:
    """`main` as a process: what it says is flushed, then the process ends with its exit code.

    Without the libraries' own teardown: once in some thirty runs a native thread aborted there ("terminate called
    without an active exception"), after everything was written, and the exit code was no longer ours.
    """
    code = main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
