"""One clean W&B run of a run directory, from metrics.jsonl: every step once, in order, as the file tells it.

W&B's steps only grow. So the run that is told live keeps the first telling of steps that a run took twice; this one has
the telling that holds. It is another W&B run, RUNID-clean, which each call writes anew.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mf_scale.config.load import config_to_dict, load_config
from mf_scale.config.schema import Config
from mf_scale.config.urls import without_secrets
from mf_scale.errors import FaultError, UserError
from mf_scale.rundir import RunDir, read_json
from mf_scale.tracking.metrics import read_metrics
from mf_scale.tracking.wandb_run import CLIENT_LOG, encoded, end_client, opening, run_id, start_client
from mf_scale.tracking.wandb_values import rows, wandb_summary

_FINISH_SECONDS = 600.0
"""How long the client may take to hand over what it was told: media are uploaded at the end."""


@dataclass(frozen=True)
class Synced:
    """What was written."""

    id: str
    rows: int
    last_step: int
    folder: Path | None
    """The offline run's folder, to be uploaded by `wandb sync`; None: it went to the service."""


def sync(run: RunDir, *, online: bool, id: str | None = None) -> Synced:
    """Write the clean run; `id` in place of RUNID-clean. Raises UserError; FaultError where the client fails."""
    records = read_metrics(run.metrics)
    if not rows(records):
        raise UserError(
            "there is nothing to send: no step in metrics.jsonl",
            where=str(run.path),
            remedy="Name a run directory that `mf-scale train` wrote.",
        )
    config = load_config(run.config)
    live = run_id(run)
    if id == live or (id is not None and re.fullmatch(r"[\w.-]+", id) is None):
        what = (
            "that is the run which is told live" if id == live else "letters, digits, dots, dashes make the id of a run"
        )
        raise UserError(what, where=f"--id {id}", remedy="Name another one, or none.")
    id = id or f"{live}-clean"
    before = set(_folders(run, id))
    opened = opening(config.tracking, run, online=online, resume=False, id=id)
    opened["open"]["modes"] = ["online"] if online else ["offline"]  # whoever asks for the service wants to hear of it
    lines = sync_lines(run, records, {**opened, "config": shown_settings(config, records)})
    log = run.wandb / CLIENT_LOG
    began = log.stat().st_size if log.is_file() else 0
    failed = _tell(run, lines)
    if failed:
        told = _last_words(log, began)
        raise FaultError(
            f"W&B did not take everything: {told}" if told else "W&B did not take everything",
            where=str(log),
            remedy="Try again; --offline writes files that `wandb sync` uploads later.",
        )
    made = [folder for folder in _folders(run, id) if folder not in before]
    for folder in before if made else ():
        shutil.rmtree(folder, ignore_errors=True)  # an upload of both would tell each step twice
    table = rows(records)
    return Synced(id, len(table), max(table), made[0] if made else None)


def sync_lines(
    run: RunDir, records: Sequence[Mapping[str, Any]], opened: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The client's lines: rows in the order of their steps, each evaluation's tables behind its step, the summary."""
    yield dict(opened)
    tables = _evaluations(run, records)
    table = rows(records)
    for step in sorted({*table, *tables}):
        if step in table:
            yield {"row": table[step], "at": step}
        for name in tables.get(step, ()):
            yield {"evaluation": name, "at": step}
    summary: dict[str, Any] = {}
    for record in records:
        summary |= wandb_summary(record)
    yield {"summary": summary}
    yield {"finish": int(summary.get("run/exit_code", 0)), "seconds": _FINISH_SECONDS}


def shown_settings(config: Config, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The effective configuration without secrets, and the code of the last start."""
    start: Mapping[str, Any] = next((record for record in reversed(records) if record["event"] == "start"), {})
    code = {**(start.get("code") or {}), "versions": start.get("versions")}
    return {**without_secrets(config_to_dict(config)), "code": code, "session": {"world": start.get("world")}}


def _evaluations(run: RunDir, records: Sequence[Mapping[str, Any]]) -> dict[int, list[str]]:
    """Step -> files in RUN/report of evaluations that still hold."""
    held = {(record.get("split"), record["step"]) for record in records if record["event"] == "evaluation"}
    found: dict[int, list[str]] = {}
    for file in sorted(run.report.glob("evaluation-*.json")):
        with contextlib.suppress(UserError):
            results = read_json(file)
            if (results.get("split"), results.get("step")) in held:
                found.setdefault(int(results["step"]), []).append(file.name)
    return found


def _tell(run: RunDir, lines: Iterator[dict[str, Any]]) -> int:
    """Run the client to its end; its exit code."""
    child = start_client(run)
    try:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
            for line in tqdm(lines, desc="wandb-sync", unit="line", disable=not sys.stderr.isatty()):
                pipe.write(encoded(line))
        return child.wait(_FINISH_SECONDS + 30)
    except subprocess.TimeoutExpired:
        return 1
    finally:
        if child.poll() is None:
            end_client(child)


def _folders(run: RunDir, id: str) -> list[Path]:
    ours = re.compile(rf"offline-run-\d+_\d+-{re.escape(id)}")
    return sorted(folder for folder in run.wandb.glob("offline-run-*") if ours.fullmatch(folder.name))


def _last_words(log: Path, began: int) -> str:
    """The last line that the client wrote since `began`."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(began)
        lines = file.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""
