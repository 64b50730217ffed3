"""Troubles: what goes wrong in a rank's own work on one sample or class, named; and samples read under these names."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager

from mf_scale.data.index import Index
from mf_scale.data.loader import EvalSample
from mf_scale.errors import FaultError, UserError

_SMALLER_IMAGES = "A smaller eval.short_side or eval.max_side needs less memory."


@contextmanager
def named_trouble(name: Callable[[], str], *, where: str, remedy: str) -> Iterator[None]:
    """Turn what is no UserError (memory, a library) into a FaultError that begins with `name()`.

    For a rank's own work only: the others hear of a UserError when they next agree, a broken collective is no sample's.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they hold the tensors for which there was no room
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ").rstrip(".")
        raise FaultError(f"{name()} could not be evaluated: {said}", where=where, remedy=remedy) from error


@contextmanager
def sample_trouble(index: Index, position: int) -> Iterator[None]:
    """The same for the sample at `position` of the source."""
    with named_trouble(lambda: f"sample {index.sample(position).key}", where=index.source, remedy=_SMALLER_IMAGES):
        yield


def named_samples(
    start: Callable[[], Generator[EvalSample, None, None]], index: Index, positions: Iterable[int]
) -> Generator[EvalSample, None, None]:
    """The samples that `start` gives, as many as there are positions at most; it is called when the first is asked for.

    So whatever fails, fails where a sample is asked for. `positions`: where each lies in the source.
    """
    samples: Generator[EvalSample, None, None] | None = None
    try:
        for position in positions:
            with sample_trouble(index, position):
                samples = samples or start()
                sample = next(samples, None)
            if sample is None:
                return
            yield sample
    finally:
        if samples is not None:
            samples.close()
