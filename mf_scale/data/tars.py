"""Tars without an index: their images in the order they lie there, read once from front to back, local or remote."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

from mf_scale.data.samples import IMAGE_SUFFIXES, BadSample, safe_member
from mf_scale.data.single import MOST_BYTES
from mf_scale.data.storage import Storage

AT_ONCE = 4 << 20
"""Bytes of one read."""
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
"""KEY.SUFFIX, as webdataset has it: the key ends at the first dot of the file's name."""
META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset's reader leaves out."""


@dataclass
class TarImage:
    """One sample of a tar: its image as it lies there, or why there is none."""

    key: str
    image: bytes = b""
    fault: str = ""
    suffixes: list[str] = field(default_factory=list)
    """Of all its members."""


def tar_images(storage: Storage, name: str, size: int) -> Iterator[TarImage]:
    """Every run of members with one key: one image each, whatever else lies beside it.

    What is wrong with the tar itself is the fault of a last sample with key "". Raises as `Storage.read`.
    """
    current: TarImage | None = None
    with _Forward(_Bytes(storage, name, size), AT_ONCE) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep millions of them
                    if member.isdir() or META.match(member.name):
                        continue
                    found = NAME.fullmatch(member.name)
                    key, suffix = (found[1], found[2].lower()) if found else (member.name, "")
                    if current is not None and current.key != key:
                        yield _complete(current)
                        current = None
                    current = current or TarImage(key)
                    _take(current, suffix, tar, member)
                if current is not None:
                    yield _complete(current)
                    current = None
                _check_end(file, tar.offset, size)
        except (tarfile.TarError, EOFError, OverflowError, RecursionError, ValueError) as error:
            if current is not None:
                yield _complete(current)
            reason = "thousands of headers for one long name" if isinstance(error, RecursionError) else str(error)
            yield TarImage("", fault=f"the tar cannot be read to its end: {reason}")


def _take(sample: TarImage, suffix: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Add a member to its sample."""
    sample.suffixes.append(suffix)
    try:
        safe_member(member.name)
    except BadSample as bad:
        sample.fault = str(bad)
        return
    if suffix not in IMAGE_SUFFIXES or sample.fault:
        return
    if not member.isreg() or member.issparse():
        sample.fault = f"member {member.name} is a link, a device or sparse"
    elif member.size > MOST_BYTES:
        sample.fault = f"its image has {member.size / 2**20:,.0f} MiB, above the limit of {MOST_BYTES >> 20} MiB"
    elif stream := tar.extractfile(member):
        sample.image = stream.read()
        if len(sample.image) < member.size:
            sample.fault = f"the tar ends inside {member.name}"


def _complete(sample: TarImage) -> TarImage:
    images = [suffix for suffix in sample.suffixes if suffix in IMAGE_SUFFIXES]
    if len(images) != 1 and not sample.fault:
        sample.fault = f"a sample needs one image ({', '.join(IMAGE_SUFFIXES)}), it has {sorted(sample.suffixes)}"
    if not sample.image and not sample.fault:
        sample.fault = "its image is empty, or the tar ends in it"
    return sample


def _check_end(file: io.BufferedReader, offset: int, size: int) -> None:
    """Behind the last member zeros must stand, and only these: tarfile takes a broken header, and none, for the end."""
    if size < offset + tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends without an end block: cut, or its writer was killed")
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"the header at byte {offset} is broken")
    while rest := file.read(AT_ONCE):
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"it goes on behind its end at byte {offset}, like tars joined by `cat`")


class _Bytes(io.RawIOBase):
    """A file of a storage."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        super().__init__()
        self._storage, self._name, self.size, self._at = storage, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self.size - self._at))
        if wanted:
            buffer[:wanted] = self._storage.read(self._name, self._at, wanted)
            self._at += wanted
        return wanted


class _Forward(io.BufferedReader):
    """Asked for no more than the file has: Python makes room for all that a header claims before it reads."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self.raw.size - self.tell())  # type: ignore[attr-defined]
        return super().read(left if size is None or size < 0 else min(size, left))
