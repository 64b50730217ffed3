"""Index: what was scanned of all shards -> `samples.arrow`, then `index.json`. The packer and `index` share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.files import file_checksum, partial_path, publish, write_json
from data_tools.histogram import Histogram, IdReport, judge_ids
from data_tools.parallel import each, tick
from data_tools.problems import Problems
from data_tools.scan import ShardScan, scan_shard
from mf_scale.data.decode import LABEL_VALUES
from mf_scale.data.ids import LabelMember
from mf_scale.data.index import COLUMNS, FORMAT, HEAD, SCHEMA, VERSION, head_digest
from mf_scale.data.storage import plain_name
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class Meaning:
    """What the head of an index says of all its samples, beside the vocabulary."""

    crowd: str
    unlabelled: str
    """What crowd and unlabelled pixels become in training: TREATMENTS."""
    kind: str = "panoptic"
    """One of KINDS."""
    labels: LabelMember | None = None
    """Of samples made elsewhere."""


@dataclass(frozen=True)
class _Job:
    path: Path
    num_classes: int
    labels: LabelMember | None
    table: np.ndarray | None


def index_source(
    folder: Path,
    vocabulary: Vocabulary,
    meaning: Meaning,
    *,
    accept: bool = False,
    workers: int = 1,
    progress: Callable[..., Any],
) -> tuple[dict[str, Any], IdReport | None]:
    """Index all tars of a folder, in the order of their names; the head, and with `labels` what their values mean.

    Raises UserError with everything that is wrong in the shards, and where values were not declared or look declared
    wrongly (`accept` lets the latter pass).
    """
    paths, labels = _shards(folder), meaning.labels
    table = None if labels is None else labels.ids.table(vocabulary, LABEL_VALUES)
    jobs = [_Job(path, len(vocabulary), labels, table) for path in paths]
    scans: list[ShardScan] = []
    problems = Problems()
    with (
        progress(total=sum(path.stat().st_size for path in paths), unit="B", unit_scale=True) as bar,
        closing(each(_scan, jobs, workers=workers, bar=bar)) as results,
    ):
        for result in results:
            if isinstance(result, ShardScan):
                scans.append(result)
            else:
                problems.take(result)
    problems.refuse("the source cannot be indexed", where=str(folder), remedy="Repair these or take them out.")
    report = None

    if labels is not None:
        histogram = Histogram()
        for scan in scans:
            histogram.merge(scan.values)
        report = judge_ids(histogram, labels.ids, vocabulary, total=histogram.read, accept=accept)
    return write_index(folder, vocabulary, scans, meaning), report


def _scan(job: _Job) -> ShardScan | Problems:
    return scan_shard(job.path, job.num_classes, job.labels, job.table, told=tick)


def _shards(folder: Path) -> list[Path]:
    """The tars of a folder by name; UserError where there are none, or compressed or oddly named ones."""
    paths = sorted(folder.iterdir())
    compressed = [path.name for path in paths if path.name.endswith(COMPRESSED)]
    if compressed:
        raise UserError(
            f"{len(compressed)} shards are compressed ({', '.join(compressed[:3])}): a compressed tar has no bytes to "
            "point at",
            where=str(folder),
            remedy="Unpack them into .tar (gunzip, unzstd, …); images in them are compressed already.",
        )
    shards = [path for path in paths if path.suffix == ".tar"]
    if not shards:
        raise UserError("there is no .tar in this folder", where=str(folder), remedy="Give the folder of the shards.")
    problems = Problems()
    for path in shards:
        try:
            plain_name(path.name)
        except UserError:
            problems.add("shards whose names are not plain", path.name)
    problems.refuse(
        "the source cannot be indexed",
        where=str(folder),
        remedy="Rename them to letters, digits, _ . + = , @ -, the first of them a letter, a digit or _.",
    )
    return shards


def write_index(folder: Path, vocabulary: Vocabulary, scans: Sequence[ShardScan], meaning: Meaning) -> dict[str, Any]:
    """Write the columns, then the head, each under another name first; returns the head.

    Raises UserError where a key stands in two shards.
    """
    counts = [scan.rows.num_rows for scan in scans]
    number = pa.array(np.repeat(np.arange(len(scans), dtype=np.int32), counts))
    rows = pa.concat_tables([scan.rows for scan in scans])
    table = pa.table([number, *rows.columns], schema=SCHEMA).combine_chunks()
    _refuse_double_keys(table, scans, folder)
    columns = folder / COLUMNS
    partial = partial_path(columns)
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table)
    size, sha256 = partial.stat().st_size, file_checksum(partial)
    publish(partial, columns)
    head: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "samples": table.num_rows,
        "crowd": meaning.crowd,
        "unlabelled": meaning.unlabelled,
        "kind": meaning.kind,
        "labels": meaning.labels.to_dict() if meaning.labels else None,
        "columns": {"name": COLUMNS, "size": size, "sha256": sha256},
        "shards": [asdict(scan.shard) for scan in scans],
        "vocabulary": vocabulary.to_dict(),
    }
    head["digest"] = head_digest(head)
    write_json(folder / HEAD, head)
    return head


def _refuse_double_keys(table: pa.Table, scans: Sequence[ShardScan], folder: Path) -> None:
    keys = table["key"]
    if pc.count_distinct(keys).as_py() == table.num_rows:
        return
    problems = Problems()
    counted = pc.value_counts(keys)
    for double in counted.field("values").filter(pc.greater(counted.field("counts"), 1)):
        places = table["shard"].filter(pc.equal(keys, double)).to_pylist()
        problems.add("keys in two shards", f"{double} in {' and '.join(scans[i].shard.name for i in places)}")
    problems.refuse("the source cannot be indexed", where=str(folder), remedy="A key must be unique in a source.")
