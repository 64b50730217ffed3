"""What `mf-scale plan` says of storage, checkpoints and restarts: by hand, against real indexes, reads and the docs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mf_scale.bench.index_made import write_index
from mf_scale.cli import main
from mf_scale.config.load import load_config
from mf_scale.data.index import Index
from mf_scale.data.loader import train_steps
from mf_scale.data.order import Stream, epochs_begun
from mf_scale.data.repeat import repeat_factors
from mf_scale.data.sources import order_of
from mf_scale.data.storage import Storage
from mf_scale.errors import UserError
from mf_scale.plan import formulas as f
from mf_scale.plan import written as written_module
from mf_scale.plan.assumed import parse_assumed, settle
from mf_scale.plan.dataset import Dataset
from mf_scale.plan.planning import Wanted, plan_config
from mf_scale.plan.scale import Scale, look_at_scale
from mf_scale.plan.scale_numbers import number, seconds, share, size
from mf_scale.plan.text import page
from mf_scale.plan.written import SavedModel, count_written, list_saved
from tests.sources import make_source, open_state, small_config

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs/demo.yaml")
NONE = Dataset((), "none here")


def test_the_formulas_by_hand() -> None:
    assert f.index_bytes(10, 12, 6, 2, 3) == 10 * 84 + 2 * 139 + 3 * 63
    assert f.blocks_of(2500, 1000, 128) == 3 * 8 and f.blocks_of(40, 1000, 128) == 1
    assert f.order_bytes(100, 1600, repeats=False) == 3200 and f.order_bytes(100, 1600, repeats=True) == 4800
    assert [f.worker_lanes(8, workers) for workers in (0, 1, 3, 8, 9)] == [8, 8, 3, 1, 8]
    assert f.buffered_bytes(2, 128, 1000.0) == 256_000
    assert f.bytes_a_second(4096, 165_000, 0.5) == 1_351_680_000
    assert f.requests_a_second(4096, 128, 0.5) == 64
    assert f.read_twice(4096, 128, 100_000_000) == 0.00524288
    assert f.cached_share(50, 200) == 0.25 and f.cached_share(300, 200) == 1
    assert f.node_bytes(10, 3, 4) == 19 and f.save_stall(500, 100, 0.25) == 5.25
    assert f.failures_a_day(16_384, 54 * 24 * 16_384 / 419) == pytest.approx(419 / 54)
    assert f.seconds_between(2) == 43_200 and f.seconds_between(0) == math.inf
    assert f.save_interval(15, 5000, 0.1) == 500 and f.save_interval(15, 5000, None) == 900
    assert f.save_interval(0, 5000, 1.0) == 5000 and f.save_interval(0, 5000, None) is None
    assert f.lost_work(600, 20) == 320
    assert f.best_interval(0.5, 3600) == 60
    assert f.goodput(99, 1, 2, 21_600, 1, 8640) == pytest.approx(0.99 * 0.4)
    assert f.goodput(99, 1, 100, 21_600, 0, 0) == 0


def test_the_best_interval_loses_least() -> None:
    """Against the loss it is said to minimise: stalls, and half an interval a failure."""
    stall, between = 2.0, 50_000.0
    best = f.best_interval(stall, between)

    def lost(interval: float) -> float:
        return 1 - f.goodput(interval, stall, 86_400 / between, f.lost_work(interval, 0.0), 0, 0)

    assert lost(best) < min(lost(0.8 * best), lost(1.25 * best))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("index")
    write_index(folder, 100_000, 1000)
    return Index.open(folder)


def test_the_size_of_an_index_is_that_of_one_that_was_written(index: Index) -> None:
    known = settle({}, Dataset((index,), "here"), 8)
    assert {k.source for name, k in known.items() if name in ("images", "image_bytes", "key_bytes")} == {"index"}
    assert (known["key_bytes"].value, known["image_bytes"].value, known["shard_images"].value) == (12, 200_000, 1000)
    mean = len(index.class_lists(0, index.samples)[1]) / index.samples
    assert known["image_classes"].value == mean
    files = sum(path.stat().st_size for path in Path(index.source).iterdir())
    assert f.index_bytes(100_000, 12, mean, 100, 1000) == pytest.approx(files, rel=0.001)


@pytest.mark.parametrize("threshold", [0.0, 0.01])
def test_the_memory_of_an_order_is_that_of_its_arrays(index: Index, threshold: float) -> None:
    bounds = index.block_bounds(128)
    repeats = repeat_factors(index, threshold, bounds) if threshold else None
    length = repeats.length if repeats else index.samples
    order = order_of(index, Stream(0, index.digest, index.samples, length, 64, 0, 128, "blocks", threshold, 0, 0))
    for epoch in range(3):
        order.sample_ids(torch.tensor([epoch * length]).numpy())
    held = order.bounds.nbytes + sum(a.nbytes for pair in order._epochs.values() for a in pair)
    if order.repeats is not None:
        held += order.repeats.sums.nbytes + order.repeats.strided.nbytes
    blocks = f.blocks_of(index.samples, 1000, 128)
    assert f.order_bytes(blocks, index.samples, repeats=bool(threshold)) == pytest.approx(held, rel=0.001)


def test_bytes_from_storage_are_those_that_a_loader_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole epochs: at least what the formula says, at most what is read twice more."""
    source = make_source(tmp_path, [96, 96, 96])
    config, batch, ranks = small_config(block_samples=8), 8, 2
    read: list[int] = []
    plain = Storage.read

    def counting(self: Storage, name: str, offset: int, length: int) -> bytes:
        read.append(length)
        return plain(self, name, offset, length)

    monkeypatch.setattr(Storage, "read", counting)
    state = open_state(source, config, batch)
    steps = 2 * source.samples // batch
    for rank in range(ranks):
        batches = train_steps([source], state, config, rank=rank, world=ranks, step=0)
        for _ in range(steps):
            next(batches)
        batches.close()
    assert epochs_begun(state.at(0).streams[0], steps) == 2
    mean = settle({}, Dataset((source,), "here"), batch)["image_bytes"].value
    expected = f.bytes_a_second(batch, mean, 1.0) * steps
    assert expected <= sum(read) <= expected * (1 + f.read_twice(batch, 8, source.samples))
    requests = f.requests_a_second(batch, 8, 1.0) * steps
    assert requests <= len(read) <= requests * (1 + f.read_twice(batch, 8, source.samples))


class Tiny(nn.Module):
    """Two parameters of two groups, one that is not trained, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(5, 3)), nn.Parameter(torch.zeros(7))
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))


def values(saved: SavedModel, stage: int, ranks: int, *, ema: bool = False) -> list[int]:
    """Bytes of tensors in each rank's own file."""
    return [written_module._values(saved, stage, rank, ranks, ema) for rank in range(ranks)]


def test_what_each_rank_writes_by_hand() -> None:
    model = Tiny()
    saved = list_saved(model, [[model.weight], [model.bias]])
    assert values(saved, 0, 3) == [15 * 8, 7 * 8, 0]
    assert values(saved, 1, 2) == values(saved, 2, 2) == [(8 + 4) * 8, (7 + 3) * 8]
    # 15, 7 and 4 elements in halves of 8, 4 and 2; weights 4 bytes, moments 8, the average 4.
    assert values(saved, 3, 2, ema=True) == [(8 + 4) * 16 + 2 * 4, (7 + 3) * 16 + 2 * 4]
    assert values(saved, 3, 1) == [22 * 12 + 4 * 4]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("ema", [False, True])
def test_many_ranks_are_counted_to_a_hundredth(stage: int, ema: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(40, 50) for _ in range(6)))
    saved = list_saved(
        model, [[p for p in model.parameters() if p.ndim == 2], [p for p in model.parameters() if p.ndim == 1]]
    )
    saved = replace(saved, frozen=(("still", (3000,)),), state=(*saved.state, ("still", (3000,), "torch.float32")))
    exact = count_written(saved, stage, 8, ema=ema)
    monkeypatch.setattr(written_module, "_ALL", dict.fromkeys(range(4), 1))
    bounded = count_written(saved, stage, 8, ema=ema)
    assert bounded.first_rank == exact.first_rank and bounded.other_rank == pytest.approx(exact.other_rank, rel=0.02)
    assert bounded.total == pytest.approx(exact.total, rel=0.01)


def scale_of(*overrides: str, given: dict[str, float] | None = None, rate: float | None = 160.0) -> Scale:
    """Of the demo on 8 GPUs of 2 nodes, 8 images a step, so 0.05 s a step."""
    config = load_config(DEMO, ["model.num_classes=133", *overrides])
    model = Tiny()
    saved = list_saved(model, [[model.weight], [model.bias]])
    known = settle({"images": 80_000.0, **(given or {})}, NONE, config.train.global_batch)
    return look_at_scale(config, 8, 2, known, saved, rate)


def told(scale: Scale) -> dict[str, Any]:
    return {figure.name: figure.value for figure in scale.figures}


def test_saving_in_the_training_thread_stalls_for_the_write_and_leaves_nothing_behind() -> None:
    behind, waiting = told(scale_of()), told(scale_of("checkpoint.asynchronous=false"))
    assert waiting["stall_seconds"] == waiting["write_seconds"] + 0.1 and behind["stall_seconds"] > 0.1
    assert waiting["write_seconds"] == behind["write_seconds"] > behind["stall_seconds"] - 0.1
    assert behind["lost_seconds"] - waiting["lost_seconds"] == pytest.approx(behind["write_seconds"])
    assert waiting["goodput"] < behind["goodput"] < 1


def test_blocks_that_do_not_fit_are_read_singly_and_the_plan_says_so() -> None:
    fitting = scale_of("data.block_samples=64", "data.shuffle=blocks")
    assert told(fitting)["reads_a_second"] == 8 / 64 / 0.05 and told(fitting)["read_twice_share"] == 8 * 64 / 80_000
    scale = scale_of("data.block_samples=64", "data.shuffle=blocks", "data.buffer_mib=10")
    assert told(scale)["reads_a_second"] == 8 / 0.05 and told(scale)["read_twice_share"] == 0
    assert "do not fit" in next(figure.numbers for figure in scale.figures if figure.name == "worker_buffer_bytes")
    assert "cached_share" not in told(scale)
    cached = told(scale_of("data.cache_dir=/cache", "data.cache_gib=1"))
    assert cached["cached_share"] == 2**30 / (80_000 * 165_000)


def test_what_is_not_known_is_left_out_and_said() -> None:
    config = load_config(DEMO, ["model.num_classes=133", "checkpoint.every_minutes=0"])
    saved = list_saved(Tiny(), [])
    scale = look_at_scale(config, 8, 2, settle({}, NONE, 8), saved, None)
    assert not {"index_bytes", "storage_bytes_a_second", "lost_seconds", "goodput"} & told(scale).keys()
    assert len(scale.unknown) == 3
    assert told(scale_of(given={"preemptions": 3.0}))["restarts_a_day"] == pytest.approx(3 + 24 * 8 / 50_677, rel=1e-4)


def test_numbers_can_be_read() -> None:
    assert [size(v) for v in (10, 2048, 3.5 * 2**30, 15 * 2**40)] == ["10 B", "2 KiB", "3.5 GiB", "15 TiB"]
    assert [seconds(v) for v in (0.04, 90, 600, 10_800, 400_000, math.inf)] == [
        "40 ms", "90 s", "10 min", "3 h", "4.63 days", "ever"
    ]  # fmt: skip
    assert share(0.12345) == "12.3%" and number(4096) == "4,096" and number(0.00052) == "0.00052"


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (["images=0"], "images=0 cannot be: images of all training sources is a whole number, above 0"),
        (["images=1.5"], "a whole number"),
        (["images=nan"], "images=nan cannot be"),
        (["gpu_hours=-1"], "gpu_hours=-1 cannot be"),
        (["gpu_hours=inf"], "gpu_hours=inf cannot be"),
        (["preemptions=-1"], "0 or more"),
        (["write_gib_s=fast"], "write_gib_s=fast cannot be"),
        (["image_byte=3"], "did you mean image_bytes?"),
        (["images"], "images= cannot be"),
        (["images=7"], "7 images are fewer than a global batch of 8"),
    ],
)
def test_what_cannot_be_assumed_is_one_paragraph(
    items: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [part for item in items for part in ("--assume", item)]
    assert main(["plan", DEMO, "model.num_classes=133", "data.train=nowhere", *options]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_no_gpus_are_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--nodes", "--gpus-per-node", "--processes"):
        for wrong in ("0", "-4", "nan"):
            with pytest.raises(SystemExit) as ended:
                main(["plan", DEMO, option, wrong])
            assert ended.value.code == 2 and "is not a whole number, 1 or more" in capsys.readouterr().err


def test_given_goes_before_the_index_and_that_before_what_is_assumed(index: Index) -> None:
    known = settle(parse_assumed(["images=1e9", "preemptions=0"]), Dataset((index,), "here"), 4096)
    assert known["images"].value == 10**9 and known["images"].source == known["preemptions"].source == "given"
    assert known["key_bytes"].source == "index" and known["gpu_hours"].source.startswith("assumed: 419 in 54 days")
    with pytest.raises(UserError, match="fewer than a global batch"):
        settle({"images": 4095.0}, NONE, 4096)


def test_the_command_prints_it_and_the_json_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    told = [
        DEMO,
        "model.num_classes=133",
        "data.train=nowhere",
        "--assume",
        "images=80000",
        "--images-per-second",
        "20",
    ]
    assert main(["plan", *told, "--formulas"]) == 0
    lines = capsys.readouterr().out
    assert "  from storage          25.2 MiB/s  = 8 x 165,000 B / 50 ms; 25.2 MiB/s a node" in lines
    assert ": global batch x image_bytes / step; / nodes of a node" in lines
    assert "80,000 images (given)" in lines and max(map(len, lines.splitlines())) <= 120
    assert main(["plan", DEMO, *told, "--json"]) == 0  # of two, so that no activations are traced
    scale = json.loads(capsys.readouterr().out)[0]["scale"]
    assert scale["figures"]["storage_bytes_a_second"]["value"] == 8 * 165_000 / 0.05
    assert [files["stage"] for files in scale["checkpoint_files"]] == [0, 1, 2, 3]
    assert scale["from"]["images"] == {"value": 80_000, "source": "given"}


def test_the_page_of_the_docs_is_what_the_command_prints() -> None:
    """docs/scale.md: every line of the section, as planned with the options that stand above it."""
    wanted = Wanted(512, 64, images_per_second=100.0, activations=False, assumed=parse_assumed(["images=1e8"]))
    printed = page(plan_config(str(ROOT / "docs/examples/hundred_million.yaml"), [], wanted), formulas=True)
    section = printed[printed.index("storage, checkpoints and restarts") :]
    text = (ROOT / "docs/scale.md").read_text()
    assert section in text
    command = "mf-scale plan docs/examples/hundred_million.yaml --nodes 64 --gpus-per-node 8 --images-per-second 100"
    assert f"{command} --assume images=100000000 --formulas" in " ".join(text.replace("\\\n", " ").split())
