"""`python -m mf_scale.cluster COMMAND`: the Python halves of the job scripts in launch/. No torch here.

prepare   check a start before its ranks, print what the job script must know
probe     what one node says of itself
judge     whether the nodes' answers let the ranks start
decide    what becomes of the job now that the ranks have ended
freeze    keep a copy of code and configuration, before the job is submitted
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mf_scale.cluster import other_scripts
from mf_scale.cluster.job import this_job
from mf_scale.cluster.prepare import Request, configuration, first_submitted, frozen_copy, prepare
from mf_scale.cluster.probe import judge, node_report
from mf_scale.cluster.requeue import decide, fruitless_starts
from mf_scale.errors import EXIT_FAULT, UserError
from mf_scale.fingerprint import code_digest
from mf_scale.rundir import RunDir
from mf_scale.tracking.launches import GIVEN_UP, LEFT, REQUEUED, append_launch, read_launches
from mf_scale.tracking.progress import reach_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    options, rest = _parser().parse_known_args(arguments)
    try:
        return int(options.call(options, rest) or 0)
    except UserError as error:
        print(f"mf_scale: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"mf_scale: the storage fails: {error}", file=sys.stderr)
        return EXIT_FAULT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mf_scale.cluster", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, call in (("prepare", _prepare), ("freeze", _freeze)):
        command = commands.add_parser(name, allow_abbrev=False)
        command.add_argument("--root", type=Path, required=True)
        command.add_argument("--frozen", type=Path)
        command.add_argument("--live-code", action="store_true")
        command.add_argument("--freeze-anew", action="store_true")
        command.set_defaults(call=call)
    command = commands.add_parser("probe", allow_abbrev=False)
    command.add_argument("token", type=Path)
    command.set_defaults(call=_probe)
    command = commands.add_parser("judge", allow_abbrev=False)
    command.add_argument("--run", type=Path, required=True)
    command.add_argument("--nodes", type=int, required=True)
    command.add_argument("--began", type=float, required=True)
    command.set_defaults(call=_judge)
    command = commands.add_parser("decide", allow_abbrev=False)
    command.add_argument("--run", type=Path, required=True)
    command.add_argument("--code", type=int, required=True)
    command.add_argument("--signals", default="")
    command.add_argument("--cap", type=int, required=True)
    command.set_defaults(call=_decide)
    other_scripts.add(commands)
    return parser


def _request(options: argparse.Namespace, rest: list[str]) -> Request:
    named = [word for word in rest if not word.startswith("-") and ("=" not in word or Path(word).is_file())]
    if len(named) != 1:
        told = f"{' and '.join(named[:2])} are both no key=value" if named else "no configuration file is named"
        raise UserError(told, where="command line", remedy="The arguments are CONFIG [key=value ...].")
    overrides = tuple(word for word in rest if word != named[0])
    return Request(Path(named[0]), overrides, options.root, options.live_code, options.freeze_anew, options.frozen)


def _prepare(options: argparse.Namespace, rest: list[str]) -> int:
    plan = prepare(_request(options, rest), this_job())
    for note in plan.notes:
        print(f"mf_scale: {note}", file=sys.stderr)
    print(plan.shell())
    return 0


def _freeze(options: argparse.Namespace, rest: list[str]) -> int:
    request = _request(options, rest)
    config = configuration(request)
    frozen = frozen_copy(request, RunDir(Path(config.run_dir).absolute()), config, submitted=0)
    for note in frozen.notes if frozen else ():
        print(f"mf_scale: {note}", file=sys.stderr)
    print(frozen.folder if frozen else "")
    return 0


def _probe(options: argparse.Namespace, rest: list[str]) -> int:
    print(json.dumps(node_report(options.token)), flush=True)
    return 0


def _judge(options: argparse.Namespace, rest: list[str]) -> int:
    job = this_job()
    judge(
        sys.stdin,
        job.nodes[: options.nodes],
        began=options.began,
        ended=time.time(),
        run=options.run,
        code=code_digest(),
        python=f"{sys.executable} ({platform.python_version()})",
        comes_back=job.start.restart > 0,
    )
    return 0


def _decide(options: argparse.Namespace, rest: list[str]) -> int:
    """Writes the end of the start, prints `requeue` where the job script must ask for it."""
    run, job = RunDir(options.run), this_job()
    launches, reached = read_launches(run), reach_of(run)
    fruitless = fruitless_starts(launches, since=first_submitted(job, launches), now=reached)
    signals = options.signals.split()
    began = launches[-1].began if launches else 0.0
    hung = any(file.stat().st_mtime > began for file in run.path.glob("hang/*"))
    decision = decide(options.code, signals, job.facts, job.start.restart, fruitless, options.cap, hung=hung)
    if decision.superseded:
        print(f"mf_scale: {decision.why}: this one leaves it alone", file=sys.stderr)
        return 0
    try:
        append_launch(
            run,
            "end",
            job=job.start.job,
            restart=job.start.restart,
            code=options.code,
            signals=signals,
            step=reached.step,
            why=decision.why,
            then=decision.then,
        )
    except UserError as error:  # a full disk must not keep the job from coming back
        print(f"mf_scale: the end of this start is not on record: {error}", file=sys.stderr)
    told = {
        REQUEUED: "the job is requeued" if decision.ask else "SLURM brings the job back",
        LEFT: "requeueing is not allowed for this job: the next one of its chain goes on",
        GIVEN_UP: f"given up, since {fruitless} starts in a row brought the run no further than step {reached.step:,} "
        f"(launch.fruitless_starts = {options.cap}); see the lines above, then submit again",
    }
    after = f": {told[decision.then]}" if decision.then in told else ""
    print(f"mf_scale: exit code {options.code}, {decision.why}{after}", file=sys.stderr)
    if decision.ask:
        print("requeue")
    return 0


if __name__ == "__main__":
    sys.exit(main())
