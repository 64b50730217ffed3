"""What the real W&B client wrote, read back: .wandb files by W&B's own records, media by their files."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class Told:
    """One offline run's file."""

    folder: Path
    run: Any = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[tuple[str, str]] = field(default_factory=list)
    """Name or glob of a metric, and its axis."""
    alerts: list[tuple[str, str, str]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    exit_code: int | None = None

    def table(self, row: dict[str, Any], name: str) -> list[list[Any]]:
        """Rows of a table."""
        return json.loads((self.folder / "files" / row[f"{name}/path"]).read_text())["data"]

    def masks(self, row: dict[str, Any], name: str) -> dict[str, np.ndarray]:
        """Masks of the first picture."""
        found = row[f"{name}/all_masks"][0]
        return {title: np.array(Image.open(self.folder / "files" / mask["path"])) for title, mask in found.items()}


def segments(wandb: Path, run_id: str) -> list[Told]:
    """Offline runs of an id in the order in which they were begun."""
    files = sorted(
        wandb.glob(f"offline-run-*/run-{run_id}.wandb"), key=lambda f: read(f).run.start_time.ToNanoseconds()
    )
    return [read(file) for file in files]


def read(file: Path) -> Told:
    """One file."""
    told = Told(file.parent)
    for record in records(file):
        kind = record.WhichOneof("record_type")
        told.kinds.append(kind)
        if kind == "run":
            told.run = record.run
            told.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            told.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            told.rows.append(_values(record.history.item))
        elif kind == "summary":
            told.summary |= _values(record.summary.update)
        elif kind == "metric":
            told.metrics.append((record.metric.name or record.metric.glob_name, record.metric.step_metric))
        elif kind == "alert":
            told.alerts.append((record.alert.title, record.alert.text, record.alert.level))
        elif kind == "exit":
            told.exit_code = record.exit.exit_code
        elif kind == "request":
            told.kinds[-1] = record.request.WhichOneof("request_type")
    return told


def records(file: Path) -> list[Any]:
    """The records of a .wandb file: a 7-byte head, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, part, found = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found


def _values(items: Any) -> dict[str, Any]:
    return {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in items}
