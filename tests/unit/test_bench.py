"""`mf-scale bench loss` and `classes`: what they measure, print and write; the arithmetic that a GPU adds."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType

from mf_scale.bench import class_ways, classes, floor, launches
from mf_scale.bench import contestants as room
from mf_scale.bench import loss as bench
from mf_scale.bench.class_ways import Sizes
from mf_scale.bench.contestants import contestants, leaf_copy
from mf_scale.bench.inputs import Shape, make_inputs
from mf_scale.bench.loss import bench_loss, differences
from mf_scale.bench.table import table
from mf_scale.cli import main
from mf_scale.data.batch import NONE
from mf_scale.errors import UserError
from mf_scale.losses.criterion import Criterion

TINY = Shape(images=2, queries=6, segments=3, cells=8, size=32, layers=2, channels=4, classes=5)
SIZES = [f"--{name}={value}" for name, value in vars(TINY).items()]


def _names(*, reference: bool) -> list[str]:
    _, batch = make_inputs(TINY, torch.device("cpu"))
    return [c.name for c in contestants(TINY.classes, TINY.queries, batch, reference=reference)[0]]


def test_the_table_and_the_json_say_the_same(tmp_path):
    file = tmp_path / "numbers.json"
    text = bench_loss(TINY, repeats=2, reference=True, json_file=str(file))
    summary, names = json.loads(file.read_text()), _names(reference=True)
    assert list(summary["results"]) == names and {"mf_scale eager", "reference"} <= set(names)
    rows = {line[:16].strip(): line[16:].split() for line in text.splitlines()[2 : 2 + len(names)]}
    assert list(rows) == names and text == table(summary)
    for name, result in summary["results"].items():
        assert rows[name][5] == f"{result['total_ms']:.1f}"
        assert result["total_ms"] == result["forward_ms"] + result["backward_ms"]
        for difference in (result, result["small"]):
            assert difference["loss_difference"] < 1e-5 and difference["gradient_difference"] < 1e-5, name
        if name.startswith("mf_scale"):
            parts = [result[f"{stage}_ms"] for stage in ("cost", "loss", "backward")]
            assert result["without_solve_ms"] == sum(parts) and result["solve_ms"] > 0
    peer = summary["results"].get("transformers")
    assert summary["truth"] == ("transformers" if peer else "mf_scale eager") and "floor" not in summary
    if peer:
        eager = summary["results"]["mf_scale eager"]
        assert eager["faster"] == peer["total_ms"] / eager["total_ms"] and rows["mf_scale eager"][8].endswith("x")


def test_a_wrong_loss_is_shown_whichever_comes_first(monkeypatch):
    """The truth is the plain reference: ours may all be wrong together."""
    right = Criterion.__call__

    def wrong(self, *arguments):
        return SimpleNamespace(total=1.01 * right(self, *arguments).total)

    monkeypatch.setattr(Criterion, "__call__", wrong)
    results: dict = {name: {} for name in _names(reference=True)}
    bench._agreement_on_a_small_shape(torch.device("cpu"), results, reference=True)
    for name, result in results.items():
        ours = name.startswith("mf_scale")
        assert result["small"]["loss_difference"] == pytest.approx(0.01 if ours else 0, abs=1e-5), name


def test_without_the_peer_eager_is_the_measure(monkeypatch):
    def absent(classes, batch):
        raise ImportError

    monkeypatch.setattr(room, "_transformers", absent)
    text = bench_loss(TINY, repeats=1, reference=False, json_file=None)
    assert "off: against mf_scale eager" in text and "transformers: not installed" in text


def test_normalisers_are_made_before_the_measurement(monkeypatch):
    prediction, batch = make_inputs(TINY, torch.device("cpu"))
    found, _ = contestants(TINY.classes, TINY.queries, batch, reference=True)
    monkeypatch.setattr(Criterion, "totals", None)
    for contestant in found:
        contestant.loss(leaf_copy(prediction)).backward()


def test_stages_are_the_whole_loss():
    prediction, batch = make_inputs(TINY, torch.device("cpu"))
    for c in contestants(TINY.classes, TINY.queries, batch, reference=False)[0]:
        if c.stages is not None:
            pairs = c.stages.solve(c.stages.cost(prediction))
            assert torch.equal(c.stages.loss(prediction, pairs), c.loss(prediction))


def test_no_segment_can_be_measured():
    _, batch = make_inputs(Shape(**{**vars(TINY), "segments": 0}), torch.device("cpu"))
    assert (batch.segment_map == NONE).all()


def test_exit_codes(tmp_path, capsys):
    assert main(["bench", "loss", *SIZES, "--repeats=1"]) == 0
    assert "mf_scale eager" in capsys.readouterr().out
    assert main(["bench", "loss", *SIZES, "--repeats=1", f"--json={tmp_path}/absent/file.json"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_floor_is_the_longer_of_moving_and_computing():
    """The design note's figures: 16 images, 160 -> 640, 15 segments, 6 layers."""
    todo = floor.work(images=16, queries=100, segments=15, cells=160, size=640, layers=6, channels=256)
    pixels, logits = 16 * 6 * 15 * 640**2, 16 * 6 * 100 * 160**2
    assert todo.transcendentals == 6 * pixels + 3 * logits and pixels == pytest.approx(590e6, rel=0.01)
    assert 0.9e9 < todo.bytes < 3e9
    few = floor.work(images=16, queries=10, segments=15, cells=160, size=640, layers=6, channels=256)
    assert few.transcendentals == 6 * (16 * 6 * 10 * 640**2) + 3 * (16 * 6 * 10 * 160**2)
    work = floor.Work(bytes=4_000, transcendentals=6_000)
    assert floor.floor_ms(work, floor.Ceilings(2e6, 1e7)) == pytest.approx(2.0)
    assert floor.floor_ms(work, floor.Ceilings(2e7, 1e6)) == pytest.approx(6.0)
    assert floor.achieved(2.0, 8.0) == 0.25 and np.isnan(floor.achieved(2.0, 0.0))


def test_kernels_and_waits_are_told_from_what_is_beside_them():
    def event(name, device=DeviceType.CUDA, **more):
        return SimpleNamespace(name=name, device_type=device, **more)

    events = [
        event("_cost_sums"),
        event("Memcpy DtoH (Device -> Pageable)"),
        event("Memset (Device)"),
        event("aten::add", DeviceType.CPU),
        event("step", is_user_annotation=True),
        event("void at::native::reduce_kernel"),
    ]
    assert launches.kernels(events) == 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("of something else", stacklevel=1)
    assert launches.syncs(caught) == 2


def test_the_rows_of_a_gpu_are_shown(monkeypatch):
    results: dict = {
        "mf_scale triton": {"without_solve_ms": 4.0, "launches": 19, "syncs": 1, "small": differences((1, []), (1, []))}
    }
    ceilings = floor.Ceilings(3e12, 8e12)
    monkeypatch.setattr(floor, "measure_ceilings", lambda device: ceilings)
    found = bench._against_the_floor(TINY, torch.device("cpu"), results)
    assert found["floor_ms"] == floor.floor_ms(floor.Work(found["bytes"], found["transcendentals"]), ceilings)
    assert results["mf_scale triton"]["of_floor"] == found["floor_ms"] / 4
    results["mf_scale triton"]["of_floor"] = 0.4
    summary = {"shape": vars(TINY), "small_shape": vars(TINY), "device": "a GPU", "repeats": 1, "truth": "it"}
    text = table({**summary, "absent": "", "results": results, "floor": found})
    assert text.splitlines()[2].split()[-3:] == ["19", "1", "40%"] and "3.00 TB/s" in text

    monkeypatch.setattr(floor, "measure_ceilings", lambda device: 1 / 0)
    failed = bench._against_the_floor(TINY, torch.device("cpu"), results)
    assert "floor: not measured: ZeroDivisionError" in table(
        {**summary, "absent": "", "results": results, "floor": failed}
    )


SMALL_SIZES = Sizes(images=2, layers=2, queries=6, segments=4, width=8, size=32, budget=1)


def test_classes_are_measured_by_both_ways_and_agree(tmp_path, capsys):
    file = tmp_path / "numbers.json"
    sizes = [f"--{name}={value}" for name, value in vars(SMALL_SIZES).items()]
    assert main(["bench", "classes", "--classes", "30", "7", *sizes, "--repeats", "1", "--json", str(file)]) == 0
    text, summary = capsys.readouterr().out, json.loads(file.read_text())
    assert text.strip() == classes.table(summary) and summary["sizes"] == vars(SMALL_SIZES)
    pixels = {"pixels": 0.01}
    terms = {"loss": 1e-5, "gradients": 1e-5}
    for name, limits in (("class terms", terms), ("inference", pixels), ("inference, sure", pixels)):
        rows = summary["results"][name]
        assert [row["classes"] for row in rows] == [7, 30]
        for row in rows:
            assert row["faster"] == row["dense_ms"] / row["ours_ms"] and row["ours_mib"] >= 0
            assert row["differences"].keys() == limits.keys()
            assert all(row["differences"][key] <= limit for key, limit in limits.items()), row


@pytest.mark.parametrize("made", [class_ways.class_terms, class_ways.inference_sure])
def test_a_wrong_way_is_shown(made, monkeypatch):
    """The differences are those of what was computed, gradients too."""
    way = made(SMALL_SIZES, 7, torch.device("cpu"))
    right, other = copy.deepcopy(way.ours()), copy.deepcopy(way.dense())
    if isinstance(right, torch.Tensor):
        right[0, 0] += 1
    else:
        right["gradients"][1][3] *= 1.5
    assert max(way.differences(right, other).values()) > 1e-4


def test_the_dense_way_is_left_out_where_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(classes, "free_bytes", lambda device: 1000)
    text = classes.bench_classes(SMALL_SIZES, [7], repeats=1, json_file=None)
    assert text.count("not measured: it keeps 0 GiB at the least") == 3
    with pytest.raises(UserError, match="--queries 0"):
        classes.bench_classes(replace(SMALL_SIZES, queries=0), [7], repeats=1, json_file=None)
