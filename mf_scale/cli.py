"""The command line: parse, call, print. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from mf_scale import __version__
from mf_scale.commands import (
    bench,
    compare,
    data,
    doctor,
    evaluate,
    export,
    import_model,
    plan,
    predict,
    replay,
    report,
    status,
    train,
    wandb_sync,
)
from mf_scale.distributed.env import World, world_from_environment
from mf_scale.distributed.failures import name_rank, tell_failure, watch_threads
from mf_scale.errors import StoppedOnRequest, UserError

_INTERRUPTED = 130
_WRITER_SECONDS = 60.0


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
            print(f"mf-scale: {name_rank(str(error), _world())}", file=sys.stderr)
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
        hint = " (key=value goes behind --set here)" if any("=" in item for item in unknown) else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mf-scale", description="Large-scale distributed pretraining of MaskFormer.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"mf-scale {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (
        train,
        status,
        evaluate,
        predict,
        report,
        compare,
        wandb_sync,
        replay,
        data,
        plan,
        doctor,
        export,
        import_model,
        bench,
    ):
        command.add(commands)
    return parser


def run() -> NoReturn:
    """`main` as a process: what it says is flushed, then the process ends with its exit code.

    Without the libraries' own teardown: once in some thirty runs a native thread aborted there ("terminate called
    without an active exception"), after everything was written, and the exit code was no longer ours.
    """
    os._exit(to_the_end())


def to_the_end() -> int:
    """`main`, errors that nobody expected said with the rank that had them, and everything written; the exit code."""
    watch_threads()
    try:
        code = main()
    except UserError as error:  # asked for with --debug
        traceback.print_exc()
        code = error.exit_code
    except Exception as error:
        tell_failure(error, _world())
        code = 1
    _wait_for_writers()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def _world() -> World:
    try:
        return world_from_environment()
    except UserError:
        return World()


def _wait_for_writers() -> None:
    """Threads that are no daemons have files to finish; a write that hangs is waited for no longer than a minute."""
    deadline = time.monotonic() + _WRITER_SECONDS
    threads = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        names = ", ".join(thread.name for thread in threads if thread.is_alive())
        with contextlib.suppress(OSError):
            print(f"mf-scale: not waiting any longer for what still runs behind: {names}", file=sys.stderr)


if __name__ == "__main__":
    run()
