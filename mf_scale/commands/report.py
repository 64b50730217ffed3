"""`mf-scale report`: the page of a run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mf_scale.commands.arguments import add_command
from mf_scale.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from mf_scale.config.schema import DataConfig, SourceConfig
    from mf_scale.tracking.report.data import SourceCounts
    from mf_scale.vocabulary import Vocabulary

_ROWS = 1 << 20
"""Rows of an index that are counted at once."""


def add(commands: Any) -> None:
    """Its arguments."""
    command = add_command(commands, "report", "write the page of a run: curves, tables, pictures", _run)
    command.add_argument("run", metavar="RUN", help="run directory")
    command.add_argument("--no-data", action="store_true", help="leave the indexes of the training data unread")


def _run(options: argparse.Namespace, _: list[str]) -> int:
    from mf_scale.evaluation.results import run_table
    from mf_scale.rundir import RunDir, existing_run
    from mf_scale.tracking.metrics import read_metrics
    from mf_scale.tracking.report.page import headline, write_report
    from mf_scale.tracking.report.wrong import read_hangs
    from mf_scale.tracking.status import run_status

    run = RunDir(existing_run(options.run))
    sources = [] if options.no_data else source_counts(run.config)
    page = write_report(run, sources, read_hangs(run.path / "hang"))
    for card in headline(read_metrics(run.metrics), [], run_status(run)):
        print(f"{card['name']:<22}{card['value']}")
    for source in sources:
        if source.missing:
            print(f"left out: the data of {source.name}: {source.missing}")
    print(run_table(run))
    print(f"report: {page}")
    return 0


def source_counts(config: Path) -> list[SourceCounts]:
    """What the indexes of a run's training sources tell; one that cannot be read says why. [] without a config.yaml."""
    from mf_scale.config.load import load_config
    from mf_scale.data.sources import training_sources
    from mf_scale.rundir import VOCABULARY
    from mf_scale.tracking.report.data import SourceCounts
    from mf_scale.vocabulary import Vocabulary

    if not config.is_file():
        return []
    vocabulary = config.parent / VOCABULARY
    try:
        data = load_config(config).data
        sources = training_sources(data)
        own = Vocabulary.load(vocabulary) if vocabulary.is_file() else None
    except UserError as error:
        return [SourceCounts("the training data", missing=error.what)]
    unified = own if own is not None and own.members else None
    return [_counts(source, data, unified) for source in sources]


def _counts(source: SourceConfig, data: DataConfig, unified: Vocabulary | None) -> SourceCounts:
    """Counts of one source, O(1) in its images, by the classes of a unified vocabulary where the run has one."""
    import numpy as np

    from mf_scale.config.schema import SourceConfig
    from mf_scale.data.index import Index
    from mf_scale.data.unified import seen_in
    from mf_scale.tracking.report.data import SourceCounts

    try:
        index = Index.open(source.index)
        packed = index.vocabulary.name
        if unified is not None:  # which knows of every class of a training source what became of it
            index = seen_in(unified, index, SourceConfig(index=source.index), data, source.index)
    except UserError as error:
        return SourceCounts(source.index, missing=error.what, weight=source.weight)
    segments: dict[int, int] = {}
    sizes: dict[tuple[int, int], int] = {}
    columns = {name: index.column(name) for name in ("segments", "height", "width")}
    for first in range(0, index.samples, _ROWS):
        rows = slice(first, min(first + _ROWS, index.samples))
        for value, n in zip(*np.unique(columns["segments"][rows], return_counts=True), strict=True):
            segments[int(value)] = segments.get(int(value), 0) + int(n)
        pairs = columns["height"][rows].astype(np.int64) << 32 | columns["width"][rows]
        for pair, n in zip(*np.unique(pairs, return_counts=True), strict=True):
            size = (int(pair) >> 32, int(pair) & 0xFFFFFFFF)
            sizes[size] = sizes.get(size, 0) + int(n)
    return SourceCounts(
        name=source.index,
        weight=source.weight,
        samples=index.samples,
        shards=len(index.shards),
        bytes=sum(shard.size for shard in index.shards),
        vocabulary=packed,
        kind=index.kind,
        class_names=index.vocabulary.names,
        class_images=index.class_counts().tolist(),
        segments=segments,
        sizes=sizes,
    )
