"""Sidecar: what was scanned of a finished shard, in a file beside it until the index is written.

A pack that goes on, and the part that finishes last, read these instead of the shards.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from data_tools.files import partial_path, publish
from data_tools.scan import ROWS, ShardScan
from mf_scale.data.index import Shard

SUFFIX = ".rows"
SCAN = b"scan"
"""Key of the shard, its notes and its plan in the file's metadata."""


def sidecar_path(shard: Path) -> Path:
    """Where a shard's rows lie."""
    return shard.with_name(shard.name + SUFFIX)


def save_rows(scan: ShardScan, shard: Path, plan: str) -> None:
    """Write the rows of a shard of this plan, whole or not at all."""
    path = sidecar_path(shard)
    partial = partial_path(path)
    told = json.dumps({"shard": asdict(scan.shard), "notes": scan.notes, "plan": plan}, sort_keys=True)
    schema = ROWS.with_metadata({SCAN: told.encode()})
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(scan.rows.replace_schema_metadata(schema.metadata))
    publish(partial, path)


def load_rows(shard: Path, plan: str) -> ShardScan | None:
    """The rows of a finished shard of this plan; None where they or the shard are not there, or do not fit."""
    found = _load(shard)
    if found is None or found[1] != plan:
        return None
    try:
        return found[0] if shard.stat().st_size == found[0].shard.size else None
    except FileNotFoundError:
        return None


def of_another_plan(shard: Path, plan: str) -> bool:
    """True where a shard's rows say that it belongs to another pack."""
    found = _load(shard)
    return found is not None and found[1] != plan


def _load(shard: Path) -> tuple[ShardScan, str] | None:
    """What lies beside a shard, and the plan it was written for."""
    try:
        # Read into memory: another part may remove the file while these are in use.
        with pa.OSFile(str(sidecar_path(shard)), "rb") as file:
            table = pa.ipc.open_file(pa.BufferReader(file.read())).read_all()
        told = json.loads(table.schema.metadata[SCAN])
        scan = ShardScan(Shard(**told["shard"]), table.replace_schema_metadata(None), notes=told["notes"])
        return (scan, str(told["plan"])) if table.schema.equals(ROWS) else None
    except (FileNotFoundError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None
