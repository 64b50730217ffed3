"""The figures of `scale.py` as lines: what it is, how much, its formula with the numbers in it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from mf_scale.plan.scale import Scale
from mf_scale.plan.scale_numbers import number, size

_WIDTH = 120


def scale_lines(scale: Scale, ranks: int, nodes: int, stage: int, *, formulas: bool) -> Iterator[str]:
    """A line a figure, longer ones in two; with `formulas` one more in symbols."""
    yield f"storage, checkpoints and restarts with {ranks:,} GPUs on {nodes:,} node{'s' * (nodes > 1)}, computed:"
    for figure in scale.figures:
        head = f"  {figure.title:<21}{figure.shown:>11}  "
        yield from _filled(head, f"= {figure.numbers}")
        if formulas:
            yield from _filled(" " * len(head), f": {figure.symbols}")
    yield f"  {'files of a checkpoint':<24}{'rank 0':>12}{'any other':>12}{'in all':>12}"
    for written in scale.written:
        mark = "*" if written.stage == stage else " "
        sizes = "".join(f"{size(value):>12}" for value in (written.first_rank, written.other_rank, written.total))
        yield f"   {mark}ZeRO stage {written.stage:<9}{sizes}"
    if scale.unknown:
        yield from _filled("  unknown: ", "; ".join(scale.unknown))
    yield "  from, and --assume NAME=VALUE changes it:"
    for name, known in scale.known.items():
        yield f"    {name + ' = ' + number(known.value):<26}{known.source}"


def _filled(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=head, subsequent_indent=" " * (len(head) + 2), break_long_words=False
    )
