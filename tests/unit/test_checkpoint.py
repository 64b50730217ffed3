"""Adam's moments as named fragments: written by some ranks, read by others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mf_scale.distributed.engine import Fragment
from mf_scale.errors import UserError
from mf_scale.training.moments import moments_file, read_moments, write_moments


def fragments(parts: dict[str, list[tuple[int, int]]], full: dict[str, torch.Tensor] | None) -> list[Fragment]:
    made = []
    for name, ranges in parts.items():
        for start, stop in ranges:
            values = full[name][start:stop] if full else torch.full((stop - start,), float("nan"))
            made.append(Fragment(name, start, {"exp_avg": values.clone(), "exp_avg_sq": 2 * values.clone()}))
    return made


FULL = {"a.weight": torch.arange(10.0), "b/odd.name": torch.arange(100.0, 107.0)}


def test_moments_written_by_three_ranks_are_read_by_two(tmp_path: Path) -> None:
    layout = [{"a.weight": [(0, 4)]}, {"a.weight": [(4, 10)], "b/odd.name": [(0, 1)]}, {"b/odd.name": [(1, 7)]}]
    for rank, parts in enumerate(layout):
        write_moments(fragments(parts, FULL), tmp_path / moments_file(rank, 3))
    for parts in ({"a.weight": [(0, 7)]}, {"a.weight": [(7, 10)], "b/odd.name": [(0, 7)]}):
        read = fragments(parts, None)
        read_moments(read, tmp_path)
        for fragment in read:
            wanted = FULL[fragment.name][fragment.start : fragment.start + fragment.moments["exp_avg"].numel()]
            assert torch.equal(fragment.moments["exp_avg"], wanted)
            assert torch.equal(fragment.moments["exp_avg_sq"], 2 * wanted)


def test_a_gap_in_the_moments_is_an_error(tmp_path: Path) -> None:
    write_moments(fragments({"a.weight": [(0, 4)]}, FULL), tmp_path / moments_file(0, 1))
    with pytest.raises(UserError, match=r"4 of 10 elements of exp_avg of a\.weight"):
        read_moments(fragments({"a.weight": [(0, 10)]}, None), tmp_path)
