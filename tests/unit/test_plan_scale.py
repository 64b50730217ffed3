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
from mf_scale.config.schema import DataConfig
from mf_scale.data import making
from mf_scale.data.index import Index
from mf_scale.data.loader import train_steps
from mf_scale.data.order import Stream, epochs_begun, rank_lanes, worker_share
from mf_scale.data.repeat import repeat_factors
from mf_scale.data.sources import order_of
from mf_scale.data.storage import Storage
from mf_scale.errors import UserError
from mf_scale.plan import formulas as f
from mf_scale.plan import written as written_module
from mf_scale.plan.assumed import parse_assumed, settle
from mf_scale.plan.dataset import Dataset
from mf_scale.plan.lanes import look_at_lanes
from mf_scale.plan.planning import Wanted, plan_config
from mf_scale.plan.scale import Scale, look_at_scale
from mf_scale.plan.scale_numbers import number, seconds, share, size
from mf_scale.plan.scale_run import Figure
from mf_scale.plan.text import page
from mf_scale.plan.written import SavedModel, count_written, list_saved
from tests.sources import make_source, open_state, small_config

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs/demo.yaml")
NONE = Dataset((), "none here")


def test_the_formulas_by_hand() -> None:
    assert f.index_bytes(10, 12, 6, 2, 3) == 10 * 84 + 2 * 139 + 3 * 63
    assert f.blocks_of(2500, 1000, 128) == 2 * 8 + 4 and f.blocks_of(40, 1000, 128) == 1
    assert f.blocks_of(7, 7 / 3, 128) == 3 and f.blocks_of(49 * 107, 107.0, 8) == 49 * 14
    assert [f.mean_block(*of) for of in ((8000, 1000, 128), (8000, 10, 128), (40, 1000, 8))] == [125, 10, 8]
    assert [f.order_bytes(100, 1600, repeats=some, blocked=True) for some in (False, True)] == [3200, 4800]
    assert [f.order_bytes(100, 1600, repeats=some, blocked=False) for some in (False, True)] == [800, 2400]
    assert [f.worker_lanes(8, workers) for workers in (0, 1, 3, 8, 9)] == [8, 8, 3, 1, 8]
    assert f.buffered_bytes(2, 128, 1000.0) == 256_000
    assert f.bytes_a_second(4096, 165_000, 0.5) == 1_351_680_000
    assert f.requests_a_second(4096, 0, 128, 0.5) == 64 and f.requests_a_second(1024, 3072, 128, 0.5) == 16 + 6144
    assert f.kept_blocks(4_000_000, 1_000_001) == 3 and f.kept_blocks(10, 11) == 0
    # Nine lanes over ten images of one block: each reads it whole, so eight times more than once.
    assert f.read_twice(4096, 128, 100_000_000) == 0.00524288 and f.read_twice(9, 10, 10) == 9
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


@pytest.mark.parametrize("shuffle", ["blocks", "full"])
@pytest.mark.parametrize("threshold", [0.0, 0.01])
def test_the_memory_of_an_order_is_that_of_its_arrays(index: Index, threshold: float, shuffle: str) -> None:
    bounds = index.block_bounds(128)
    repeats = repeat_factors(index, threshold, bounds) if threshold else None
    length = repeats.length if repeats else index.samples
    order = order_of(index, Stream(0, index.digest, index.samples, length, 64, 0, 128, shuffle, threshold, 0, 0))
    for epoch in range(3):
        order.sample_ids(torch.tensor([epoch * length]).numpy())
    held = order.bounds.nbytes + sum(a.nbytes for pair in order._epochs.values() for a in pair)
    if order.repeats is not None:
        held += order.repeats.sums.nbytes + order.repeats.strided.nbytes
    blocks = f.blocks_of(index.samples, 1000, 128)
    planned = f.order_bytes(blocks, index.samples, repeats=bool(threshold), blocked=shuffle == "blocks")
    assert planned == pytest.approx(held, rel=0.002)


def reads_of(
    source: Index, config: DataConfig, batch: int, ranks: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Length of every read of all ranks' loaders in so many steps."""
    read: list[int] = []
    plain = Storage.read

    def counting(self: Storage, name: str, offset: int, length: int) -> bytes:
        read.append(length)
        return plain(self, name, offset, length)

    monkeypatch.setattr(Storage, "read", counting)
    state = open_state(source, config, batch)
    for rank in range(ranks):
        batches = train_steps([source], state, config, rank=rank, world=ranks, step=0)
        for _ in range(steps):
            next(batches)
        batches.close()
    assert epochs_begun(state.at(0).streams[0], steps) == 2
    return read


def planned_of(source: Index, ranks: int, *overrides: str) -> Scale:
    """Of the demo's configuration with a step a second, 8 images in blocks of 8, no workers."""
    settings = ["model.num_classes=133", "train.global_batch=8", "data.block_samples=8", "data.workers=0"]
    config = load_config(DEMO, [*settings, "data.shuffle=blocks", *overrides])
    known = settle({}, Dataset((source,), "here"), 8)
    return look_at_scale(config, ranks, 1, known, list_saved(Tiny(), []), 8.0)


@pytest.mark.parametrize("tars", [[96] * 3, [10] * 28 + [8], [4] * 72])
def test_bytes_from_storage_are_those_that_a_loader_reads(
    tars: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole epochs: at least what the plan says, at most what is read twice more; a block ends with its tar."""
    source, ranks = make_source(tmp_path, tars), 2
    steps = 2 * source.samples // 8
    read = reads_of(source, small_config(block_samples=8), 8, ranks, steps, monkeypatch)
    plan = told(planned_of(source, ranks))
    for found, expected in ((sum(read), plan["storage_bytes_a_second"]), (len(read), plan["reads_a_second"])):
        assert 0.999 * steps * expected <= found <= steps * expected * (1 + plan["read_twice_share"])


@pytest.mark.parametrize("slots", [8, 7, 4, 1, 0])
def test_a_loader_keeps_the_blocks_that_fit_and_reads_the_rest_singly(
    slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process of 8 lanes with room for some blocks, in bytes of the largest."""
    source = make_source(tmp_path, [96] * 3)
    offset, size_of, bounds = source.column("offset"), source.column("size"), source.block_bounds(8)
    last = bounds[1:] - 1
    largest = int((offset[last] + size_of[last] - offset[bounds[:-1]]).max())
    monkeypatch.setattr(making, "MIB", slots * largest + 100)
    steps = 2 * source.samples // 8
    read = reads_of(source, small_config(block_samples=8, buffer_mib=1), 8, 1, steps, monkeypatch)
    (lanes,) = look_at_lanes([8], 1, 0, slots)
    assert (lanes.lanes, lanes.kept, lanes.of_worker, lanes.kept_of_worker) == (8, slots, 8, slots)
    assert f.requests_a_second(lanes.kept, 8 - lanes.kept, 8, 1.0) * steps == pytest.approx(len(read), rel=0.1)


def test_lanes_of_each_source_are_those_of_its_workers() -> None:
    """Against the loader's own shares: 21 lanes of three sources, 3 ranks of 2 workers, room for 2 blocks a source."""
    counts, ranks, workers = [11, 8, 2], 3, 2
    held: dict[tuple[int, int, int], int] = {}
    for rank in range(ranks):
        for worker in range(workers):
            for lane in worker_share(rank_lanes(21, rank, ranks), worker, workers).lanes:
                key = int(lane >= 11) + int(lane >= 19), rank, worker
                held[key] = held.get(key, 0) + 1
    for place, source in enumerate(look_at_lanes(counts, ranks, workers, 2)):
        own = [lanes for (of, _, _), lanes in held.items() if of == place]
        assert (source.lanes, source.of_worker) == (counts[place], max(own))
        assert source.kept == sum(min(2, lanes) for lanes in own) and source.kept_of_worker == min(2, max(own))
    assert look_at_lanes([6], 2, 8, 1)[0].of_worker == 3  # fewer lanes than workers: each makes whole steps
    assert look_at_lanes([5], 8, 8, 1)[0].fits


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


def figure_of(scale: Scale, name: str) -> Figure:
    return next(figure for figure in scale.figures if figure.name == name)


def test_blocks_that_do_not_fit_are_read_singly_and_the_plan_says_so() -> None:
    blocks = ["data.block_samples=50", "data.shuffle=blocks", "data.workers=0"]
    fitting = scale_of(*blocks)
    assert told(fitting)["reads_a_second"] == 8 / 50 / 0.05 and told(fitting)["read_twice_share"] == 8 * 50 / 80_000
    assert "; fit: data" in figure_of(fitting, "worker_buffer_bytes").numbers
    scale = scale_of(*blocks, "data.buffer_mib=5")
    assert told(scale)["reads_a_second"] == 8 / 0.05 and told(scale)["read_twice_share"] == 0
    assert "0 of 1 lanes' blocks fit" in figure_of(scale, "worker_buffer_bytes").numbers
    some = scale_of(*blocks, "data.buffer_mib=25", "train.global_batch=32", rate=640.0)  # 3 of a rank's 4
    assert told(some)["reads_a_second"] == pytest.approx((24 / 50 + 8) / 0.05)
    assert "3 of 4 lanes' blocks fit" in figure_of(some, "worker_buffer_bytes").numbers
    assert figure_of(some, "reads_a_second").numbers == "(24 / 50 + 8) / 50 ms, of 7.87 MiB and 161 KiB each"
    assert "cached_share" not in told(scale)
    cached = told(scale_of("data.cache_dir=/cache", "data.cache_gib=1"))
    assert cached["cached_share"] == 2**30 / (80_000 * 165_000)


def test_sources_share_the_memory_for_blocks_by_their_number() -> None:
    """Lanes 0 to 23 of the first source, 8 of the other: rank 0 has 3 and 1, each source a half of 4 blocks' room."""
    overrides = ["data.sources=[{index: a, weight: 3}, {index: b}]", "data.train=null", "data.block_samples=50"]
    overrides += ["data.shuffle=blocks", "data.workers=0", "train.global_batch=32", "data.buffer_mib=32"]
    numbers = figure_of(scale_of(*overrides, rate=640.0), "worker_buffer_bytes").numbers
    assert "2 of 3 lanes' blocks of source 0, 1 of 1 lanes' blocks of source 1 fit" in numbers
    assert numbers.endswith("data.buffer_mib = 32 / 2 sources")
    assert told(scale_of(*overrides, rate=640.0))["reads_a_second"] == pytest.approx((24 / 50 + 8) / 0.05)


def test_blocks_end_with_their_tars_and_small_data_is_read_many_times() -> None:
    short = scale_of("data.shuffle=blocks", "data.block_samples=50", given={"shard_images": 10.0})
    assert told(short)["reads_a_second"] == 8 / 10 / 0.05 and told(short)["read_twice_share"] == 8 * 10 / 80_000
    assert figure_of(short, "reads_a_second").numbers == "8 / 10 / 50 ms, of 1.57 MiB each"
    small = scale_of("data.shuffle=blocks", "data.block_samples=64", "train.global_batch=128", given={"images": 256.0})
    assert figure_of(small, "read_twice_share").shown == "32 times"
    singly = scale_of("data.shuffle=full")
    assert told(singly)["worker_buffer_bytes"] == told(singly)["read_twice_share"] == 0
    assert told(singly)["reads_a_second"] == 8 / 0.05


@pytest.mark.parametrize("stage", range(4))
def test_a_page_gives_one_size_of_what_a_rank_writes(stage: int) -> None:
    plan = plan_config(DEMO, ["model.num_classes=133", "data.train=nowhere", f"zero.stage={stage}"], 4)
    written = plan.scale.written[stage]
    assert (plan.checkpoints.first_rank, plan.checkpoints.other_ranks) == (written.first_rank, written.other_rank)


def test_what_is_not_known_is_left_out_and_said() -> None:
    config = load_config(DEMO, ["model.num_classes=133", "checkpoint.every_minutes=0"])
    saved = list_saved(Tiny(), [])
    scale = look_at_scale(config, 8, 2, settle({}, NONE, 8), saved, None)
    assert not {"index_bytes", "storage_bytes_a_second", "lost_seconds", "goodput"} & told(scale).keys()
    assert len(scale.unknown) == 3 and scale.unknown[2].startswith("what a failure costs without a step's time")
    never = scale_of("checkpoint.every_minutes=0", "checkpoint.every_steps=0").unknown
    assert never == (
        "what a failure costs: no checkpoint is written on the way (checkpoint.every_steps and every_minutes are 0)",
    )
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
        (["images=9007199254740994"], "a plan counts 9,007,199,254,740,992 (2^53) at most"),
        (["images=1e300"], "(2^53) at most"),
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
