"""The C++ kernels against the eager ones in fp64, in every shape that history knows; and how they come to be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.data.batch import IGNORE, NONE
from mf_scale.errors import UserError
from mf_scale.kernels import eager, native
from mf_scale.kernels.choose import choose_kernels, why_not
from mf_scale.kernels.mask_loss import mask_loss, run
from mf_scale.kernels.settings import Settings
from mf_scale.matching.cost import pairwise_cost
from tests.random_batches import random_batch, random_prediction

SETTINGS = Settings(focal_weight=20.0, dice_weight=1.0, alpha=0.25, gamma=2.0, exclude=False)

pytestmark = pytest.mark.skipif(
    why_not("native", "cpu", torch.float32) is not None,
    reason=f"no native kernels: {why_not('native', 'cpu', torch.float32)}",
)


class Pairs(NamedTuple):
    """What the kernels compare."""

    logits: torch.Tensor
    segment_map: torch.Tensor
    segments: torch.Tensor
    layers: torch.Tensor
    counts: torch.Tensor


def _pairs(batch, cells, pairs=None, scale=3.0, seed=0) -> Pairs:
    """Logits for every segment of the batch (or `pairs` of them) and the pairs' segments, layers and counts."""
    counts = (batch.labels >= 0).sum(1)
    P = max(1, int(counts.max())) if pairs is None else pairs
    segments = torch.arange(P).repeat(len(counts), 1).clamp(max=max(0, batch.labels.shape[1] - 1))
    layers = torch.nn.functional.pad(batch.segment_layer, (0, 1)).gather(1, segments)
    logits = torch.randn(len(counts), P, *cells, generator=torch.Generator().manual_seed(seed)) * scale
    return Pairs(logits, batch.segment_map, segments, layers, counts.clamp(max=P))


def _compare(arguments: Pairs, settings=SETTINGS):
    focal, dice, gradient = run("native", *arguments, settings=settings, want_gradient=True)
    wide = arguments._replace(logits=arguments.logits.double())
    wanted = eager.mask_loss(*wide, settings=settings, want_gradient=True)
    assert gradient is not None and wanted[2] is not None
    torch.testing.assert_close(focal.double(), wanted[0], rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(dice.double(), wanted[1], rtol=2e-6, atol=1e-7)
    biggest = wanted[2].abs().max().clamp(min=1e-30)
    assert ((gradient.double() - wanted[2]).abs().max() / biggest) < 2e-6
    bare = run("native", *arguments, settings=settings, want_gradient=False)
    assert bare[2] is None and torch.equal(bare[0], focal) and torch.equal(bare[1], dice)
    return focal, dice, gradient


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("gamma", [2.0, 1.5, 0.0])
@pytest.mark.parametrize("map_layers", [1, 2])
def test_equals_the_eager_path(exclude, gamma, map_layers):
    batch = random_batch([3, 0, 5, 9], map_layers=map_layers)
    _compare(_pairs(batch, (6, 8)), SETTINGS._replace(exclude=exclude, gamma=gamma))


@given(
    cells=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    segments=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    map_layers=st.integers(1, 3),
    exclude=st.booleans(),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_eager_path(cells, size, segments, map_layers, exclude, scale, seed):
    batch = random_batch(segments, size, map_layers=map_layers, seed=seed)
    _compare(_pairs(batch, cells, scale=scale, seed=seed), SETTINGS._replace(exclude=exclude))


def test_more_than_255_segments_a_single_pixel_and_all_ignored():
    many = random_batch([300], (40, 40))
    many.segment_map[0, 0] = torch.arange(1600).view(40, 40) // 5
    _compare(_pairs(many, (10, 10)))
    single = random_batch([2])
    single.segment_map[single.segment_map >= 0] = NONE
    single.segment_map[0, 0, 7, 9] = 1
    _compare(_pairs(single, (6, 8)))
    single.segment_map[:] = IGNORE
    for exclude in (False, True):
        _compare(_pairs(single, (6, 8)), SETTINGS._replace(exclude=exclude))


def test_padding_pairs_are_zero():
    batch = random_batch([1, 3])
    pairs = _pairs(batch, (6, 8))
    focal, dice, gradient = _compare(pairs)
    assert (focal[0, 1:] == 0).all() and (dice[0, 1:] == 0).all() and (gradient[0, 1:] == 0).all()


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_extreme_logits_keep_their_meaning(value):
    batch = random_batch([2], ignored=False)
    pairs = _pairs(batch, (6, 8))
    pairs.logits[0, 0] = value
    focal, dice, gradient = _compare(pairs)
    assert all(part.isfinite().all() for part in (focal, dice, gradient))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_hidden_and_stays_in_its_pair(value):
    batch = random_batch([2])
    pairs = _pairs(batch, (6, 8))
    pairs.logits[0, 1, 2, 2] = value
    focal, dice, gradient = run("native", *pairs, settings=SETTINGS, want_gradient=True)
    assert gradient is not None and not gradient[0, 1].isfinite().all() and gradient[0, 0].isfinite().all()
    assert not focal[0, 1].isfinite() and focal[0, 0].isfinite() and dice[0, 0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_fp32(dtype):
    batch = random_batch([3, 2])
    pairs = _pairs(batch, (6, 8))
    half = pairs._replace(logits=pairs.logits.to(dtype))
    torch.testing.assert_close(
        run("native", *half, settings=SETTINGS, want_gradient=True),
        run("native", *half._replace(logits=half.logits.float()), settings=SETTINGS, want_gradient=True),
        rtol=0,
        atol=0,
    )


def test_threads_and_repeats_change_no_bit():
    batch = random_batch([9, 4, 7], (64, 80))
    arguments, threads = _pairs(batch, (16, 20)), torch.get_num_threads()
    try:
        answers = []
        for count in (1, 3, 1):
            torch.set_num_threads(count)
            answers.append(run("native", *arguments, settings=SETTINGS, want_gradient=True))
    finally:
        torch.set_num_threads(threads)
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("ignored_pixels", ["negative", "exclude"])
@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("segments", [[3, 0, 5], [0, 0], [40, 3]])
@pytest.mark.parametrize("map_layers", [1, 2])
def test_matching_cost_equals_the_eager_one(ignored_pixels, gamma, segments, map_layers):
    batch = random_batch(segments, (72, 96), map_layers=map_layers)
    prediction = random_prediction(len(segments), queries=70, size=(24, 32), dtype=torch.float32)
    for term in prediction.layers():
        term.mask_embeddings.data.mul_(2)
    costs = []
    for kernels in ("native", "eager"):
        loss = LossConfig(ignored_pixels=ignored_pixels, focal_gamma=gamma, kernels=kernels)
        costs.append(pairwise_cost(prediction, batch, MatchingConfig(), loss))
    real = (batch.labels >= 0)[:, None, None].expand_as(costs[0].focal)
    for name in ("focal", "dice", "total"):
        got, wanted = (getattr(cost, name)[real] for cost in costs)
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-6, msg=name)


def test_the_operator_keeps_torchs_rules_and_a_compiled_graph():
    batch = random_batch([3, 2])
    logits, *rest = _pairs(batch, (6, 8))
    options = (20.0, 1.0, 0.25, 2.0, False, "native", True)
    torch.library.opcheck(mask_loss, (logits.requires_grad_(), *rest, *options))

    def total(x):
        return mask_loss(x * 2, *rest, *options)[0] * 3

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    answers = [torch.autograd.grad(f(logits), logits)[0] for f in (total, compiled)]
    torch.testing.assert_close(*answers)


def test_what_is_asked_for_and_cannot_run_is_explained():
    assert choose_kernels("auto", "cpu", torch.float32) == "native"
    assert choose_kernels("auto", "cpu", torch.float64) == "eager"
    with pytest.raises(
        UserError, match=r"native kernels cannot run here on cpu in torch\.float64: they compute in fp32"
    ):
        choose_kernels("native", "cpu", torch.float64)
    with pytest.raises(UserError, match="triton kernels cannot run here on cpu"):
        choose_kernels("triton", "cpu", torch.float32)


def _fresh(code: str, **environment: str) -> str:
    """Print of a new process whose kernels were not built yet."""
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


REPORT = (
    "import torch; from mf_scale.kernels.choose import choose_kernels, why_not;"
    "print(choose_kernels('auto', 'cpu', torch.float32), why_not('native', 'cpu', torch.float32))"
)


def test_it_is_built_once_and_a_damaged_or_foreign_cache_is_survived(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    assert _fresh(REPORT, **environment).startswith("native")
    (library,) = (tmp_path / "cache/mf_scale").glob("native-*.so")
    built = library.stat().st_mtime_ns
    assert _fresh(REPORT, **environment).startswith("native") and library.stat().st_mtime_ns == built
    library.write_bytes(b"not a library")
    assert _fresh(REPORT, **environment).startswith("native")
    (tmp_path / "blocked").write_text("a file where a folder should be")
    assert _fresh(REPORT, XDG_CACHE_HOME=str(tmp_path / "blocked"), TMPDIR=str(tmp_path)).startswith("native")
    assert [f.name for f in tmp_path.rglob("tmp*.so")] == []


def test_without_a_compiler_the_eager_path_serves(tmp_path):
    told = _fresh(REPORT, PATH=str(tmp_path), CXX="", XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path))
    assert told.startswith("eager") and "there is no C++ compiler" in told
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    broken.chmod(0o755)
    told = _fresh(REPORT, CXX=str(broken), XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path))
    assert told.startswith("eager") and "no such header" in told


def test_the_library_is_loaded_once():
    assert native.library() is native.library()
