"""Evaluation: every sample of a source exactly once, on any number of ranks, with the same numbers for all of them."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from mf_scale.config.data_rules import validation_source
from mf_scale.config.schema import Config, SourceConfig
from mf_scale.data.index import Index, verify_shards
from mf_scale.data.loader import EvalSample, eval_samples
from mf_scale.data.sources import open_other
from mf_scale.distributed import comm
from mf_scale.distributed.env import World
from mf_scale.distributed.same_program import refuse_mixture
from mf_scale.errors import UserError
from mf_scale.evaluation.asked import asked
from mf_scale.evaluation.counting import PICTURE_SCORES, start_counts
from mf_scale.evaluation.forward import answer
from mf_scale.evaluation.loading import LoadedModel, load_checkpoint
from mf_scale.evaluation.looking import choose, look, summed_scores
from mf_scale.evaluation.results import Evaluation, bands_table, make_room, results_table, save_evaluation
from mf_scale.evaluation.troubles import named_samples, sample_trouble
from mf_scale.evaluation.turns import in_turns
from mf_scale.rundir import MANIFEST, RunDir, resolve_checkpoint

PICTURES = 6
"""Samples shown in the report: the first of the split."""
_PATIENCE = 1800.0
"""Seconds a rank waits for its peers: their shares of the images differ in size."""


def evaluate_run(path: str, overrides: Sequence[str], world: World, *, split: str) -> str:
    """Evaluate a run or checkpoint on its `split` source; writes results into the run and returns what to print."""
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
        assert evaluation is not None, "nothing can ask this evaluation to stop"
        if run is not None:
            save_evaluation(run, evaluation, step=loaded.step)
    tables = results_table([evaluation.results]), bands_table(evaluation.results)
    return "\n\n".join(table for table in tables if table)


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
    samples: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate on all ranks at the images' original size; every rank returns the same results.

    `samples`: the first ones of the source only (0: all). The ranks agree before every turn of images, over the CPU,
    whether one of them was asked to `stop`; then all return None. An error of one, on whatever it was, is one of all.

    semantic: mIoU; panoptic: mIoU, PQ and mask AP of the things; instance: mask AP, and PQ (stuff is void, so its
    predictions count as wrong only where things are). `pictures`: samples to draw, the first of the source and half as
    many of the best, the median and the worst. The model's mode is restored. Of a source that annotates only some of
    the model's classes, the others are not asked for, and are in no mean.
    """
    model, vocabulary, task = asked(model, index), index.vocabulary, config.data.task
    count = min(samples or index.samples, index.samples)
    began, was_training = time.monotonic(), model.training
    with ExitStack() as stack:
        counts = start_counts(vocabulary, config, stack)
        scores: list[tuple[int, float | None]] = []

        def count_one(turn: int, sample: EvalSample) -> None:
            position = turn * world.size + world.rank
            with sample_trouble(index, position % count):
                said = answer(model, sample.image, config)
                score = counts.add(position, sample, said, scored=pictures > 0) if sample.weight else None
            if pictures and sample.weight:
                scores.append((position, score))

        def count_own() -> bool:
            start = partial(eval_samples, index, config.data, rank=world.rank, world=world.size, samples=count)
            places = (place % max(count, 1) for place in itertools.count(world.rank, world.size))
            own = named_samples(start, index, places)
            with _progress_bar(count, split, progress and world.first) as bar, closing(own):
                return in_turns(own, count_one, stop, lambda: bar.update(min(world.size, count - bar.n)))

        model.eval()
        stack.callback(model.train, was_training)
        numbers = counts.results(stop) if comm.together(count_own) else None
        if numbers is None:
            return None
        seconds = time.monotonic() - began
        choices = choose(summed_scores(scores, count), pictures) if pictures else []
        shown = comm.together(lambda: look(model, index, config, world, choices, count))
    results = {"split": split, "task": task, "samples": count, **numbers}
    results |= {"images_per_second": round(count / seconds, 3), "picture_score": PICTURE_SCORES[task]}
    if index.way is not None:
        results["annotated"] = index.way.known.tolist()
    results |= {"class_names": vocabulary.names, "things": vocabulary.things}
    return Evaluation(comm.broadcast_object(results), shown)


def _open_source(loaded: LoadedModel, split: str) -> Index:
    """The index of the wanted source, checked against the checkpoint's vocabulary; raises UserError."""
    data = loaded.config.data
    if split == "train" and len(data.sources) > 0:
        raise UserError(
            f"the run has {len(data.sources)} training sources, an evaluation reads one",
            where=str(loaded.checkpoint),
            remedy=f"Name it as the validation source: --split val data.val={data.sources[0].index}",
        )
    train = SourceConfig(index=data.train) if data.train else None
    source = train if split == "train" else validation_source(data)
    if source is None:
        raise UserError(
            f"the run has no {split} source to evaluate on",
            where=str(loaded.checkpoint),
            remedy=f"Name one: data.{split}=FOLDER.",
        )
    index = open_other(source, data, loaded.vocabulary, f"data.{split}")
    verify_shards(index, checksums=False)
    return index


def _progress_bar(samples: int, split: str, shown: bool) -> tqdm[Any]:
    every = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(total=samples, desc=f"evaluate {split}", unit="image", disable=not shown, mininterval=every)
