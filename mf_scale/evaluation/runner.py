"""Evaluation: every sample of a source exactly once, on any number of ranks, with the same numbers for all of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from mf_scale.config.schema import Config
from mf_scale.data.batch import NONE
from mf_scale.data.cache import cache_settings
from mf_scale.data.index import Index, verify_shards
from mf_scale.data.loader import EvalSample, eval_samples
from mf_scale.data.sources import refuse_task
from mf_scale.distributed import comm
from mf_scale.distributed.env import World
from mf_scale.distributed.same_program import refuse_mixture
from mf_scale.errors import UserError
from mf_scale.evaluation.forward import Answer, answer
from mf_scale.evaluation.loading import LoadedModel, load_checkpoint
from mf_scale.evaluation.metrics import PanopticCounts, SemanticCounts
from mf_scale.evaluation.results import Evaluation, Shown, make_room, results_table, save_evaluation
from mf_scale.rundir import MANIFEST, RunDir, resolve_checkpoint
from mf_scale.tracking.pictures import Segmentation, draw_segments, plain

PICTURES = 6
"""Samples shown in the report: the first of the split."""
_PATIENCE = 1800.0
"""Seconds a rank waits for its peers: their shares of the images differ in size."""


@dataclass(frozen=True)
class _Counts:
    """The counts a task needs."""

    semantic: SemanticCounts | None
    panoptic: PanopticCounts | None


def evaluate_run(path: str, overrides: Sequence[str], world: World, *, split: str) -> str:
    """Evaluate a run or checkpoint on its `split` source; writes results into the run and returns a table to print."""
    with comm.process_group(world, timeout=_PATIENCE, meeting=_meeting_folder(path, world)) as device:
        refuse_mixture(world, {"RUN": path, "--split": split, "overrides": list(overrides)})
        # One rank chooses and verifies: of a run that goes on, two might find two newest checkpoints.
        found = comm.on_first_rank(lambda: [place and str(place) for place in resolve_checkpoint(path)])
        run_dir, folder = (place and Path(place) for place in found)
        loaded = comm.together(lambda: load_checkpoint(run_dir, folder, overrides, device))
        index = comm.together(lambda: _open_source(loaded, split))
        run = RunDir(loaded.run_dir) if loaded.run_dir else None
        if run is not None:
            comm.on_first_rank(lambda: make_room(run, split))
        evaluation = evaluate(loaded.model, index, loaded.config, world, split=split, pictures=PICTURES if run else 0)
        if run is not None:
            save_evaluation(run, evaluation, step=loaded.step)
    return results_table([evaluation.results])


def _meeting_folder(path: str, world: World) -> Path:
    """Where the ranks meet: the run directory, which gets the results, or a checkpoint outside of one."""
    given = Path(path).resolve()
    if not given.is_dir():
        error = UserError("this is neither a run directory nor a checkpoint", where=path, remedy="Check the path.")
        error.said_by_first_rank = world.local_rank != 0  # once a node: it may be that only this one does not see it
        raise error
    inside = (given / MANIFEST).is_file() and given.parent.name == "checkpoints"
    return given.parent.parent if inside else given


def evaluate(
    model: nn.Module,
    index: Index,
    config: Config,
    world: World,
    *,
    split: str,
    pictures: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Evaluate on all ranks at the images' original size; every rank returns the same results.

    semantic: mIoU; panoptic: mIoU and PQ; instance: PQ (stuff is void, so its predictions count as wrong only where
    things are). `pictures`: samples to draw, the first of the source. The model's mode is restored.
    """
    vocabulary, task = index.vocabulary, config.data.task
    classes, things = len(vocabulary), vocabulary.things
    counts = _Counts(
        SemanticCounts(classes) if task != "instance" else None,
        PanopticCounts(classes, things) if task != "semantic" else None,
    )
    shown: list[Shown] = []
    start, was_training = time.monotonic(), model.training

    def count_own() -> None:
        samples = eval_samples(index, config.data, rank=world.rank, world=world.size)
        with _progress_bar(index.samples, split, progress and world.first) as bar:
            for turn, sample in enumerate(samples):
                position = turn * world.size + world.rank
                bar.update(min(world.size, index.samples - bar.n))
                said = answer(model, sample.image, config)
                if not sample.weight:
                    continue
                views = _count(counts, sample, said, config, things)
                if position < pictures:
                    drawn = [(title, draw_segments(sample.image, s, vocabulary.names)) for title, s in views]
                    shown.append(Shown(position, sample.key, [("image", plain(sample.image)), *drawn]))

    model.eval()
    try:
        comm.together(count_own)
    finally:
        model.train(was_training)
    results = {"split": split, "task": task, "samples": index.samples, **_summed(counts, things)}
    results["images_per_second"] = round(index.samples / (time.monotonic() - start), 3)
    results |= {"class_names": vocabulary.names, "things": things}
    return Evaluation(comm.broadcast_object(results), shown)


def flat_map(segment_map: NDArray[Any]) -> NDArray[Any]:
    """[L,H,W] -> [H,W]: where instances overlap, the lowest layer is what shows (PQ knows no overlap)."""
    flat = segment_map[0].copy()
    for layer in segment_map[1:]:
        np.copyto(flat, layer, where=(flat == NONE) & (layer >= 0))
    return flat


def class_map(flat: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.int64]:
    """Class of every pixel of a flat map, -1 where there is no segment."""
    return np.append(labels, -1)[np.maximum(flat, -1)]


def _count(
    counts: _Counts, sample: EvalSample, said: Answer, config: Config, things: list[bool]
) -> list[tuple[str, Segmentation]]:
    """Add one sample; the ground truth and the predictions, to be drawn."""
    flat = flat_map(sample.segment_map)
    views = [("ground truth", Segmentation(flat, sample.labels))]
    both = counts.semantic is not None and counts.panoptic is not None
    if counts.semantic is not None:
        classes = said.semantic()
        counts.semantic.update(classes, class_map(flat, sample.labels))
        segmentation = Segmentation(classes, np.arange(counts.semantic.classes))
        views.append(("prediction, semantic" if both else "prediction", segmentation))
    if counts.panoptic is not None:
        segment_map, segments = said.panoptic(things, config)
        labels = np.array([s["label"] for s in segments], dtype=np.int64)
        counts.panoptic.update(segment_map, labels, flat, sample.labels, sample.crowd)
        views.append(("prediction, panoptic" if both else "prediction", Segmentation(segment_map, labels)))
    return views


def _summed(counts: _Counts, things: list[bool]) -> dict[str, Any]:
    """Results of the counts of all ranks; mIoU and PQ, the two that are quoted, on top (None: not of this task)."""
    results: dict[str, Any] = {"mIoU": None, "PQ": None}
    if counts.semantic is not None:
        semantic = SemanticCounts.from_array(comm.sum_array(counts.semantic.to_array())).results()
        results |= {"mIoU": semantic["mIoU"], "semantic": semantic}
    if counts.panoptic is not None:
        panoptic = PanopticCounts.from_array(comm.sum_array(counts.panoptic.to_array()), things).results()
        quoted = "things" if counts.semantic is None else "all"
        results |= {"PQ": panoptic[quoted]["PQ"], "panoptic": panoptic}
    return results


def _open_source(loaded: LoadedModel, split: str) -> Index:
    """The index of the wanted source, checked against the checkpoint's vocabulary; raises UserError."""
    data = loaded.config.data
    source = data.train if split == "train" else data.val
    if split == "train" and len(data.sources) > 0:
        raise UserError(
            f"the run has {len(data.sources)} training sources, an evaluation reads one",
            where=str(loaded.checkpoint),
            remedy=f"Name it as the validation source: --split val data.val={data.sources[0].index}",
        )
    if source is None:
        raise UserError(
            f"the run has no {split} source to evaluate on",
            where=str(loaded.checkpoint),
            remedy=f"Name one: data.{split}=FOLDER.",
        )
    index = Index.open(source, cache_settings(data))
    refuse_task(index, data.task)
    if index.vocabulary.digest != loaded.vocabulary.digest:
        raise UserError(
            f"the source has vocabulary {index.vocabulary.name!r} ({len(index.vocabulary)} classes), the checkpoint "
            f"{loaded.vocabulary.name!r} ({len(loaded.vocabulary)} classes)",
            where=source,
            remedy="Evaluate on a source packed with the vocabulary the model was trained on.",
        )
    verify_shards(index, checksums=False)
    return index


def _progress_bar(samples: int, split: str, shown: bool) -> tqdm[Any]:
    every = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(total=samples, desc=f"evaluate {split}", unit="image", disable=not shown, mininterval=every)
