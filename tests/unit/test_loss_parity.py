"""Our loss, fast and plain, against transformers' MaskFormerLoss; and what the loss's memory depends on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mf_scale.bench.contestants import contestants, value_and_gradients
from mf_scale.bench.inputs import Shape, make_inputs
from mf_scale.data.batch import IGNORE, NONE
from tests.random_batches import skip_without

pytest.importorskip("transformers")

CPU = torch.device("cpu")
SMALL = Shape(images=3, queries=12, segments=5, cells=12, size=48, layers=3, channels=8, classes=9)


@pytest.mark.parametrize("ours", ["mf_scale native", "mf_scale eager", "reference"])
@pytest.mark.parametrize("size", [48, 50, 96])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_transformers_in_value_and_gradient(ours, size, seed):
    shape = Shape(**{**vars(SMALL), "size": size})
    prediction, batch = make_inputs(shape, CPU, seed)
    batch.segment_map[:, :, : size // 4] = IGNORE  # negatives of every mask, as in the paper's code
    batch.segment_map[:, :, :, : size // 5] = NONE
    found = {c.name: c for c in contestants(shape.classes, shape.queries, batch, reference=True)[0]}
    if ours not in found:
        pytest.skip("no native kernels here")
    value, gradients = value_and_gradients(found[ours], prediction)
    wanted, theirs = value_and_gradients(found["transformers"], prediction)
    assert value == pytest.approx(wanted, rel=1e-5)
    for mine, other in zip(gradients, theirs, strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()


LAYERS, QUERIES, CELLS = 4, 40, 128
PEAK = f"""
import json, sys, torch
from mf_scale.bench.contestants import contestants, leaf_copy
from mf_scale.bench.inputs import Shape, make_inputs
from mf_scale.bench.memory import peak_over_inputs
torch.set_num_threads(1)
cpu, peaks = torch.device("cpu"), {{}}
for T in (160, 160, 10, 20, 40, 80):  # the first time warms up
    shape = Shape(1, {QUERIES}, T, {CELLS}, {4 * CELLS}, {LAYERS}, channels=16, classes=9)
    prediction, batch = make_inputs(shape, cpu)
    ours = next(c for c in contestants(9, {QUERIES}, batch, reference=False)[0] if c.name == sys.argv[1])
    leaves = leaf_copy(prediction)
    peaks[T] = min(peak_over_inputs(lambda: ours.loss(leaves).backward(), cpu) for _ in range(3))
print(json.dumps(peaks))
"""


@pytest.mark.parametrize("ours", ["mf_scale native", "mf_scale eager"])
def test_the_peak_does_not_depend_on_the_number_of_segments(ours):
    """Beyond three buffers of the matched masks, min(T, 40) in each of 4 layers, of 128 x 128 in fp32."""
    skip_without(ours.split()[1])
    process = subprocess.run(
        [sys.executable, "-c", PEAK, ours],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert process.returncode == 0, process.stderr
    peaks = {int(segments): peak for segments, peak in json.loads(process.stdout).items()}
    allowed = {T: 3 * LAYERS * min(T, QUERIES) * CELLS**2 * 4 / 2**20 for T in peaks}
    for T in (10, 20, 40, 80):
        grown = (peaks[2 * T] - allowed[2 * T]) - (peaks[T] - allowed[T])
        assert grown < 0.05 * peaks[T], (T, peaks, allowed)
    # What else there is: the logits of a chunk in the matching, and for eager of a band of masks at full resolution.
    constant = 1 if ours.endswith("native") else 12
    assert all(peaks[T] < allowed[T] + constant for T in peaks), (peaks, allowed)
