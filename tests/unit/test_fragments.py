"""A checkpoint's tensors by name: written by some ranks, read by others, whole or in pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mf_scale.errors import UserError
from mf_scale.fragments import Fragment, checkpoint_weights, has_average, partition_file, read_fragments, tensor_key
from mf_scale.rundir import EMA, WEIGHTS
from mf_scale.training.tensor_file import write_tensors

FULL = {
    "a.weight": torch.arange(12.0).view(4, 3),
    "b/odd.name": torch.arange(100.0, 107.0),
    "scalar": torch.tensor(3.0),
}
BUFFERS = {"norm.mean": torch.full((2,), 0.5), "norm.count": torch.tensor(9)}
FACTOR = {"exp_avg": 1.0, "exp_avg_sq": 2.0, "weight": 3.0, "ema": 4.0}
"""By kind, what `FULL` is multiplied by on disk."""


def write_pieces(
    folder: Path, layout: list[dict[str, list[tuple[int, int]]]], kinds: list[str], shapes: bool = True
) -> None:
    """One file a rank, `layout` naming its stretches."""
    metadata = {"shapes": json.dumps({name: list(tensor.shape) for name, tensor in FULL.items()} if shapes else {})}
    for rank, parts in enumerate(layout):
        tensors = {
            tensor_key(kind, start, name): FULL[name].view(-1)[start:stop] * FACTOR[kind]
            for kind in kinds
            for name, stretches in parts.items()
            for start, stop in stretches
        }
        write_tensors(folder / partition_file(rank, len(layout)), tensors, metadata)


def empty(name: str, start: int, stop: int, *kinds: str) -> Fragment:
    return Fragment(name, start, {kind: torch.full((stop - start,), float("nan")) for kind in kinds})


def wanted(fragment: Fragment, kind: str) -> Tensor:
    stop = fragment.start + fragment.values[kind].numel()
    return FULL[fragment.name].view(-1)[fragment.start : stop] * FACTOR[kind]


THREE = [
    {"a.weight": [(0, 5)], "scalar": [(0, 1)]},
    {"a.weight": [(5, 12)], "b/odd.name": [(0, 1)]},
    {"b/odd.name": [(1, 7)]},
]


def test_moments_of_three_ranks_are_read_by_two(tmp_path: Path) -> None:
    write_tensors(tmp_path / WEIGHTS, FULL)
    write_pieces(tmp_path, THREE, ["exp_avg", "exp_avg_sq"])
    kinds = ("exp_avg", "exp_avg_sq")
    read = [empty("a.weight", 0, 8, *kinds), empty("a.weight", 8, 12, *kinds), empty("b/odd.name", 0, 7, *kinds)]
    read += [empty("scalar", 0, 1, *kinds), empty("b/odd.name", 3, 3, *kinds)]
    memory = [fragment.values["exp_avg"].data_ptr() for fragment in read]
    read_fragments(read, tmp_path)
    for fragment in read:
        for kind in kinds:
            assert torch.equal(fragment.values[kind], wanted(fragment, kind))
    assert memory == [fragment.values["exp_avg"].data_ptr() for fragment in read], "in place"


@pytest.mark.parametrize("start, stop", [(0, 12), (4, 5), (5, 11), (3, 6), (11, 12)])
def test_weights_and_averages_are_read_out_of_whole_tensors_too(tmp_path: Path, start: int, stop: int) -> None:
    write_tensors(tmp_path / WEIGHTS, {name: 3 * tensor for name, tensor in FULL.items()})
    write_tensors(tmp_path / EMA, {name: 4 * tensor for name, tensor in FULL.items()})
    read = [empty("a.weight", start, stop, "weight", "ema"), empty("scalar", 0, 1, "weight", "ema")]
    read_fragments(read, tmp_path)
    for fragment in read:
        for kind in ("weight", "ema"):
            assert torch.equal(fragment.values[kind], wanted(fragment, kind))


def test_an_average_begins_at_the_weights_only_where_that_is_wanted_and_there_is_none(tmp_path: Path) -> None:
    write_tensors(tmp_path / WEIGHTS, FULL)
    fragment = empty("a.weight", 2, 9, "ema")
    with pytest.raises(UserError, match=r"0 of 7 elements of ema of a\.weight"):
        read_fragments([fragment], tmp_path)
    read_fragments([fragment], tmp_path, average_from_weights=True)
    assert torch.equal(fragment.values["ema"], FULL["a.weight"].view(-1)[2:9])
    write_tensors(tmp_path / EMA, {name: 4 * tensor for name, tensor in FULL.items()})
    read_fragments([fragment], tmp_path, average_from_weights=True)
    assert torch.equal(fragment.values["ema"], wanted(fragment, "ema"))


@pytest.mark.parametrize("piece, start, found", [((0, 4), 0, 4), ((4, 12), 0, 0), ((0, 4), 2, 2)])
def test_a_gap_is_an_error_that_names_the_tensor(
    tmp_path: Path, piece: tuple[int, int], start: int, found: int
) -> None:
    write_tensors(tmp_path / WEIGHTS, FULL)
    write_pieces(tmp_path, [{"a.weight": [piece]}], ["exp_avg"])
    with pytest.raises(UserError, match=rf"holds {found} of {12 - start} elements of exp_avg of a\.weight") as caught:
        read_fragments([empty("a.weight", start, 12, "exp_avg")], tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_pieces_that_overlap_cannot_hide_a_gap(tmp_path: Path) -> None:
    write_tensors(tmp_path / WEIGHTS, FULL)
    write_pieces(tmp_path, [{"a.weight": [(0, 6)]}, {"a.weight": [(0, 6)]}], ["exp_avg"])
    with pytest.raises(UserError, match="holds 6 of 12"):
        read_fragments([empty("a.weight", 0, 12, "exp_avg")], tmp_path)


def test_weights_are_whole_whether_they_were_partitioned_or_not(tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    whole.mkdir()
    parted.mkdir()
    write_tensors(whole / WEIGHTS, {name: 3 * tensor for name, tensor in FULL.items()} | BUFFERS)
    write_tensors(parted / WEIGHTS, BUFFERS)
    write_pieces(parted, THREE, ["exp_avg", "weight"])
    for folder in (whole, parted):
        for which in ("raw", "auto"):
            weights = checkpoint_weights(folder, which)
            assert weights.keys() == FULL.keys() | BUFFERS.keys()
            assert all(torch.equal(weights[name], 3 * tensor) for name, tensor in FULL.items())
            assert all(torch.equal(weights[name], tensor) for name, tensor in BUFFERS.items())
            assert weights["a.weight"].shape == (4, 3) and weights["norm.count"].dtype == torch.int64
        with pytest.raises(UserError, match=r"no moving average.*eval\.weights=raw"):
            checkpoint_weights(folder, "ema")
        assert not has_average(folder)


def test_the_average_is_taken_where_there_is_one_unless_raw_weights_are_wanted(tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    whole.mkdir()
    parted.mkdir()
    write_tensors(whole / WEIGHTS, {name: 3 * tensor for name, tensor in FULL.items()} | BUFFERS)
    write_tensors(whole / EMA, {name: 4 * tensor for name, tensor in FULL.items()} | BUFFERS)
    write_tensors(parted / WEIGHTS, BUFFERS)
    write_pieces(parted, THREE, ["weight"])
    averages = parted / "averages"
    averages.mkdir()
    # Frozen parameters have no average: theirs are the weights.
    write_pieces(averages, [{"a.weight": [(0, 12)], "scalar": [(0, 1)]}], ["ema"])
    (averages / partition_file(0, 1)).rename(parted / "partition-00003-of-00004.safetensors")
    for folder, frozen in ((whole, 4.0), (parted, 3.0)):
        assert has_average(folder)
        for which in ("ema", "auto"):
            weights = checkpoint_weights(folder, which)
            assert weights.keys() == FULL.keys() | BUFFERS.keys()
            assert torch.equal(weights["a.weight"], 4 * FULL["a.weight"])
            assert torch.equal(weights["b/odd.name"], frozen * FULL["b/odd.name"])
        assert torch.equal(checkpoint_weights(folder, "raw")["a.weight"], 3 * FULL["a.weight"])


def test_gaps_missing_shapes_and_unreadable_files_are_errors(tmp_path: Path) -> None:
    write_tensors(tmp_path / WEIGHTS, BUFFERS)
    write_pieces(tmp_path, THREE[:2], ["weight"])
    with pytest.raises(UserError, match=r"1 of 7 elements of weight of b/odd\.name"):
        checkpoint_weights(tmp_path, "raw")
    write_pieces(tmp_path, THREE[:2], ["weight"], shapes=False)
    with pytest.raises(UserError, match="does not say the shape"):
        checkpoint_weights(tmp_path, "raw")
    (tmp_path / partition_file(0, 2)).write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint_weights(tmp_path, "raw")
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint_weights(tmp_path, "raw")


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are opened from now on."""
    import safetensors

    names, open_file = [], safetensors.safe_open

    def noting(path: Path, **options: str) -> object:
        names.append(Path(path).name)
        return open_file(path, **options)

    monkeypatch.setattr(safetensors, "safe_open", noting)
    return names


def test_in_the_same_layout_only_the_own_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(tmp_path / WEIGHTS, FULL)
    write_pieces(tmp_path, THREE, ["exp_avg", "ema"])
    names, own = opened(monkeypatch), partition_file(1, 3)
    mine = [empty("a.weight", 5, 12, "exp_avg"), empty("b/odd.name", 0, 1, "exp_avg", "ema")]
    read_fragments(mine, tmp_path, own=own, average_from_weights=True)
    assert names == [WEIGHTS, own]
    assert all(torch.equal(values, wanted(f, kind)) for f in mine for kind, values in f.values.items())


@pytest.mark.parametrize("own", [partition_file(1, 3), partition_file(0, 2)])
def test_what_the_own_file_lacks_is_read_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    write_tensors(tmp_path / WEIGHTS, FULL)
    write_pieces(tmp_path, THREE, ["exp_avg"])
    names = opened(monkeypatch)
    mine = [empty("a.weight", 4, 12, "exp_avg"), empty("b/odd.name", 0, 7, "exp_avg", "ema")]
    read_fragments(mine, tmp_path, own=own, average_from_weights=True)
    assert sorted(names) == sorted([WEIGHTS, *(partition_file(rank, 3) for rank in range(3))]), "each of them once"
    assert torch.equal(mine[0].values["exp_avg"], wanted(mine[0], "exp_avg"))
    assert torch.equal(mine[1].values["ema"], FULL["b/odd.name"]), "no rank has an average: it begins at the weights"


def test_an_average_that_only_another_rank_has_is_no_reason_to_begin_anew(tmp_path: Path) -> None:
    write_tensors(tmp_path / WEIGHTS, FULL)
    write_pieces(tmp_path, [{}, {"a.weight": [(0, 12)]}], ["ema"])
    fragment = empty("a.weight", 0, 12, "ema")
    read_fragments([fragment], tmp_path, own=partition_file(0, 2), average_from_weights=True)
    assert torch.equal(fragment.values["ema"], wanted(fragment, "ema"))


HOSTILE_SHAPES = [
    "[" * 100_000,
    "{",
    "[1]",
    '{"a": NaN}',
    '{"a": [NaN]}',
    '{"a": [-2, -2]}',
    '{"a": [[4]]}',
    '{"a": [true, 4]}',
    '{"a": 4}',
    '{"a": [1000000000000, 1000000000000]}',
    '{"a": [' + "9" * 30 + "]}",
    '{"a": [2]}',
]


@pytest.mark.parametrize("shapes", HOSTILE_SHAPES)
def test_shapes_that_somebody_made_up_are_a_users_mistake(tmp_path: Path, shapes: str) -> None:
    write_tensors(tmp_path / WEIGHTS, BUFFERS)
    write_tensors(tmp_path / partition_file(0, 1), {"weight/0/a": torch.zeros(4)}, {"shapes": shapes})
    with pytest.raises(UserError, match=r"cannot be read|holds 4 of") as caught:
        checkpoint_weights(tmp_path, "raw")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("key", ["a", "weight/a", "weight/x/a", "weight/-1/a", "weight//a", "weight/1.5/a"])
def test_keys_that_name_no_piece_are_a_users_mistake(tmp_path: Path, key: str) -> None:
    write_tensors(tmp_path / WEIGHTS, BUFFERS)
    write_tensors(tmp_path / partition_file(0, 1), {key: torch.zeros(4)}, {"shapes": '{"a": [4]}'})
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint_weights(tmp_path, "raw")


@pytest.mark.parametrize("piece", [torch.zeros(2, 2), torch.tensor(1.0)])
def test_pieces_of_another_form_are_a_users_mistake(tmp_path: Path, piece: Tensor) -> None:
    write_tensors(tmp_path / WEIGHTS, BUFFERS)
    write_tensors(tmp_path / partition_file(0, 1), {"weight/0/a": piece}, {"shapes": '{"a": [4]}'})
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint_weights(tmp_path, "raw")


@pytest.mark.parametrize("shape", ["[-2, -2]", "[true, 4]", "[4.0]", "[[4]]", "4", "null"])
def test_a_shape_that_is_none_is_named(tmp_path: Path, shape: str) -> None:
    write_tensors(tmp_path / WEIGHTS, BUFFERS)
    write_tensors(tmp_path / partition_file(0, 1), {"weight/0/a": torch.zeros(4)}, {"shapes": f'{{"a": {shape}}}'})
    with pytest.raises(UserError, match="is not the shape of a"):
        checkpoint_weights(tmp_path, "raw")
