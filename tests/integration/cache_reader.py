"""A process that reads random ranges of a source through a cache and compares them: URL FOLDER LIMIT SEED READS [die].

It ends with the bytes that it had wrong. With `die` it kills itself when it is about to give its third piece its name.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np

from mf_scale.data import cache, pieces
from mf_scale.data.cache import CachedStorage, CacheSettings, Content

PIECE = 16 << 10
DATA = np.random.Generator(np.random.PCG64(5)).bytes((2 << 20) + 4321)
SHARDS = {"a.tar": Content("c" * 64, len(DATA)), "b.tar": Content("d" * 64, len(DATA))}


def main(url: str, folder: str, limit: str, seed: str, reads: str, die: str = "") -> None:
    cache.PIECE = pieces.PIECE = PIECE
    if die:
        replace, published = Path.replace, []

        def publish(partial: Path, target: Path) -> Path:
            published.append(target)
            if len(published) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(partial, target)

        Path.replace = publish  # type: ignore[assignment, method-assign]
    storage = CachedStorage(url, CacheSettings(folder, int(limit)), SHARDS)
    generator = np.random.Generator(np.random.PCG64(int(seed)))
    wrong = 0
    for _ in range(int(reads)):
        start = int(generator.integers(0, len(DATA) - 1))
        size = int(generator.integers(1, min(4 * PIECE, len(DATA) - start) + 1))
        wrong += storage.read(str(generator.choice(list(SHARDS))), start, size) != DATA[start : start + size]
    print(f"wrong {wrong}")


if __name__ == "__main__":
    main(*sys.argv[1:])
