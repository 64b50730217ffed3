"""Rank of test_loop.py: trains as the program does and tells where the host waited in some of the steps.

Arguments: a file for the result, then overrides of the configuration.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))

from mf_scale.config.load import load_config
from mf_scale.distributed import comm
from mf_scale.distributed.env import world_from_environment
from mf_scale.training import trainer, watchdog
from mf_scale.training.preemption import install_handlers
from tests.gpu.waits import recorded

WATCHED, PROFILED = range(3, 7), range(8, 12)
"""Steps, from 1; the first ones compile and probe."""
_RUNTIME = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def main() -> None:
    target, overrides = Path(sys.argv[1]), sys.argv[2:]
    told: dict[str, Any] = {"steps": len(WATCHED)}
    stream = trainer.train_steps

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        """The trainer's batches. A step is what happens between asking for one and asking for the next."""
        with ExitStack() as around:
            for number, item in enumerate(stream(*arguments, **options), 1):
                if number in (WATCHED.start, PROFILED.start):
                    around.enter_context(waits(told) if number == WATCHED.start else runtime(told))
                if number in (WATCHED.stop, PROFILED.stop):
                    around.close()
                yield item

    trainer.train_steps = watched  # type: ignore[assignment]
    world = world_from_environment()
    config = load_config(None, [*overrides, f"train.steps={PROFILED.stop + 1}"])
    with comm.process_group(world, timeout=60) as device, watchdog.watched(config, world) as dog:
        trainer.train_run(config, world, device, install_handlers(), dog)
    told["micro_batches"] = len(WATCHED) * config.train.global_batch // config.train.micro_batch
    target.write_text(json.dumps(told))


@contextmanager
def waits(told: dict[str, Any]) -> Iterator[None]:
    """Waits that torch or Python know of, with their stacks."""
    with recorded() as found:
        yield
    told["stacks"] = found


@contextmanager
def runtime(told: dict[str, Any]) -> Iterator[None]:
    """How often CUDA was asked to wait, by whomever."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as record:
        yield
    names = [event.name for event in record.events() or ()]
    told["runtime"] = {name: names.count(name) for name in _RUNTIME}


main()
