"""Prediction: images by files, lists or shards -> overlays, maps and segments, in parts that are each done once.

The parts are cut by the input alone and every part is one process's, so the results do not depend on how many
processes there are. The plan in the output folder is all that they agree on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mf_scale.errors import EXIT_USER, FaultError, StoppedOnRequest, UserError
from mf_scale.evaluation.forward import answer
from mf_scale.evaluation.loading import LoadedModel, load_checkpoint
from mf_scale.evaluation.prediction.ahead import ahead, in_background
from mf_scale.evaluation.prediction.files import FileSource
from mf_scale.evaluation.prediction.find import Look, Written, categories, find, refused, write
from mf_scale.evaluation.prediction.finish import finish, tell, thresholds_of
from mf_scale.evaluation.prediction.input import open_input
from mf_scale.evaluation.prediction.plan import identity_of, planned_checkpoint, refuse_other, write_plan
from mf_scale.evaluation.prediction.shards import IndexSource
from mf_scale.evaluation.prediction.words import Item, Job, Loaded, Options, PartEnd, Share, Source
from mf_scale.evaluation.prediction.write import PartWriter, committed_parts
from mf_scale.rundir import RunDir, committed_checkpoints, resolve_checkpoint

READERS = 16
"""Threads that fetch and decode single files: a url waits for its server most of the time."""
BUDGET = 512 << 20
"""Bytes of decoded images, and of results, that wait at most; what is being made comes on top."""
NETWORK_IS_DOWN = 20
"""Images in a row that the network does not give: then it is the network, and the prediction is to go on later."""


ALONE = Share()


@dataclass(frozen=True)
class Work:
    """A prediction ready to go on."""

    folder: Path
    plan: dict[str, Any]
    source: Source
    loaded: LoadedModel
    look: Look
    parts: list[int]
    """Of this process, and not committed."""


def predict_images(
    inputs: Sequence[str],
    run: str,
    out: str,
    options: Options,
    *,
    share: Share = ALONE,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Predict the inputs (files, folders, urls, lists, tars, a source) into folder `out`; the exit code.

    An image that cannot be read is quarantined and told at the end with exit code 2; where it is the only one it is
    the UserError. Raises StoppedOnRequest once `stop()`: the same call goes on behind the last committed part.
    """
    folder = Path(out)
    with _said_once(share):
        source, layout = open_input(inputs, options)
        identity = identity_of(run, source, layout, options)
        plan = refuse_other(folder, identity, source)
    done = committed_parts(folder, layout) if plan else set()
    mine = [part for part in share.take(range(source.parts)) if part not in done]
    if mine:
        with _said_once(share):
            work = _prepare(folder, plan, identity, source, run, options, mine)
        if plan is not None and share.first:
            print(f"going on with {work.loaded.checkpoint.name}: {len(done)} of {source.parts} parts are there")
        _predict(work, share, stop)
        plan, done = work.plan, committed_parts(folder, layout)
    if plan is None or len(done) < source.parts:
        if share.first and share.of > 1:
            print(f"share {share.number} of {share.of} is done; the one that ends last tells of all of them: {folder}")
        return 0
    if not mine and share.first:
        _tell_before(plan, run)
    return tell(folder, plan, finish(folder, plan, source.parts, options.merge))


@contextmanager
def _said_once(share: Share) -> Iterator[None]:
    """Around what all processes of a start do alike: a mistake of the user is said by one of them."""
    try:
        yield
    except UserError as error:
        error.said_by_first_rank = not share.first and error.exit_code == EXIT_USER
        raise


def _prepare(
    folder: Path,
    plan: dict[str, Any] | None,
    identity: dict[str, Any],
    source: Source,
    run: str,
    options: Options,
    mine: list[int],
) -> Work:
    """Load the model and write the plan; whatever can be refused is refused before anything is written."""
    run_dir, checkpoint = resolve_checkpoint(run) if plan is None else (None, planned_checkpoint(plan))
    loaded = load_checkpoint(run_dir, checkpoint, options.overrides, _device())
    look = Look(loaded.vocabulary, bool(identity["overlay"]), _shown(loaded, options))
    _refuse_task(loaded, options.task)
    if plan is None:
        _refuse_only(source, loaded)
        if isinstance(source, IndexSource):
            source.check()
        told = {"categories": categories(loaded.vocabulary), "limits": thresholds_of(options.task, loaded.config.eval)}
        plan = write_plan(folder, identity, checkpoint, told)
        if plan["checkpoint"] != str(checkpoint):  # another process was faster, and the run went on meanwhile
            loaded = load_checkpoint(None, planned_checkpoint(plan), options.overrides, _device())
    return Work(folder, plan, source, loaded, look, mine)


def _predict(work: Work, share: Share, stop: Callable[[], bool]) -> None:
    """Predict and commit the parts of this process."""
    writer = PartWriter(work.folder, work.plan["layout"], {"checkpoint": work.plan["checkpoint"]})
    threads = _threads(share)
    readers = ThreadPoolExecutor(READERS if isinstance(work.source, FileSource) else threads, "mf-predict-decode")
    writers = ThreadPoolExecutor(threads, "mf-predict-encode")
    pixels = work.loaded.config.data.max_pixels
    try:
        read = ahead(readers, _jobs(work, pixels), 2 * threads + READERS, _bytes_of_image, BUDGET)
        with closing(in_background(read, 2, stop)) as images, _progress(work, share) as bar:
            written = ahead(writers, _answers(work, images), 2 * threads, _bytes_of_files, BUDGET)
            parts = iter(work.parts)
            part = next(parts, None)
            for result in written:
                if isinstance(result, PartEnd):
                    writer.commit(result.part)
                    part = next(parts, None)
                elif part is not None:
                    writer.add(part, result)
                    bar.update()
        if part is not None:
            there = len(committed_parts(work.folder, work.plan["layout"]))
            if share.first:
                print(f"stopped on request with {there:,} of {work.source.parts:,} parts: the same command goes on")
            raise StoppedOnRequest
    finally:
        writer.abandon()
        for pool in (readers, writers):
            pool.shutdown(wait=False, cancel_futures=True)


def _jobs(work: Work, max_pixels: int) -> Iterator[Job]:
    """What is to be read and decoded, with the ends of the parts."""
    for part in work.parts:
        yield from work.source.jobs(part, max_pixels)
        yield partial(list, [PartEnd(part)])


def _answers(work: Work, images: Iterator[Item]) -> Iterator[Callable[[], list[Written | PartEnd]]]:
    """Run the model on each image; what is left to do for its files, which needs no model."""
    unreachable = 0
    for image in images:
        if isinstance(image, PartEnd):
            yield partial(list, [image])
            continue
        if image.pixels is None:
            unreachable = unreachable + 1 if isinstance(image.fault, FaultError) else 0
            if unreachable >= NETWORK_IS_DOWN and image.fault is not None:
                raise FaultError(
                    f"{unreachable} images in a row could not be reached; the last one: {image.fault.what}",
                    where=image.fault.where,
                    remedy="Check the network; the same command goes on.",
                )
            yield partial(_listed, refused, image)
            continue
        unreachable = 0
        said = answer(work.loaded.model, image.pixels, work.loaded.config)
        found = find(said, work.plan["task"], work.loaded.vocabulary, work.loaded.config)
        yield partial(_listed, write, image, found, work.look)


def _listed(act: Callable[..., Written], *arguments: Any) -> list[Written | PartEnd]:
    return [act(*arguments)]


def _refuse_task(loaded: LoadedModel, task: str) -> None:
    where = str(loaded.checkpoint)
    if loaded.config.model.kind.startswith("per_pixel") and task != "semantic":
        raise UserError(
            "a per-pixel model gives every pixel a class and knows no segments",
            where=where,
            remedy="Use --task semantic.",
        )
    if task == "instance" and not any(loaded.vocabulary.things):
        raise UserError(
            f"vocabulary {loaded.vocabulary.name!r} has no thing class, so there are no instances to find",
            where=where,
            remedy="Use --task semantic or panoptic.",
        )


def _refuse_only(source: Source, loaded: LoadedModel) -> None:
    """Where one image is all there is, what is wrong with it is the answer, and no folder is made."""
    if source.total == 1 and isinstance(source, FileSource):
        fault = source.load(0, loaded.config.data.max_pixels).fault
        if fault is not None:
            raise fault


def _shown(loaded: LoadedModel, options: Options) -> frozenset[int]:
    """The labels of the classes that a person wants to see."""
    names = loaded.vocabulary.names
    for name in options.classes:
        if name not in names:
            close = get_close_matches(name, names, 2)
            raise UserError(
                f"there is no class {name!r}",
                where=f"vocabulary {loaded.vocabulary.name!r}",
                remedy=f"Did you mean {' or '.join(close)}?" if close else "The run's vocabulary.json lists them all.",
            )
    return frozenset(names.index(name) for name in options.classes)


def _tell_before(plan: dict[str, Any], run: str) -> None:
    """All of it is there already: with which checkpoint, and whether there is a newer one."""
    checkpoint = Path(plan["checkpoint"])
    newer = [c.name for c in committed_checkpoints(RunDir(Path(run)))[:1] if c.name > checkpoint.name]
    hint = f", and the run has {newer[0]} by now" if newer else ""
    print(f"this was predicted before, with {checkpoint.name}{hint}; --overwrite predicts it anew")


def _device() -> torch.device:
    """The GPU of this rank; several ranks may share one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return torch.device("cuda", local % torch.cuda.device_count())


def _threads(share: Share) -> int:
    """Threads for decoding, and for encoding: this process's share of the cores of its machine."""
    cores = len(os.sched_getaffinity(0))
    local = share.world if "LOCAL_RANK" in os.environ else 1  # under srun the cores are those of the task
    return max(2, cores // local)


def _bytes_of_image(image: Item) -> int:
    return image.pixels.nbytes if isinstance(image, Loaded) and image.pixels is not None else 0


def _bytes_of_files(written: Written | PartEnd) -> int:
    return sum(len(content) for _, content in written.files) if isinstance(written, Written) else 0


def _progress(work: Work, share: Share) -> tqdm[Any]:
    sizes = [work.source.size(part) for part in work.parts]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    name = "predict" if share.alone else f"predict, process {share.rank + 1} of {share.world}"
    return tqdm(
        total=total,
        desc=name,
        unit="image",
        disable=not share.first,
        mininterval=0.2 if sys.stderr.isatty() else 15.0,
    )
