"""Images given one by one: files, folders, urls and lists of them, as one ordered list. No torch here."""

from __future__ import annotations

import hashlib
import io
import mmap
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mf_scale.config.urls import redact
from mf_scale.data.decode import IMAGE_FORMATS, UNREADABLE
from mf_scale.data.single import SingleFiles, local_path
from mf_scale.errors import UserError
from mf_scale.evaluation.prediction.words import Job, Loaded, image_id_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Files taken from a folder."""
LONGEST_NAME = 180
"""Bytes of the name of a result: file systems take 255 with its ending and that of a temporary file."""


class Lines(Sequence[str]):
    """The lines of a list, read from the file when asked for; blank ones and those that begin with # do not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._first, self._size = array("q"), array("q")
        digest, at = hashlib.sha256(), 0
        with path.open("rb") as file:
            for line in file:
                digest.update(line)
                text = line.strip()
                if text and not text.startswith(b"#"):
                    self._first.append(at + line.index(text))
                    self._size.append(len(text))
                at += len(line)
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if at else None
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, i: Any) -> Any:
        assert self._data is not None
        first = self._first[i]
        return self._data[first : first + self._size[i]].decode("utf-8", "surrogateescape")


class FileSource:
    """Images by path or url."""

    def __init__(self, lists: Sequence[Sequence[str]], part_size: int, image_ids: str, named: bool) -> None:
        self._lists, self._ends = lists, list(accumulate(map(len, lists)))
        self.total = self._ends[-1] if lists else 0
        self.part_size, self._image_ids = part_size, image_ids
        self.parts = -(-self.total // part_size)
        self._names = result_names(self) if named else None
        self._files = SingleFiles()
        if image_ids == "names":
            refuse_ids(map(str, self))

    def __iter__(self) -> Iterator[str]:
        for some in self._lists:
            yield from some

    def __getitem__(self, position: int) -> str:
        number = bisect_right(self._ends, position)
        return self._lists[number][position - (self._ends[number - 1] if number else 0)]

    def identity(self) -> dict[str, Any]:
        """Of images named one by one: with size and time, so that a changed one is another; of lists: their bytes.

        A list may name millions, and a look at each would take hours; so of it only its own bytes count.
        """
        digest = hashlib.sha256()
        for some in self._lists:
            told = some.digest if isinstance(some, Lines) else "\n".join(map(_state_of, some))
            digest.update(told.encode("utf-8", "replace"))
        return {"kind": "images", "images": self.total, "digest": digest.hexdigest()}

    def size(self, part: int) -> int:
        return min(self.part_size, self.total - part * self.part_size)

    def jobs(self, part: int, max_pixels: int) -> Iterator[Job]:
        first = part * self.part_size
        for position in range(first, first + self.size(part)):
            yield partial(self._load, position, max_pixels)

    def names(self) -> list[str]:
        """What each image's result files are called, where they are named after it."""
        assert self._names is not None
        return self._names

    def load(self, position: int, max_pixels: int) -> Loaded:
        """Read and decode one image; what is wrong with it is its fault."""
        given = self[position]
        image_id = image_id_of(given, position, self._image_ids)
        name = self._names[position] if self._names else f"{image_id:012d}"
        shown = redact(given).encode("utf-8", "replace").decode()
        try:
            with urls_of_images():
                data = self._files.read(given)
            return Loaded(image_id, shown, name, decode_upright(data, max_pixels, shown))
        except UserError as error:
            return Loaded(image_id, shown, name, fault=error)

    def _load(self, position: int, max_pixels: int) -> list[Loaded]:
        return [self.load(position, max_pixels)]


@contextmanager
def urls_of_images() -> Iterator[None]:
    """What is refused of a url, told of an image: the sources of a training are refused by the same law."""
    try:
        yield
    except UserError as error:
        error.what = error.what.replace("the url of a source", "the url of an image")
        error.what = error.what.replace("sources of the kind", "urls of the kind")
        raise


def _state_of(given: str) -> str:
    """A path with what changes when its file does; of a url, or of a file that is not there, the name alone."""
    path = local_path(given)
    try:
        found = path.stat() if path is not None else None
    except (OSError, ValueError):
        found = None
    return f"{given} {found.st_size} {found.st_mtime_ns}" if found else given


def folder_images(folder: Path) -> list[str]:
    """The images directly in a folder, in order of name."""
    return [str(f) for f in sorted(folder.iterdir()) if f.suffix.lower() in SUFFIXES and f.is_file()]


def decode_upright(data: bytes, max_pixels: int, where: str) -> NDArray[np.uint8]:
    """The bytes of an image file as uint8 [H,W,3] RGB, upright (its EXIF orientation carried out).

    16-bit grey becomes its upper 8 bits, alpha is dropped. Raises UserError naming `where`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(
                    f"the image has {width}x{height} pixels, above the limit of {max_pixels}",
                    where=where,
                    remedy="Make it smaller.",
                )
            if width * height == 0:
                raise UserError(f"the image has no pixel ({width}x{height})", where=where, remedy="Leave it out.")
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
                return np.repeat((np.asarray(upright) >> 8).astype(np.uint8)[..., None], 3, axis=2)
            coloured = upright.convert("RGBA") if upright.mode == "P" else upright
            return np.asarray(coloured.convert("RGB"))
    except UNREADABLE as error:
        said = "it is of no kind that is read" if "cannot identify" in str(error) else str(error)
        raise UserError(
            f"this is no image that can be read: {said}", where=where, remedy="Give JPEG, PNG or WebP files."
        ) from error


def result_names(files: Iterable[str]) -> list[str]:
    """A name for each image's results: its stem, numbered where several share it or a result of all is called so."""
    taken = {"predict", "summary", "images", "panoptic", "semantic", "instances", "quarantine"}
    last: dict[str, int] = {}
    names = []
    for file in files:
        stem = Path(file.rstrip("/")).stem or "image"
        stem = stem.encode("utf-8", "replace")[:LONGEST_NAME].decode("utf-8", "ignore")
        name, number = stem, last.get(stem, 1)
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        last[stem] = number
        names.append(name)
    return names


def refuse_ids(names: Iterable[str]) -> None:
    """UserError where a name that is to be an image's id is no number, or stands twice."""
    ids = np.fromiter((image_id_of(name, 0, "names") for name in names), np.int64)
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise UserError(
            f"{int((counts > 1).sum())} numbers are the names of several images, such as {values[counts > 1][0]}",
            where="--image-ids names",
            remedy="Leave --image-ids names out.",
        )
