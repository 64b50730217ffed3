"""Samples: the bytes of one sample in a tar -> its members. Nothing is unpickled.

The only webdataset import of mf_scale.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mf_scale.data.ids import LabelMember

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAP_SUFFIX = re.compile(r"seg(\d*)\.png")
"""`seg.png` is layer 0 of the segment map, `seg1.png` layer 1, and so on."""

BLOCK = 512
"""Bytes of a tar header; members begin at multiples of it."""
NAME, SIZE, CHECKSUM, KIND, PREFIX = slice(0, 100), slice(124, 136), slice(148, 156), 156, 345
"""Fields of a header: bytes, and the first byte of the last two."""
REGULAR = ord("0")


class BadSample(Exception):  # noqa: N818 - a finding about the data that the reader answers, not a failure of the program
    """A sample that will not decode however often it is read; the text is the reason."""


@dataclass(frozen=True)
class RawSample:
    """The members of a sample, as they lie in the shard."""

    key: str
    image: bytes
    maps: list[bytes]
    """PNG of each layer, layer 0 first; of a sample made elsewhere the one PNG of label values."""
    meta: dict[str, Any]
    """height, width, segments, origin; empty for a sample made elsewhere."""


def parse_sample(data: bytes, key: str, labels: LabelMember | None = None) -> RawSample:
    """Take apart the tar members of sample `key`; BadSample for anything but exactly this sample, complete."""
    members = plain_members(data, key)
    if members is None:
        members = members_by_webdataset(data, key)
    return assemble(key, members, labels)


def plain_members(data: bytes, key: str) -> dict[str, bytes] | None:
    """Members by suffix where all are regular files of sample `key` under plain tar headers; else None.

    Whatever is out of the ordinary is left to `members_by_webdataset`, which finds the same in ten times the time.
    """
    name_in_folder = key.rpartition("/")[2]
    if not name_in_folder or "." in name_in_folder or key.startswith("__") or "\n" in key:
        return None
    members: dict[str, bytes] = {}
    at = 0
    while at < len(data) and any(header := data[at : at + BLOCK]):
        name, size = _plain_file(header)
        suffix = name[len(key) + 1 :].lower()
        own = name.startswith(key + ".") and "/" not in suffix and not suffix.startswith("__")
        first, at = at + BLOCK, at + BLOCK - (-size // BLOCK) * BLOCK
        if not own or suffix in members or at > len(data):
            return None
        safe_member(name)
        members[suffix] = data[first : first + size]
    return members or None


def _plain_file(header: bytes) -> tuple[str, int]:
    """Name and size in bytes of a regular file; name "" where the header is anything but a plain one of it."""
    try:
        size, checksum = (int(header[field].rstrip(b"\0 "), 8) for field in (SIZE, CHECKSUM))
        plain = len(header) == BLOCK and size >= 0 and header[KIND] == REGULAR and not header[PREFIX]
        if plain and checksum == sum(header) - sum(header[CHECKSUM]) + 8 * ord(" "):
            return header[NAME].partition(b"\0")[0].decode(), size
    except (ValueError, IndexError):  # no octal digits, no UTF-8, a header cut short
        pass
    return "", 0


def members_by_webdataset(data: bytes, key: str) -> dict[str, bytes]:
    """The same by webdataset's own iteration and grouping, for every tar there is: the reference."""
    groups = list(_groups(data))
    keys = [group["__key__"] for group in groups]
    if keys != [key]:
        raise BadSample(f"its bytes hold the samples {keys[:3]} instead of {key!r}")
    return {name: value for name, value in groups[0].items() if not name.startswith("__")}


def assemble(key: str, members: dict[str, bytes], labels: LabelMember | None = None) -> RawSample:
    """Members by suffix -> raw sample; BadSample naming what is missing, double or unreadable.

    With `labels`, a sample made elsewhere: one image and the PNG of values; all other members are left alone.
    """
    label = "" if labels is None else labels.suffix.lower()
    images = [suffix for suffix in IMAGE_SUFFIXES if suffix in members and suffix != label]
    needed = label or "json"
    if len(images) != 1 or needed not in members:
        raise BadSample(f"it needs one image and one {needed}, it has {sorted(members)}")
    image = members[images[0]]
    if labels is not None:
        return RawSample(key, image, [members[label]], {})
    meta = _read_meta(members["json"])
    layers = {int(found[1] or 0): value for name, value in members.items() if (found := MAP_SUFFIX.fullmatch(name))}
    if not layers or sorted(layers) != list(range(len(layers))):
        raise BadSample(f"its segment map has the layers {sorted(layers)}")
    return RawSample(key, image, [layers[i] for i in range(len(layers))], meta)


def _read_meta(data: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"its json cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise BadSample("its json is not an object")
    return meta


def safe_member(name: str) -> str:
    """The name of a tar member; BadSample for an absolute path or one with `..`."""
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise BadSample(f"member name {name!r} leaves the shard")
    return name


def webdataset_epoch(shards: Sequence[Path], buffer: int) -> Iterator[dict[str, Any]]:
    """Raw samples in webdataset's own shuffled order, of shards and in a buffer of samples: the benchmark's peer."""
    import webdataset

    urls = [str(shard) for shard in shards]
    return iter(webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(buffer))


def _groups(data: bytes) -> Iterator[dict[str, Any]]:
    """webdataset's own iteration and grouping over the members; what goes wrong in it is the sample's fault."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    try:
        _refuse_bombs(data)
        files = tar_file_iterator(io.BytesIO(data), rename_files=safe_member)
        yield from group_by_keys({**file, "__url__": ""} for file in files)
    except BadSample:
        raise
    except Exception as error:  # tarfile raises many kinds on broken headers, webdataset ValueError on doubles
        raise BadSample(f"its tar members cannot be read: {type(error).__name__} {error}") from error


def _refuse_bombs(data: bytes) -> None:
    """What webdataset would read to a thousand times its bytes: sparse members here, compressed tars in `open`."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if member.issparse():
                raise BadSample(f"member {member.name} is sparse")
