"""Images in shards: of a source with an index, or of plain tars, which are read from front to back. No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from mf_scale.config.urls import redact
from mf_scale.data.decode import decode_image
from mf_scale.data.index import Index, verify_shards
from mf_scale.data.samples import BadSample, parse_sample
from mf_scale.data.single import SingleFiles
from mf_scale.data.tars import TarImage, tar_images
from mf_scale.errors import UserError
from mf_scale.evaluation.prediction.files import decode_upright, refuse_ids
from mf_scale.evaluation.prediction.words import Job, Loaded, image_id_of

GROUP_SAMPLES, GROUP_BYTES = 16, 8 << 20
"""Neighbouring samples of a shard that are read in one go, at most."""
TAR_ROOM = 10_000_000
"""Samples of a plain tar at most: image ids of the next one begin there."""


class IndexSource:
    """The samples of a source with an index, in its order, as they lie there (annotations are made on them so)."""

    def __init__(self, index: Index, part_size: int, image_ids: str) -> None:
        self.index, self.part_size, self._image_ids = index, part_size, image_ids
        self.total = index.samples
        self.parts = -(-self.total // part_size)
        self._keys = index.table.column("key").chunk(0)
        self._offset, self._size, self._shard = (index.column(name) for name in ("offset", "size", "shard"))
        if image_ids == "names":
            refuse_ids(key.as_py() for key in self._keys)

    def identity(self) -> dict[str, Any]:
        return {"kind": "shards", "images": self.total, "digest": self.index.digest}

    def check(self) -> None:
        """UserError where a shard is not there with the size that the index says."""
        verify_shards(self.index, checksums=False)

    def size(self, part: int) -> int:
        return min(self.part_size, self.total - part * self.part_size)

    def jobs(self, part: int, max_pixels: int) -> Iterator[Job]:
        first = part * self.part_size
        end = first + self.size(part)
        while first < end:
            last = self._group(first, end)
            shard, offset = self.index.shards[int(self._shard[first])].name, int(self._offset[first])
            size = int(self._offset[last - 1] + self._size[last - 1]) - offset
            yield partial(self._decode, first, last, self.index.storage.read(shard, offset, size), max_pixels)
            first = last

    def _group(self, first: int, end: int) -> int:
        """Behind the last sample that is read together with `first`."""
        last = first + 1
        while (
            last < min(end, first + GROUP_SAMPLES)
            and self._shard[last] == self._shard[first]
            and self._offset[last] + self._size[last] - self._offset[first] <= GROUP_BYTES
        ):
            last += 1
        return last

    def _decode(self, first: int, last: int, data: bytes, max_pixels: int) -> list[Loaded]:
        return [
            self._decode_one(i, data, int(self._offset[i] - self._offset[first]), max_pixels)
            for i in range(first, last)
        ]

    def _decode_one(self, i: int, data: bytes, at: int, max_pixels: int) -> Loaded:
        key = self._keys[i].as_py()
        image_id = image_id_of(key, i, self._image_ids)
        try:
            raw = parse_sample(data[at : at + int(self._size[i])], key, self.index.labels)
            pixels = decode_image(raw.image, max_pixels)
            if not pixels.size:
                raise BadSample("its image has no pixel")
            return Loaded(image_id, key, f"{image_id:012d}", pixels)
        except BadSample as bad:
            shard = self.index.shards[int(self._shard[i])].name
            return Loaded(image_id, key, "", fault=UserError(str(bad), where=f"{key} in {shard}"))


class TarSource:
    """The images of plain tars, upright. A tar is a part: where its images lie only reading it tells."""

    def __init__(self, tars: Sequence[str], image_ids: str) -> None:
        self._files, self._image_ids = SingleFiles(), image_ids
        self.tars = list(tars)
        self.parts, self.part_size, self.total = len(self.tars), 0, None
        self._sizes = [self._size_of(tar) for tar in self.tars]

    def identity(self) -> dict[str, Any]:
        listed = [f"{size} {tar}" for tar, size in zip(self.tars, self._sizes, strict=True)]
        return {"kind": "tars", "tars": self.parts, "digest": hashlib.sha256("\n".join(listed).encode()).hexdigest()}

    def size(self, part: int) -> None:
        return None

    def jobs(self, part: int, max_pixels: int) -> Iterator[Job]:
        storage, name = self._files.place(self.tars[part])
        for number, sample in enumerate(tar_images(storage, name, self._sizes[part])):
            if number >= TAR_ROOM:
                raise UserError(
                    f"the tar holds more than {TAR_ROOM:,} samples", where=redact(self.tars[part]), remedy="Cut it."
                )
            yield partial(self._decode, part, number, sample, max_pixels)

    def _decode(self, part: int, number: int, sample: TarImage, max_pixels: int) -> list[Loaded]:
        tar = redact(self.tars[part])
        position = part * TAR_ROOM + number
        try:
            if sample.fault:
                raise UserError(sample.fault, where=f"{sample.key} in {tar}" if sample.key else tar)
            image_id = image_id_of(sample.key, position, self._image_ids)
            pixels = decode_upright(sample.image, max_pixels, f"{sample.key} in {tar}")
        except UserError as error:
            return [Loaded(position + 1, sample.key or tar, "", fault=error)]
        return [Loaded(image_id, sample.key, f"{image_id:012d}", pixels)]

    def _size_of(self, tar: str) -> int:
        storage, name = self._files.place(tar)
        return storage.size(name)
