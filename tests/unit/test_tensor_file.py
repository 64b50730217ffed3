"""Our writer of safetensors files: what the library reads back, digests, a disk that fills up."""

from __future__ import annotations

import errno
import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mf_scale.training import tensor_file
from mf_scale.training.snapshot import CHUNK, FileContents, Snapshot, live_files
from mf_scale.training.tensor_file import flat_bytes, lay_out, write_file, write_tensors

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "half": torch.randn(3, 5).to(torch.bfloat16),
    "weight": torch.randn(4, 6),
    "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "turned": torch.randn(5, 3).t(),
    "part": torch.randn(10)[3:8],
    "none": torch.empty(0, 7),
    "scalar": torch.tensor(5),
    "double": torch.randn(3, dtype=torch.float64),
    "fp16": torch.randn(3).half(),
    "ü/0/naïve": torch.tensor([1, -2], dtype=torch.int8),
    "grad": torch.randn(3, requires_grad=True),
}


def assert_equal(file: Path) -> None:
    found = load_file(file)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach()), name


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    entry = write_tensors(file, TENSORS, {"shapes": '{"a": [1]}'})
    assert_equal(file)
    with safe_open(file, framework="pt") as source:
        assert source.metadata() == {"shapes": '{"a": [1]}'}
    data = file.read_bytes()
    assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_file_of_nothing_is_a_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {})
    assert load_file(tmp_path / "a.safetensors") == {}


def test_every_tensor_is_aligned_to_its_elements() -> None:
    layout = lay_out(TENSORS, {})
    assert len(layout.header) % 8 == 0
    for name, (start, stop) in layout.places.items():
        assert start % TENSORS[name].element_size() == 0 and stop - start == TENSORS[name].nbytes
    assert sorted(layout.places.values()) == list(layout.places.values())


def test_a_dtype_that_the_format_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"w is torch\.complex64"):
        write_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(1, dtype=torch.complex64)})


def test_large_pieces_are_cut_and_hashed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "PIECE", 7)
    calls: list[int] = []
    data = bytes(range(50))
    entry = write_file(tmp_path / "a", [memoryview(data), memoryview(b""), memoryview(b"xyz")], lambda: calls.append(1))
    assert (tmp_path / "a").read_bytes() == data + b"xyz"
    assert entry == {"size": 53, "sha256": hashlib.sha256(data + b"xyz").hexdigest()}
    assert len(calls) == 9


def test_a_write_that_takes_a_part_goes_on_with_the_rest() -> None:
    class Narrow(io.BytesIO):
        def write(self, data: Any) -> int:
            return super().write(data[:3])

    stream = Narrow()
    tensor_file._write_all(stream, memoryview(b"0123456789"))
    assert stream.getvalue() == b"0123456789"


def test_a_full_disk_is_the_systems_own_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        write_tensors(tmp_path / "a", TENSORS)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [], "what was written gives its place back"


@pytest.mark.parametrize("chunk", [CHUNK, 64, 13])
def test_a_snapshot_keeps_what_was_there_when_it_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("mf_scale.training.snapshot.CHUNK", chunk)
    snapshot = Snapshot(torch.device("cpu"))
    live = {name: tensor.detach().clone() for name, tensor in TENSORS.items()}
    contents = [FileContents("a.safetensors", live, {}), FileContents("b.safetensors", {}, {"k": "v"})]
    snapshot.prepare(contents)
    first, second = snapshot.take(contents)
    for tensor in live.values():
        tensor.zero_()
    write_file(tmp_path / first.name, first.pieces)
    write_file(tmp_path / second.name, second.pieces)
    assert_equal(tmp_path / "a.safetensors")
    assert load_file(tmp_path / "b.safetensors") == {}


def test_the_memory_of_a_snapshot_is_used_again_and_follows_other_shapes(tmp_path: Path) -> None:
    snapshot = Snapshot(torch.device("cpu"))

    def take(**tensors: torch.Tensor) -> list[memoryview]:
        (file,) = snapshot.take([FileContents("a", tensors, {})])
        write_file(tmp_path / "a", file.pieces)
        assert all(torch.equal(load_file(tmp_path / "a")[name], tensor) for name, tensor in tensors.items())
        return list(file.pieces)

    one, two = take(w=torch.ones(5)), take(w=torch.full((5,), 2.0))
    assert one[1] == two[1], "the same memory, with the new values in both"
    take(w=torch.ones(5), moments=torch.arange(9.0))


def test_live_files_are_read_when_they_are_written(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    (file,) = live_files([FileContents("a", {"w": tensor}, {})])
    tensor.fill_(7)
    write_file(tmp_path / "a", file.pieces)
    assert load_file(tmp_path / "a")["w"].tolist() == [7, 7, 7]


def test_one_element_with_a_stride_of_its_own_is_bytes_too() -> None:
    odd = torch.arange(10.0).as_strided((1,), (5,), 3)
    assert odd.is_contiguous() and odd.stride() == (5,)
    assert flat_bytes(odd).numpy().tobytes() == torch.tensor([3.0]).numpy().tobytes()
    assert flat_bytes(torch.arange(6.0).view(2, 3).T).view(torch.float32).tolist() == [0, 3, 1, 4, 2, 5]
    assert flat_bytes(torch.tensor(2, dtype=torch.uint8)).tolist() == [2] and flat_bytes(torch.zeros(0)).numel() == 0
