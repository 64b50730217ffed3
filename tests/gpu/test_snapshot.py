"""A checkpoint's copy of GPU memory: what was there when it was taken, whatever the training does next."""

from __future__ import annotations

import pytest
import torch

from mf_scale.training.snapshot import FileContents, Snapshot, live_files

pytestmark = pytest.mark.gpu


def test_a_snapshot_is_the_state_at_its_moment() -> None:
    """The copies are not waited for one by one, so the bytes are right only if the end waits for all of them."""
    weights = {f"w{i}": torch.randn(1000 + i, 3000, device="cuda") for i in range(20)}
    weights["odd"] = torch.randn(40, 30, device="cuda").t()  # not contiguous
    weights["count"] = torch.arange(7, device="cuda")
    contents, snapshot = [FileContents("weights.safetensors", weights, {"a": "b"})], Snapshot(torch.device("cuda"))
    snapshot.prepare(contents)
    for _ in range(2):  # the second uses the memory of the first
        wanted = b"".join(piece.tobytes() for piece in live_files(contents)[0].pieces)
        for _ in range(50):  # keeps the stream busy while the copies are queued
            weights["w0"] @ weights["w0"].t()
        taken = snapshot.take(contents)
        for tensor in weights.values():
            tensor.add_(1)
        assert b"".join(piece.tobytes() for piece in taken[0].pieces) == wanted
