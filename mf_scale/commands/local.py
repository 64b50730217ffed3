"""What launch/local.sh runs: train through torch's elastic launcher, and start again until the run is done.

    python -m mf_scale.commands.local CONFIG [key=value ...] [--processes N] [--reinit-head]

0 done, 2 a user's mistake and 3 a guard end it; so does a signal to this process, once the state is committed (85).
Whatever else ended the ranks, they start again from the last commit, until launch.fruitless_starts of them in a row
came no further.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mf_scale.commands.arguments import OVERRIDES, add_processes, wanted_ranks
from mf_scale.config.schema import Config
from mf_scale.errors import EXIT_GUARD, EXIT_STOPPED, EXIT_USER, UserError
from mf_scale.rundir import RunDir
from mf_scale.tracking.progress import Reach, reach_of
from mf_scale.training.preemption import StopFlag, configure, install_handlers

if TYPE_CHECKING:
    from mf_scale.distributed.machines import Machines, OneMachine

    Group = OneMachine | Machines

_LONGEST_PAUSE = 60.0


def main(arguments: Sequence[str]) -> int:
    """Train to the end; the exit code."""
    flag = install_handlers()  # before the slow imports: a signal's default would kill
    options = _parse(arguments)
    try:
        return _run(options, flag)
    except UserError as error:
        print(f"launch/local.sh: {error}", file=sys.stderr)
        return error.exit_code


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/local.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="configuration file, for example configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    parser.add_argument("--reinit-head", action="store_true", help="as of mf-scale train")
    add_processes(parser)
    return parser.parse_intermixed_args(arguments)


def _run(options: argparse.Namespace, flag: StopFlag) -> int:
    from mf_scale.config.load import load_config
    from mf_scale.config.validate import plan_batch, validate
    from mf_scale.distributed.machines import StopAsked, machines, number_of_machines

    overrides = [*options.overrides, *(["train.reinit_head=true"] if options.reinit_head else [])]
    config = load_config(options.config, overrides)
    validate(config)
    for note in configure(flag, config):
        _say(note)
    ranks = wanted_ranks(options.processes)
    plan_batch(config, ranks * number_of_machines())
    command = ["train", options.config, *overrides, "--processes", "1"]  # the launcher starts them, a rank none
    try:
        return _bring_back(command, ranks, config, flag, machines(flag.signals))
    except StopAsked:
        return EXIT_STOPPED


def _bring_back(command: Sequence[str], ranks: int, config: Config, flag: StopFlag, group: Group) -> int:
    from mf_scale.distributed.elastic import run_ranks

    run, cap = RunDir(Path(config.run_dir)), config.launch.fruitless_starts
    best, fruitless = reach_of(run), 0
    while True:
        place = group.place(flag.signals)
        code = run_ranks(command, ranks, place, flag.signals, config.train.stop_signals)
        now = reach_of(run)
        fruitless = 0 if now.further_than(best) else fruitless + 1
        best = Reach(max(now.step, best.step), max(now.committed, best.committed))
        code, over = group.agree(code, bool(flag.signals) or fruitless >= cap)
        if code in (0, EXIT_USER, EXIT_GUARD):
            return code
        if over:
            if fruitless >= cap:
                _say(f"{fruitless} starts in a row brought the run no further than step {best.step}: giving up")
            return code
        _say(f"the ranks ended with exit code {code}: starting again{_from(now.committed)}")
        if _asked_within(_pause(fruitless), flag):
            return code


def _from(step: int) -> str:
    return f" from the commit of step {step}" if step else ""


def _pause(fruitless: int) -> float:
    """Seconds: what is away comes back no sooner for being asked at once."""
    return min(_LONGEST_PAUSE, 2.0 ** (fruitless - 1)) if fruitless else 0.0


def _asked_within(seconds: float, flag: StopFlag) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not flag.signals:
        time.sleep(0.1)
    return bool(flag.signals)


def _say(text: str) -> None:
    print(f"launch/local.sh: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    ended = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)  # a thread of torch's agent may still wait for other machines
