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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mf_scale.errors import EXIT_USER, FaultError, StoppedOnRequest, UserError
from mf_scale.evaluation.forward import answer
from mf_scale.evaluation.prediction.ahead import ahead, in_background
from mf_scale.evaluation.prediction.begin import Work, look, prepare, refuse_to_overwrite
from mf_scale.evaluation.prediction.claims import Claims
from mf_scale.evaluation.prediction.commits import books_of, committed_parts
from mf_scale.evaluation.prediction.files import FileSource
from mf_scale.evaluation.prediction.find import Written, find, refused, write
from mf_scale.evaluation.prediction.finish import finish, tell
from mf_scale.evaluation.prediction.words import Item, Job, Loaded, Options, PartEnd, Share, counted
from mf_scale.evaluation.prediction.write import PartWriter
from mf_scale.rundir import RunDir, committed_checkpoints

READERS = 16
"""Threads that fetch and decode single files: a url waits for its server most of the time."""
BUDGET = 512 << 20
"""Bytes of decoded images, and of results, that wait at most; what is being made comes on top."""
NETWORK_IS_DOWN = 20
"""Images in a row that the network does not give: then it is the network, and the prediction is to go on later."""


ALONE = Share()


def predict_images(
    inputs: Sequence[str],
    run: str,
    out: str,
    options: Options,
    *,
    share: Share = ALONE,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Predict the inputs (files, folders, urls, lists, tars, a source) into folder `out`; the exit code.

    An image that cannot be read is quarantined and told at the end with exit code 2; where it is the only one it is
    the UserError. Raises StoppedOnRequest once `stop()`: the same call goes on behind the last committed part.
    Parts that another process is making are left to it. With `overwrite` what is there is removed, once all is checked.
    """
    with _said_once(share):
        if overwrite:
            refuse_to_overwrite(share)
        asked = look(inputs, run, out, options, overwrite)
    folder, source, plan, layout = asked.folder, asked.source, asked.plan, asked.identity["layout"]
    done = committed_parts(folder, layout) if plan else set()
    mine = [part for part in share.take(range(source.parts)) if part not in done]
    if mine:
        with _said_once(share):
            work = prepare(asked, mine)
        if plan is not None and share.first:
            print(f"going on with {work.loaded.checkpoint.name}: {len(done)} of {source.parts} parts are there")
        _predict_all(work, share, stop)
        plan, done = work.plan, committed_parts(folder, layout)
    if plan is None or len(done) < source.parts:
        if theirs := len(set(mine) - done):
            held = f"{counted(theirs, 'part')} of {source.parts:,} {'is' if theirs == 1 else 'are'} being made by"
            print(f"{held} another process; the one that ends last tells of all of them: {folder}")
        elif share.first and share.of > 1:
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


def _predict_all(work: Work, share: Share, stop: Callable[[], bool]) -> None:
    """Predict the parts of this process, and once more those that others held: these may have died meanwhile."""
    while work.parts and _predict(work, share, stop):
        done = committed_parts(work.folder, work.plan["layout"])
        work = replace(work, parts=[part for part in work.parts if part not in done])


def _predict(work: Work, share: Share, stop: Callable[[], bool]) -> int:
    """Predict and commit the parts of this process that nobody else holds; how many they were."""
    layout, made = work.plan["layout"], 0
    claims = Claims(books_of(work.folder, layout), layout)
    writer = PartWriter(work.folder, layout, claims, {"checkpoint": work.plan["checkpoint"]})
    threads = _threads(share)
    readers = ThreadPoolExecutor(READERS if isinstance(work.source, FileSource) else threads, "mf-predict-decode")
    writers = ThreadPoolExecutor(threads, "mf-predict-encode")
    pixels = work.loaded.config.data.max_pixels
    try:
        read = ahead(readers, _jobs(work, claims, pixels), 2 * threads + READERS, _bytes_of_image, BUDGET)
        with closing(in_background(read, 2, stop)) as images, _progress(work, share) as bar:
            written = ahead(writers, _answers(work, images), 2 * threads, _bytes_of_files, BUDGET)
            parts = iter(work.parts)
            part = next(parts, None)
            for result in written:
                if isinstance(result, PartEnd):
                    if result.theirs:
                        _shorten(bar, work.source.size(result.part))
                    else:
                        writer.commit(result.part)
                        made += 1
                    part = next(parts, None)
                elif part is not None:
                    writer.add(part, result)
                    bar.update()
        if part is not None:
            there = len(committed_parts(work.folder, layout))
            if share.first:
                print(f"stopped on request with {there:,} of {work.source.parts:,} parts: the same command goes on")
            raise StoppedOnRequest
    finally:
        writer.abandon()
        claims.close()
        for pool in (readers, writers):
            pool.shutdown(wait=False, cancel_futures=True)
    return made


def _jobs(work: Work, claims: Claims, max_pixels: int) -> Iterator[Job]:
    """What is to be read and decoded of the parts that can be claimed, with the ends of all parts."""
    for part in work.parts:
        ours = claims.take(part)
        if ours:
            yield from work.source.jobs(part, max_pixels)
        yield partial(list, [PartEnd(part, theirs=not ours)])


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


def _tell_before(plan: dict[str, Any], run: str) -> None:
    """All of it is there already: with which checkpoint, and whether there is a newer one."""
    checkpoint = Path(plan["checkpoint"])
    newer = [c.name for c in committed_checkpoints(RunDir(Path(run)))[:1] if c.name > checkpoint.name]
    hint = f", and the run has {newer[0]} by now" if newer else ""
    print(f"this was predicted before, with {checkpoint.name}{hint}; --overwrite predicts it anew")


def _threads(share: Share) -> int:
    """Threads for decoding, and for encoding: this process's share of the cores of its machine."""
    cores = len(os.sched_getaffinity(0))
    local = share.world if "LOCAL_RANK" in os.environ else 1  # under srun the cores are those of the task
    return max(2, cores // local)


def _bytes_of_image(image: Item) -> int:
    return image.pixels.nbytes if isinstance(image, Loaded) and image.pixels is not None else 0


def _bytes_of_files(written: Written | PartEnd) -> int:
    return sum(len(content) for _, content in written.files) if isinstance(written, Written) else 0


def _shorten(bar: tqdm[Any], images: int | None) -> None:
    if bar.total is not None and images is not None:
        bar.total -= images
        bar.refresh()


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
