"""Samples: the bytes of one sample in a tar -> its members. Nothing is unpickled.

The only webdataset import of mf_scale.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAP_SUFFIX = re.compile(r"seg(\d*)\.png")
"""`seg.png` is layer 0 of the segment map, `seg1.png` layer 1, and so on."""


class BadSample(Exception):  # noqa: N818 - a finding about the data that the reader answers, not a failure of the program
    """A sample that will not decode however often it is read; the text is the reason."""


@dataclass(frozen=True)
class RawSample:
    """The members of a sample, as they lie in the shard."""

    key: str
    image: bytes
    maps: list[bytes]
    """PNG of each layer, layer 0 first."""
    meta: dict[str, Any]
    """height, width, segments, origin."""


def parse_sample(data: bytes, key: str) -> RawSample:
    """Take apart the tar members of sample `key`; BadSample for anything but exactly this sample, complete."""
    groups = list(_groups(data))
    keys = [group["__key__"] for group in groups]
    if keys != [key]:
        raise BadSample(f"its bytes hold the samples {keys[:3]} instead of {key!r}")
    members = {name: value for name, value in groups[0].items() if not name.startswith("__")}
    return assemble(key, members)


def assemble(key: str, members: dict[str, bytes]) -> RawSample:
    """Members by suffix -> raw sample; BadSample naming what is missing, double or unreadable."""
    images = [suffix for suffix in IMAGE_SUFFIXES if suffix in members]
    if len(images) != 1 or "json" not in members:
        raise BadSample(f"it needs one image and one json, it has {sorted(members)}")
    try:
        meta = json.loads(members["json"])
    except ValueError as error:
        raise BadSample(f"its json cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise BadSample("its json is not an object")
    layers = {int(found[1] or 0): value for name, value in members.items() if (found := MAP_SUFFIX.fullmatch(name))}
    if not layers or sorted(layers) != list(range(len(layers))):
        raise BadSample(f"its segment map has the layers {sorted(layers)}")
    return RawSample(key, members[images[0]], [layers[i] for i in range(len(layers))], meta)


def safe_member(name: str) -> str:
    """The name of a tar member; BadSample for an absolute path or one with `..`."""
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise BadSample(f"member name {name!r} leaves the shard")
    return name


def _groups(data: bytes) -> Iterator[dict[str, Any]]:
    """webdataset's own iteration and grouping over the members; what goes wrong in it is the sample's fault."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    try:
        files = tar_file_iterator(io.BytesIO(data), rename_files=safe_member)
        yield from group_by_keys({**file, "__url__": ""} for file in files)
    except BadSample:
        raise
    except Exception as error:  # tarfile raises many kinds on broken headers, webdataset ValueError on doubles
        raise BadSample(f"its tar members cannot be read: {type(error).__name__} {error}") from error
