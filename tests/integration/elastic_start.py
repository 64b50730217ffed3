"""Starts of two ranks through `run_ranks` that do as they are told: rank R of start S the words ORDERS[S][R].

As a launcher: `elastic_start.py FOLDER ORDERS`, prints the exit codes as JSON. As a rank, under torch's agent: leaves
the signals that it got in FOLDER/S-R.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from mf_scale.config.signals import DEFAULT
from mf_scale.distributed import elastic
from mf_scale.distributed.launch import allow_stop_signals
from mf_scale.distributed.ranks import enter, exit_code_for_agent
from mf_scale.training.preemption import install_handlers

DOLLARS = "$$ ${local_rank}"
"""An argument that the agent's templates would change."""


def rank(folder: Path, start: str, orders: list[str]) -> int:
    got: list[str] = []
    file = folder / f"{start}-{os.environ['RANK']}"
    for name in DEFAULT:
        signal.signal(signal.Signals[name], lambda number, _: got.append(signal.Signals(number).name))
    allow_stop_signals()
    code = 0
    for word in orders[int(os.environ["RANK"])].split():
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "asked":  # until a signal comes
            while not got:
                time.sleep(0.01)
        elif word == "ask":  # the launcher itself gets one
            os.kill(os.getppid(), signal.SIGUSR1)
        elif word.startswith("sleep="):
            time.sleep(float(word[6:]))
        else:
            code = int(word)
    file.write_text(" ".join(got))
    return code


def main() -> None:
    folder, orders = Path(sys.argv[1]), json.loads(sys.argv[2])
    if "RANK" in os.environ:
        enter()
        assert sys.argv[4] == DOLLARS
        os._exit(exit_code_for_agent(rank(folder, sys.argv[3], orders)))
    elastic.RANK_MODULE = "tests.integration.elastic_start"
    codes = []
    for number, told in enumerate(orders):
        asked = install_handlers().signals
        arguments = [str(folder), json.dumps(told), str(number), DOLLARS]
        codes.append(elastic.run_ranks(arguments, 2, elastic.alone(), asked, DEFAULT))
    print(json.dumps(codes))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
