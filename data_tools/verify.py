"""Verify: checksums of shards and columns, every sample decodes and is what the index says."""

from __future__ import annotations

from typing import Any

from data_tools.problems import Problems
from data_tools.source import decoded_samples
from mf_scale.data.index import Index, checksum, verify_shards
from mf_scale.data.samples import BadSample
from mf_scale.errors import UserError


def verify_source(source: str, *, progress: Any) -> Index:
    """The index where everything is sound; UserError with all findings otherwise. `progress` wraps an iterable."""
    index = Index.open(source)
    columns = index.columns
    if checksum(index.storage, columns["name"], columns["size"]) != columns["sha256"]:
        raise UserError(
            f"{columns['name']} has another checksum", where=source, remedy="Restore it or make the index again."
        )
    verify_shards(index, checksums=True)
    problems = Problems()
    for sample_id, sample in progress(decoded_samples(index), total=index.samples, unit="sample"):
        record = index.sample(sample_id)
        place = f"{record.key} in {record.shard} at byte {record.offset}"
        if isinstance(sample, BadSample):
            problems.add("samples that do not decode", f"{place}: {sample}")
        elif (
            sample.image.shape[:2] != (record.height, record.width)
            or sorted(set(sample.labels.tolist())) != record.class_ids
            or len(sample.labels) != record.segments
        ):
            problems.add("samples that the index describes wrongly", place)
    problems.refuse(
        f"{len(problems)} of {index.samples} samples are not sound", where=source, remedy="Pack the source again."
    )
    return index
