"""A checkpoint's tensors by name, whoever wrote them: whole ones, and pieces of those that were partitioned over ranks.

Whole tensors stand in weights.safetensors and ema.safetensors under their own names. A piece stands in the file of the
rank that owned it, named `KIND/START/NAME`: `exp_avg/4096/backbone.stem.weight` holds the values of that parameter's
first moment from element 4096 of the flattened parameter on. So any layout of ranks and ZeRO stages reads what any
other one wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mf_scale.errors import UserError
from mf_scale.rundir import EMA, WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT, AVERAGE = "weight", "ema"
"""Kinds that have a whole file too."""
_WHOLE_FILES = {WEIGHT: WEIGHTS, AVERAGE: EMA}
_SHAPES = "shapes"


@dataclass(frozen=True)
class Fragment:
    """This rank's share of one parameter and of what belongs to it."""

    name: str
    """The parameter's name."""
    start: int
    """First element of the flattened parameter."""
    values: dict[str, Tensor]
    """Kind (weight, ema, exp_avg, exp_avg_sq) -> values, 1-D fp32 views into live memory."""


def partition_file(rank: int, world: int) -> str:
    """File name of one rank's pieces."""
    return f"partition-{rank:05d}-of-{world:05d}.safetensors"


def tensor_key(kind: str, start: int, name: str) -> str:
    """The name on disk of a piece that begins at element `start` of the flattened parameter."""
    return f"{kind}/{start}/{name}"


def read_fragments(
    fragments: Iterable[Fragment], folder: Path, *, own: str | None = None, average_from_weights: bool = False
) -> None:
    """Overwrite the fragments in place from a checkpoint folder of any layout; raises UserError for a gap.

    `own` is the file that this rank would write: where the layout is the same it holds everything, and the other
    ranks' files are not opened (512 ranks that open 512 files each took a minute). With `average_from_weights` a
    checkpoint without averages gives its weights in their place: an average that a run keeps from now on begins there.
    """
    with _open_tensors(folder, own) as tensors:
        for fragment in fragments:
            for kind, values in fragment.values.items():
                begins = kind == AVERAGE and average_from_weights and not tensors.has(AVERAGE)
                tensors.read(WEIGHT if begins else kind, fragment.name, fragment.start, values)


def has_average(folder: Path) -> bool:
    """Whether the checkpoint holds a moving average of the weights."""
    with _open_tensors(folder) as tensors:
        return tensors.has(AVERAGE)


def checkpoint_weights(folder: Path, which: str) -> dict[str, Tensor]:
    """A checkpoint's weights and buffers, whole and by name, on the CPU.

    `which`: raw, ema (with what is not averaged as it is; UserError where the checkpoint has no average) or auto: the
    average where there is one. UserError for gaps and for files that cannot be read.
    """
    with _open_tensors(folder) as tensors:
        averaged = tensors.has(AVERAGE)
        if which == "ema" and not averaged:
            raise UserError(
                "the checkpoint holds no moving average of the weights",
                where=str(folder),
                remedy="Take eval.weights=raw, or train with ema.decay above 0.",
            )
        kinds = (AVERAGE, WEIGHT) if averaged and which != "raw" else (WEIGHT,)
        kind_of = {name: kind for kind in reversed(kinds) for name in tensors.names(kind)}
        return {name: tensors.whole(kind, name) for name, kind in kind_of.items()}


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of a checkpoint's raw weights and buffers by name; only the heads of its files are read."""
    with _open_tensors(folder) as tensors:
        whole = {name: list(source.get_slice(name).get_shape()) for name, source in tensors.wholes[WEIGHT].items()}
        return {**tensors.shapes, **whole}


class _Piece(NamedTuple):
    start: int
    source: Any
    key: str

    @property
    def length(self) -> int:
        # Not looked up when the file is opened: of most pieces nothing is wanted.
        (length,) = self.source.get_slice(self.key).get_shape()
        return int(length)


class _Tensors:
    """The open files of a checkpoint and what stands in them."""

    def __init__(self, folder: Path, stack: ExitStack, own: str | None) -> None:
        """Opens the whole files and the pieces: those in `own` where it is there, the others once they are wanted."""
        self.wholes: dict[str, dict[str, Any]] = {}
        """Kind -> tensor name -> open file."""
        self.pieces: dict[tuple[str, str], list[_Piece]] = {}
        self.shapes: dict[str, list[int]] = {}
        self._folder, self._stack = folder, stack
        self._opened: set[str] = set()
        self._complete = False
        for kind, file in _WHOLE_FILES.items():
            if kind == WEIGHT or (folder / file).is_file():
                source = self._open(file)
                self.wholes[kind] = dict.fromkeys(source.keys(), source)
        if own is not None and (folder / own).is_file():
            self._add_pieces(own)
        else:
            self._open_all()

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        return self._stack.enter_context(safe_open(self._folder / file, framework="pt"))

    def _open_all(self) -> None:
        if not self._complete:
            for path in sorted(self._folder.glob("partition-*.safetensors")):
                if path.name not in self._opened:
                    self._add_pieces(path.name)
            self._complete = True

    def _add_pieces(self, file: str) -> None:
        source = self._open(file)
        self._opened.add(file)
        self.shapes |= _shapes((source.metadata() or {}).get(_SHAPES, "{}"))
        for key in source.keys():  # noqa: SIM118 - not a dictionary
            kind, start, name = key.split("/", 2)
            if not start.isdecimal():
                raise ValueError(f"{key!r} names no piece of a tensor")
            self.pieces.setdefault((kind, name), []).append(_Piece(int(start), source, key))

    def has(self, kind: str) -> bool:
        if not self._holds(kind):
            self._open_all()
        return self._holds(kind)

    def _holds(self, kind: str) -> bool:
        return kind in self.wholes or any(piece_kind == kind for piece_kind, _ in self.pieces)

    def names(self, kind: str) -> list[str]:
        return [*self.wholes.get(kind, ()), *(name for piece_kind, name in self.pieces if piece_kind == kind)]

    def whole(self, kind: str, name: str) -> Tensor:
        import torch

        if name in self.wholes.get(kind, ()):
            tensor: Tensor = self.wholes[kind][name].get_tensor(name)
            return tensor
        if name not in self.shapes:
            raise UserError(
                f"the checkpoint does not say the shape of {name}",
                where=str(self.pieces[kind, name][0].source),
                remedy="Take another checkpoint.",
            )
        there, wanted = sum(piece.length for piece in self.pieces[kind, name]), math.prod(self.shapes[name])
        if there != wanted:  # before the memory of a shape that somebody made up is taken
            raise _gap(there, wanted, kind, name)
        values = torch.empty(self.shapes[name])
        self.read(kind, name, 0, values.view(-1))
        return values

    def read(self, kind: str, name: str, start: int, values: Tensor) -> None:
        """Fill `values`, which begins at element `start` of the flattened tensor."""
        if name in self.wholes.get(kind, ()):
            found = self._read_whole(self.wholes[kind][name], name, start, values)
        else:
            found = self._read_pieces(self.pieces.get((kind, name), []), start, values)
            if found != values.numel() and not self._complete:
                self._open_all()
                found = self._read_pieces(self.pieces.get((kind, name), []), start, values)
        if found != values.numel():
            raise _gap(found, values.numel(), kind, name)

    @staticmethod
    def _read_whole(source: Any, name: str, start: int, values: Tensor) -> int:
        """Only the rows (along the first dimension) that hold what is wanted are read; the elements found."""
        part = source.get_slice(name)
        shape, stop = part.get_shape(), start + values.numel()
        if not shape:
            rows, first = source.get_tensor(name).view(-1), 0
        else:
            row = 1
            for side in shape[1:]:
                row *= side
            low, high = start // max(1, row), min(shape[0], -(-stop // max(1, row)))
            rows, first = part[low:high].reshape(-1), low * row
        wanted = rows[start - first : stop - first]
        values[: wanted.numel()].copy_(wanted)
        return int(wanted.numel())

    @staticmethod
    def _read_pieces(pieces: list[_Piece], start: int, values: Tensor) -> int:
        found = 0
        for piece in sorted(pieces, key=lambda piece: piece.start):
            if found == values.numel() or piece.start > start + found:
                break  # all is there, or there is a gap
            low, high = max(piece.start, start + found), min(piece.start + piece.length, start + values.numel())
            if low < high:
                part = piece.source.get_slice(piece.key)[low - piece.start : high - piece.start]
                values[low - start : high - start].copy_(part)
                found = high - start
        return found


@contextmanager
def _open_tensors(folder: Path, own: str | None = None) -> Iterator[_Tensors]:
    from safetensors import SafetensorError

    with ExitStack() as stack:
        try:
            yield _Tensors(folder, stack, own)
        # RuntimeError is what torch raises for sizes that cannot be, and what a file nested too deeply comes to.
        except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise UserError(
                f"the checkpoint cannot be read: {error}", where=str(folder), remedy="Take another checkpoint."
            ) from error
        except UserError as error:
            raise UserError(error.what, where=error.where or str(folder), remedy=error.remedy) from error


def _shapes(text: str) -> dict[str, list[int]]:
    shapes = json.loads(text)
    if not isinstance(shapes, dict):
        raise ValueError("the shapes of its parameters are no table")
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"{shape!r} is not the shape of {name}")
    return shapes


def _gap(found: int, wanted: int, kind: str, name: str) -> UserError:
    return UserError(
        f"the checkpoint holds {found} of {wanted} elements of {kind} of {name}",
        remedy="Another model wrote it: start a new run_dir with train.init_from.",
    )
