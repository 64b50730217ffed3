"""Steps without an update: what is told of one, and when there are too many of them to go on.

A non-finite loss or gradient on one rank leaves out the update on all. Each such step is said with the ranks, loss
terms, parameter groups and samples that were not finite; a run that has come to nothing but such steps is stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mf_scale.config.schema import GuardConfig
from mf_scale.distributed import comm
from mf_scale.errors import GuardError, UserError
from mf_scale.rundir import (
    RunDir,
    checkpoint_damage,
    checkpoint_step,
    committed_checkpoints,
    disk_errors,
    write_atomically,
)
from mf_scale.tracking.metrics import read_metrics

KEYS_SHOWN = 6
"""Keys in a sentence; the event has all of them."""


class DeadSteps:
    """Counts the steps without an update, in a row and within a window.

    The share is of the whole window, also while the run is younger than that: the steps before its first count as
    good ones. So with the default (a tenth of 500) it takes 51 skipped steps, and one of one is not all of them.
    """

    def __init__(self, config: GuardConfig, skipped: list[int], step: int) -> None:
        """`skipped` is the run's own list (`TrainState.skipped`), kept up to date: so a run that resumes at `step`
        counts on."""
        self._config, self._skipped, self._last = config, skipped, step

    def observe(self, step: int, applied: bool) -> str | None:
        """Take note of a step, in their order (numbered from 1); why the run should stop, or None."""
        config = self._config
        self._last = step
        if not applied:
            self._skipped.append(step)
        oldest = step - max(config.window, config.skipped_in_a_row)
        while self._skipped and self._skipped[0] <= oldest:
            self._skipped.pop(0)
        if applied:
            return None
        if self.in_a_row >= config.skipped_in_a_row:
            return f"{self.in_a_row} steps in a row had no update"
        in_window = sum(before > step - config.window for before in self._skipped)
        if config.skipped_share and in_window > config.skipped_share * config.window:
            return f"{in_window} of the last {config.window} steps had no update"
        return None

    @property
    def in_a_row(self) -> int:
        """Steps without an update that end with the last one observed."""
        count = 0
        for step in reversed(self._skipped):
            if step != self._last - count:
                break
            count += 1
        return count

    @property
    def counted(self) -> list[int]:
        """The skipped steps that are still counted, oldest first."""
        return list(self._skipped)


def skip_report(
    terms_by_micro_batch: Sequence[Sequence[float]],
    names: Sequence[str],
    keys_by_micro_batch: Sequence[list[str]],
    group_norms: Sequence[float],
    group_names: Sequence[str],
    *,
    rank: int,
) -> dict[str, Any] | None:
    """For a step without an update, on every rank: the values of its `skipped` event on rank 0, None on the others.

    terms_by_micro_batch: this rank's loss terms, by `names`. `reason` is "loss" where some term of some rank was not
    finite; `ranks` then lists those micro-batches. Else it is "gradients" and all micro-batches are listed: only a
    replay can tell which one it was. `groups` are the parameter groups whose gradient norm was not finite.
    """
    found = [
        {"rank": rank, "micro_batch": number, "terms": _not_finite(terms, names), "keys": list(keys)}
        for number, (terms, keys) in enumerate(zip(terms_by_micro_batch, keys_by_micro_batch, strict=True))
    ]
    parts = comm.gather_objects([found, _not_finite(group_norms, group_names)])
    if parts is None:
        return None
    everything = [entry for ranks, _ in parts for entry in ranks]
    of_loss = [entry for entry in everything if entry["terms"]]
    bad_groups = {group for _, groups in parts for group in groups}
    return {
        "reason": "loss" if of_loss else "gradients",
        "ranks": of_loss or everything,
        "groups": [name for name in group_names if name in bad_groups],
    }


def _not_finite(values: Sequence[float], names: Sequence[str]) -> list[str]:
    return [name for name, value in zip(names, values, strict=True) if not math.isfinite(value)]


def skip_sentence(step: int, in_a_row: int, event: dict[str, Any]) -> str:
    """What the console says of a `skipped` event."""
    groups = ", ".join(event["groups"]) or "no parameter group by itself"
    if event["reason"] == "loss":
        where = "; ".join(
            f"rank {entry['rank']}: {', '.join(entry['terms'])} (samples {shown_keys(entry['keys'])})"
            for entry in event["ranks"][:3]
        )
        more = f" and {len(event['ranks']) - 3} micro-batches more" if len(event["ranks"]) > 3 else ""
        what = f"the loss was not finite, {where}{more}"
    else:
        keys = [key for entry in event["ranks"] for key in entry["keys"]]
        what = f"the loss was finite, its gradients in {groups} were not (samples {shown_keys(keys)})"
    return f"step {step}: {what}; no update on any rank ({in_a_row} in a row)"


def shown_keys(keys: Sequence[str]) -> str:
    """The first few keys, and how many there are beyond them."""
    more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    return ", ".join(keys[:KEYS_SHOWN]) + more


def sound_checkpoint_before(run: RunDir, step: int) -> Path | None:
    """The newest sound checkpoint that does not know step `step` yet, so of at most step - 1 steps; None: none."""
    for folder in committed_checkpoints(run):
        if checkpoint_step(folder) < step and checkpoint_damage(folder) is None:
            return folder
    return None


def stop_dead_run(
    run: RunDir, why: str, dead: DeadSteps, write: Callable[[Path, str], None] = write_atomically
) -> None:
    """On rank 0: leave a report of the skipped steps in the run directory and raise the GuardError that ends the run.

    Nothing is committed: what is named is the newest checkpoint from before the first of the steps that count, or from
    before the last row of them where none is left of that age.
    """
    counted = dead.counted
    step, row = counted[-1], counted[-dead.in_a_row]
    before = sound_checkpoint_before(run, counted[0]) or sound_checkpoint_before(run, row)
    replay = f"mf-scale replay {run.path} --step {row}"
    wanted = set(counted)
    events = [e for e in read_metrics(run.metrics) if e["event"] == "skipped" and e["step"] in wanted]
    report = {
        "why": why,
        "step": step,
        "checkpoint_before": before.name if before else None,
        "replay": replay,
        "steps_without_update": counted,
        "skipped": events,
    }
    last = f"the last checkpoint from before is {before}" if before else "there is no checkpoint from before"
    raise GuardError(
        f"{why}, so the run is stopped; {last}; {_write_report(run, step, report, write)}",
        where=f"step {step} of {run.path}",
        remedy=f"`{replay}` shows what happens in such a step; a lower optimizer.lr, a longer schedule.warmup_updates "
        "or train.precision=fp32 are the usual cures.",
    )


def _write_report(run: RunDir, step: int, report: dict[str, Any], write: Callable[[Path, str], None]) -> str:
    """Where the report is; a disk that is full must not hide why the run ended."""
    file = run.report / f"dead-steps-{step:08d}.json"
    try:
        with disk_errors(file):
            run.report.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps(report, indent=1, ensure_ascii=False))
    except UserError as error:
        return f"its report could not be written ({error.what})"
    return f"{file} names the ranks, samples and parameter groups"
