"""One start of the ranks through torch's elastic launcher, with our signals and exit codes.

The agent runs in a thread of its own, in which stop signals are held back: so it installs no handlers (its own would
end the ranks 30 s after the first signal), the ranks inherit the mask, and the main thread passes every signal on.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mf_scale.distributed.launch import signal_name
from mf_scale.distributed.ranks import Ranks, common_code
from mf_scale.errors import EXIT_FAULT, EXIT_STOPPED

RANK_MODULE = "mf_scale.commands.elastic_rank"
_LOOK_SECONDS = 0.05
_FIRST_RANK_SECONDS = 10.0
"""How long a launcher that was asked to stop waits for a rank to be there: else it still waits for other machines."""


class Place:
    """Where the agents of one start meet."""

    def __init__(self, name: str, endpoint: str, *, address: str, host: bool, machines: int = 1) -> None:
        """`name` of the start; `endpoint` host:port of the store, which the one agent holds that is `host`;
        `address` of this machine as the others see it."""
        self.name, self.endpoint, self.address, self.host, self.machines = name, endpoint, address, host, machines


def alone() -> Place:
    """The place of a machine by itself: a port that the system chooses."""
    return Place("start", "127.0.0.1:0", address="127.0.0.1", host=True)


def run_ranks(
    arguments: Sequence[str], processes: int, place: Place, asked: Sequence[str], stop_signals: Sequence[str]
) -> int:
    """Run `mf-scale ARGUMENTS` as `processes` ranks of this machine through torch's agent; their common exit code.

    `asked` is the live list of the names of signals that this process has caught; `stop_signals` the run's.
    """
    with tempfile.TemporaryDirectory(prefix="mf_scale-ranks-") as folder:
        ranks = Ranks(Path(folder))
        # One core's worth of threads a rank: two ranks with all cores each take turns instead of working.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        os.environ.update(ranks.environment(stop_signals[0] if stop_signals else "SIGTERM"))
        codes: list[int] = []
        agent = threading.Thread(
            target=_run_agent, args=(arguments, processes, place, stop_signals, ranks, codes), daemon=True
        )
        agent.start()
        since: float | None = None
        while agent.is_alive():
            ranks.pass_on(asked)
            since = None if not asked or ranks.processes() else since or time.monotonic()
            if since is not None and time.monotonic() - since > _FIRST_RANK_SECONDS:
                return EXIT_STOPPED
            agent.join(_LOOK_SECONDS)
    return codes[0]


def _run_agent(
    arguments: Sequence[str],
    processes: int,
    place: Place,
    stop_signals: Sequence[str],
    ranks: Ranks,
    codes: list[int],
) -> None:
    """The thread: appends the common exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.Signals[name] for name in {*stop_signals, "SIGTERM", "SIGINT"}])
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence()
    config = LaunchConfig(
        min_nodes=place.machines,
        max_nodes=place.machines,
        nproc_per_node=processes,
        run_id=place.name,
        rdzv_backend="c10d",
        rdzv_endpoint=place.endpoint,
        rdzv_configs={"is_host": place.host},
        local_addr=place.address,
        max_restarts=0,  # it would repeat a user's mistake; who starts again reads the exit code first
        monitor_interval=_LOOK_SECONDS,
    )
    # The agent fills templates in: a dollar of the user's stays one.
    escaped = [argument.replace("$", "$$") for argument in arguments]
    try:
        elastic_launch(config, sys.executable)("-m", RANK_MODULE, *escaped)
        seen: list[int] = []
    except ChildFailedError as error:
        seen = [failure.exitcode for failure in error.failures.values()]
        rank, first = error.get_first_failure()  # the agent ended the others
        if first.exitcode < 0:
            who = f"rank {rank} on {socket.gethostname()}"
            print(f"launch/local.sh: {who} was killed by {signal_name(-first.exitcode)}", file=sys.stderr, flush=True)
    except (RendezvousError, ConnectionError, TimeoutError, RuntimeError) as error:
        print(f"launch/local.sh: the machines lost each other ({type(error).__name__}: {error})", file=sys.stderr)
        seen = [EXIT_FAULT]
    codes.append(common_code(seen, stopped=ranks.stopped()))


def _silence() -> None:
    """The agent's own words: what became of the ranks is said once, by whoever started it."""
    names: dict[str, Any] = logging.Logger.manager.loggerDict
    for name in [name for name in names if name.startswith(("torch.distributed.elastic", "torch.distributed.launch"))]:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
