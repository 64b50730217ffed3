"""Small packed sources for tests: images whose pixels tell which sample they are."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm
from webdataset.writer import TarWriter

from data_tools.encode import encode_map, stored_values
from data_tools.index import Meaning, index_source
from mf_scale.config.schema import Config, DataConfig, SourceConfig
from mf_scale.data.batch import NONE
from mf_scale.data.index import Index
from mf_scale.data.sources import continue_order
from mf_scale.data.state import DataState
from mf_scale.vocabulary import ClassInfo, Vocabulary

VOCABULARY = Vocabulary("test", tuple(ClassInfo(f"class{i}", i < 4, 10 + i) for i in range(6)))
"""Six classes: 0 to 3 things, 4 and 5 stuff."""


def jpeg(number: int, height: int, width: int) -> bytes:
    noise = np.random.Generator(np.random.PCG64(number)).integers(
        0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8
    )
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def sample_members(number: int, key: str, layers: int = 1) -> dict[str, bytes | str]:
    """A sample with stuff above, two things of different classes and a crowd below, an unlabelled edge."""
    height, width = 40 + number % 3 * 8, 56
    segment_map = np.full((layers, height, width), NONE, np.int32)
    segment_map[0, : height // 2] = 0
    segment_map[0, height // 2 :, : width // 3] = 1
    segment_map[0, height // 2 :, width // 3 : width // 2] = 2
    segment_map[0, height // 2 :, width // 2 : -4] = 3
    labels = [4 + number % 2, number % 4, (number + 1) % 4, number % 4]
    segments = [
        {"label": label, "layer": 0, "thing": label < 4, "crowd": i == 3, "source_id": i}
        for i, label in enumerate(labels)
    ]
    if layers > 1:
        segment_map[1, 4:12, 4:12] = 4
        segments.append({"label": 2, "layer": 1, "thing": True, "crowd": False, "source_id": 4})
    meta = {"height": height, "width": width, "segments": segments, "origin": {"number": number}}
    stored = stored_values(segment_map, len(segments))
    maps: dict[str, bytes | str] = {f"seg{layer or ''}.png": encode_map(stored[layer]) for layer in range(layers)}
    return {"__key__": key, "jpg": jpeg(number, height, width), "json": json.dumps(meta).encode(), **maps}


def write_shard(path: Path, samples: Sequence[dict[str, bytes | str]]) -> None:
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for sample in samples:
            writer.write(sample)


def make_source(
    folder: Path, shard_samples: Sequence[int], *, truncated: Collection[int] = (), layers: int = 1, **treatment: str
) -> Index:
    """A source of keys s000, s001, …; the images of `truncated` samples end early."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(shard_samples):
        samples = []
        for i in range(number, number + count):
            members = sample_members(i, f"s{i:03d}", layers)
            if i in truncated:
                members["jpg"] = members["jpg"][:200]
            samples.append(members)
        write_shard(folder / f"part-{shard:03d}.tar", samples)
        number += count
    meaning = Meaning(**{"crowd": "none", "unlabelled": "none", **treatment})  # type: ignore[arg-type]
    index_source(folder, VOCABULARY, meaning, progress=partial(tqdm, disable=True))
    return Index.open(folder)


def small_config(**changes: object) -> DataConfig:
    settings: dict[str, object] = {"crop": [32, 32], "workers": 0, "block_samples": 4, **changes}
    return DataConfig(**settings)  # type: ignore[arg-type]


def open_state(
    indexes: Index | Sequence[Index],
    config: DataConfig,
    global_batch: int,
    seed: int = 0,
    weights: Sequence[float] = (),
) -> DataState:
    """The data state of a run on one or several sources at its first step."""
    indexes = [indexes] if isinstance(indexes, Index) else indexes
    weights = weights or [1.0] * len(indexes)
    sources = [SourceConfig(index.source, weight) for index, weight in zip(indexes, weights, strict=True)]
    whole = Config(seed=seed, data=replace(config, train=None, sources=sources))
    whole.train.global_batch = global_batch
    return continue_order(whole, indexes, None, 0)[0]


@contextlib.contextmanager
def changed_bytes(path: Path, offset: int, data: bytes):
    """Overwrite a few bytes of a file for the duration."""
    before = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(before[:offset] + data + before[offset + len(data) :])
    yield
    path.write_bytes(before)
