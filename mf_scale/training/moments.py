"""Adam's moments on disk: named fragments that any number of ranks at any ZeRO stage writes and reads.

A tensor named `exp_avg/4096/backbone.stem.weight` holds the values of that parameter's first moment from element 4096.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mf_scale.distributed.engine import Fragment
from mf_scale.errors import UserError


class _Piece(NamedTuple):
    start: int
    length: int
    file: Path
    key: str


def moments_file(rank: int, world: int) -> str:
    """File name of one rank's share."""
    return f"optimizer-{rank:05d}-of-{world:05d}.safetensors"


def write_moments(fragments: Iterable[Fragment], file: Path) -> None:
    """Write this rank's fragments (fp32)."""
    from safetensors.torch import save_file

    tensors = {}
    for fragment in fragments:
        for moment, values in fragment.moments.items():
            # A view into the optimizer's flat memory: copied, since safetensors wants tensors that own their memory.
            tensors[f"{moment}/{fragment.start}/{fragment.name}"] = values.detach().cpu().clone()
    save_file(tensors, file)


def read_moments(fragments: Iterable[Fragment], folder: Path) -> None:
    """Overwrite the fragments in place from a checkpoint folder, whoever wrote it; raises UserError for a gap."""
    from safetensors import safe_open

    pieces = _pieces(folder)
    for fragment in fragments:
        for moment, values in fragment.moments.items():
            filled = 0
            for piece in pieces.get((moment, fragment.name), ()):
                low = max(piece.start, fragment.start)
                high = min(piece.start + piece.length, fragment.start + values.numel())
                if low < high:
                    with safe_open(piece.file, framework="pt") as source:
                        part: Tensor = source.get_slice(piece.key)[low - piece.start : high - piece.start]
                    values[low - fragment.start : high - fragment.start].copy_(part)
                    filled += high - low
            if filled != values.numel():
                raise UserError(
                    f"the checkpoint holds {filled} of {values.numel()} elements of {moment} of {fragment.name}",
                    where=str(folder),
                    remedy="Another model wrote it: start a new run_dir with train.init_from.",
                )


def _pieces(folder: Path) -> dict[tuple[str, str], list[_Piece]]:
    from safetensors import safe_open

    found: dict[tuple[str, str], list[_Piece]] = {}
    for file in sorted(folder.glob("optimizer-*.safetensors")):
        with safe_open(file, framework="pt") as source:
            for key in source.keys():  # noqa: SIM118 - not a dictionary
                moment, start, name = key.split("/", 2)
                length = source.get_slice(key).get_shape()[0]
                found.setdefault((moment, name), []).append(_Piece(int(start), length, file, key))
    return found
