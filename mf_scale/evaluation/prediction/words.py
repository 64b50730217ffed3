"""What a prediction is asked for, and what its parts are made of. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mf_scale.errors import UserError

TASKS = ("semantic", "panoptic", "instance")
FILES, PARTS = "files", "parts"
"""How results are laid out: three files an image for a person, or tars and JSON lines for millions."""
IMAGE_IDS = ("positions", "names")


@dataclass(frozen=True)
class Options:
    """What a person may choose of a prediction."""

    task: str = "panoptic"
    overrides: tuple[str, ...] = ()
    """Of the checkpoint's configuration."""
    overlay: bool | None = None
    """Draw overlays; None: where results are laid out for a person."""
    classes: tuple[str, ...] = ()
    """The classes that overlays show, with their legend; empty: all."""
    part_size: int | None = None
    """Images of a part; None: by what is given."""
    image_ids: str = "positions"
    """image_id of COCO's files: the place in the input from 1, or the number that is the image's name."""
    merge: bool | None = None
    """Write one COCO file of everything; None: up to MERGED images."""


@dataclass(frozen=True)
class Share:
    """Which of a prediction's parts this process takes: every N-th, of these every W-th."""

    number: int = 0
    of: int = 1
    rank: int = 0
    world: int = 1

    def take(self, parts: range) -> range:
        """Its parts of all."""
        return parts[self.number :: self.of][self.rank :: self.world]

    @property
    def alone(self) -> bool:
        """True where this process does everything."""
        return self.of == self.world == 1

    @property
    def first(self) -> bool:
        """True for the process of its start that says what all would say."""
        return self.rank == 0


@dataclass(frozen=True)
class Loaded:
    """One image of the input, decoded in the background."""

    image_id: int
    file_name: str
    """As a person knows it: path, url without secrets, or the key in its shard."""
    name: str
    """What its result files are called."""
    pixels: NDArray[np.uint8] | None = None
    """uint8 [H,W,3] RGB; None: see `fault`."""
    fault: UserError | None = None


@dataclass(frozen=True)
class PartEnd:
    """Behind the last image of a part."""

    part: int
    theirs: bool = False
    """Another process makes it or has made it: none of its images came."""


Item = Loaded | PartEnd
Job = Callable[[], Sequence[Item]]
"""Decodes (and for single files reads) a few images; may run in any thread."""


class Source(Protocol):
    """The input of a prediction: an ordered list of images, cut into parts."""

    @property
    def parts(self) -> int:
        """How many there are."""

    @property
    def part_size(self) -> int:
        """Images of a part, but the last; 0: only reading tells."""

    @property
    def total(self) -> int | None:
        """Images; None: only reading tells."""

    def identity(self) -> dict[str, Any]:
        """What tells this input from another one, as JSON."""

    def size(self, part: int) -> int | None:
        """Images of a part; None: only reading tells."""

    def jobs(self, part: int, max_pixels: int) -> Iterator[Job]:
        """What there is to do for a part's images, in order; one thread asks for it."""


def counted(number: int, thing: str) -> str:
    """1 image, 2,000 images."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def image_id_of(name: str, position: int, image_ids: str) -> int:
    """The id of an image for COCO's files; UserError where its name is to be the number and is none."""
    if image_ids == "positions":
        return position + 1
    stem = name.rpartition("/")[2].partition(".")[0]
    if not (stem.isascii() and stem.isdecimal() and len(stem) <= 18):
        raise UserError(
            f"the image's name {stem!r} is no number, so it cannot be its id",
            where=name,
            remedy="Leave --image-ids names out.",
        )
    return int(stem)
