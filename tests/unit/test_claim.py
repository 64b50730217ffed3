"""`mf-scale bench claim`: the parted sources, what the folder is held to, what becomes of a run's end."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mf_scale.bench import claim
from mf_scale.bench.claim import KINDS, Asked, Cell, cells, run_claim
from mf_scale.bench.claim_split import Bands, make_split, open_pool, part_samples
from mf_scale.cli import main
from mf_scale.config.load import load_config
from mf_scale.data.index import Index, verify_shards
from mf_scale.errors import FaultError, StoppedOnRequest, UserError
from mf_scale.rundir import RunDir
from mf_scale.tracking.metrics import MetricsLog
from tests.unit.painted import LAYOUTS, painted_source

CONFIG = str(Path(__file__).parents[2] / "configs/experiments/claim.yaml")
PAINTED = ["model.num_classes=4", "train.steps=7"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five samples in shards of two."""
    folder = tmp_path_factory.mktemp("painted")
    painted_source(folder)
    return folder / "packed"


@pytest.fixture(autouse=True)
def _nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test starts a training; counting the models takes seconds, and `test_what_differs_is_the_head` does it."""
    monkeypatch.setattr(claim, "launch", lambda *_: pytest.fail("a command was started"))
    monkeypatch.setattr(claim, "_model", lambda config, kind: {"parameters": len(kind), "gflop": 1.0})


def _asked(source: Path, folder: Path, **changes: Any) -> Asked:
    told: dict[str, Any] = {
        "config": CONFIG, "overrides": PAINTED, "sources": [str(source)], "folder": folder, "seeds": [0, 1],
        "held_out": 2, "bands": Bands(1, 2), "rates": [], "processes": 1, "minutes": 5.0,
    }  # fmt: skip
    return Asked(**{**told, **changes})


def test_every_sample_is_in_one_part_and_the_seed_says_which() -> None:
    parts = [part_samples(50, 20, seed) for seed in (0, 1, 0)]
    for train, held_out in parts:
        assert (len(train), len(held_out)) == (30, 20)
        assert sorted([*train, *held_out]) == list(range(50))
        assert (np.diff(train) > 0).all()
    assert parts[0][1].tolist() == parts[2][1].tolist() != parts[1][1].tolist()


def test_a_part_holds_the_samples_own_bytes_and_the_bands_of_what_is_trained_on(source: Path, tmp_path: Path) -> None:
    pool = open_pool([str(source)])
    make_split(pool, tmp_path / "data", seed=3, held_out=2, bands=Bands(1, 2))
    parts = [Index.open(tmp_path / "data" / name) for name in ("train", "val")]
    keys = [[part.sample(i).key for i in range(part.samples)] for part in parts]
    assert [len(own) for own in keys] == [3, 2]
    assert sorted(keys[0] + keys[1]) == sorted(pool[0].sample(i).key for i in range(5))
    for part in parts:
        verify_shards(part, checksums=True)
        for i in range(part.samples):
            row = part.sample(i)
            origin = next(r for r in map(pool[0].sample, range(5)) if r.key == row.key)
            assert (row.class_ids, row.height, row.segments) == (origin.class_ids, origin.height, origin.segments)
            assert part.storage.read(row.shard, row.offset, row.size) == pool[0].storage.read(
                origin.shard, origin.offset, origin.size
            )
    counts = [sum(label in LAYOUTS[int(key)] for key in keys[0]) for label in range(4)]
    bands = [{0: None, 1: "rare", 2: "common", 3: "frequent"}[count] for count in counts]
    assert len(set(bands)) > 1
    for part in parts:
        assert [c.frequency for c in part.vocabulary.classes] == bands
    assert parts[0].class_counts().tolist() == counts


def test_a_part_is_made_once_and_whole(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, folder = open_pool([str(source)]), tmp_path / "data"
    told: dict[str, Any] = {"seed": 0, "held_out": 2, "bands": Bands(1, 2)}
    with monkeypatch.context() as broken:
        broken.setattr("mf_scale.bench.claim_split.head_digest", lambda head: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_split(pool, folder, **told)
    assert not folder.exists()
    make_split(pool, folder, **told)
    first = (folder / "train/index.json").stat().st_mtime_ns
    make_split(pool, folder, **told)
    assert (folder / "train/index.json").stat().st_mtime_ns == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_sources_that_do_not_go_together_are_refused(source: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="5 samples are in the sources twice, 000"):
        open_pool([str(source), str(source)])
    with pytest.raises(UserError, match="differ in vocabulary"):
        open_pool([str(source), str(packed / "val")])


def test_bands_begin_where_they_are_told_to() -> None:
    assert [Bands(2, 5).of(n) for n in (0, 1, 2, 3, 5, 6)] == [None, "rare", "rare", "common", "common", "frequent"]


def test_a_seed_is_compared_before_the_next_begins(source: Path, tmp_path: Path) -> None:
    asked = _asked(source, tmp_path, rates=[0.5, 0.1])
    order = cells(asked, 0.1)
    assert [(cell.seed, cell.kind) for cell in order[:6]] == [(seed, kind) for seed in (0, 1) for kind in KINDS]
    assert order[6:] == [Cell(kind, 0, 0.5) for kind in KINDS], "the configuration's own rate is not tried twice"
    assert len({cell.run(tmp_path).path for cell in order}) == len(order)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"held_out": 5}, "5 of 5 samples cannot be held out"),
        ({"bands": Bands(2, 2)}, "a class is common from more images on"),
        ({"seeds": [1, 1]}, "seeds are whole numbers from 0"),
        ({"seeds": [0, -1]}, "seeds are whole numbers from 0"),
        ({"rates": [0.1, float("nan")]}, "a learning rate is a number above 0"),
        ({"overrides": [*PAINTED, "seed=4"]}, "seed is set by the experiment itself"),
        ({"overrides": [*PAINTED, "model.kind=per_pixel"]}, "model.kind is set by the experiment itself"),
        ({"overrides": [*PAINTED, "data.task=panoptic"]}, "need data.task=semantic"),
        ({"overrides": []}, "num_classes"),
        ({"processes": 7}, "cannot be shared by 7 ranks"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(
    source: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run_claim(_asked(source, tmp_path / "claim", **changes), [])
    assert not (tmp_path / "claim").exists()


class Program:
    """In place of the ranks: notes the commands, and leaves what a training and an evaluation leave."""

    def __init__(self, code: Callable[[int], int] = lambda call: 0) -> None:
        self.calls: list[list[str]] = []
        self.code = code

    def __call__(self, arguments: Sequence[str], processes: int, asked: list[str]) -> int:
        self.calls.append(list(arguments))
        code = self.code(len(self.calls))
        if code:
            return code
        if arguments[0] == "train":
            told = dict(item.split("=", 1) for item in arguments if "=" in item)
            log = MetricsLog(Path(told["run_dir"]) / "metrics.jsonl")
            log.write("step", 7, loss=2.0 + int(told["seed"]), step_time=1.5, data_wait=0.5)
            log.close()
            return 0
        run, split = RunDir(Path(arguments[1])), arguments[3]
        run.report.mkdir(exist_ok=True)
        value = (KINDS.index(run.path.name.split("-lr-")[0]) + 1) / 10
        of_class = ["rare", "rare", "frequent", None]
        bands = {"rare": {"mIoU": value}, "common": {"mIoU": None}, "frequent": {"mIoU": value}}
        semantic = {"pixel_accuracy": 0.9, "classes": 3, "per_class": {"IoU": [value, None, value, 0.0]}}
        results = {"step": 7, "mIoU": value, "semantic": semantic, "bands": {"of_class": of_class, **bands}}
        (run.report / f"evaluation-{split}.json").write_text(json.dumps(results))
        return 0


def test_what_is_finished_is_not_run_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, asked = Program(), _asked(source, tmp_path / "claim")
    monkeypatch.setattr(claim, "launch", program)
    text = run_claim(asked, [])
    assert [call[0] for call in program.calls] == ["train", "evaluate", "evaluate"] * 6
    trains = [call for call in program.calls if call[0] == "train"]
    assert {f"data.train={tmp_path}/claim/seed-1/data/train", "seed=1", "model.kind=per_pixel_plus"} <= set(trains[4])
    assert {item for call in trains for item in call if item.startswith("optimizer.lr")} == {"optimizer.lr=0.001"}
    assert run_claim(asked, []) == text == (tmp_path / "claim/claim.md").read_text().rstrip()
    assert len(program.calls) == 18
    # One that was lost is made up for, and nothing else: of the training only what is missing.
    (tmp_path / "claim/seed-0/per_pixel-lr-0.001/report/evaluation-val.json").unlink()
    shutil.rmtree(tmp_path / "claim/seed-1/per_pixel_plus-lr-0.001")
    del program.calls[:]
    run_claim(asked, [])
    assert [call[0] for call in program.calls] == ["train", "evaluate", "train", "evaluate", "evaluate"]
    assert program.calls[1][3] == "val"
    summary = json.loads((tmp_path / "claim/claim.json").read_text())
    assert summary["rows"]["mask_classification"]["val"]["seen"]["difference"]["mean"] == pytest.approx(0.2)
    assert summary["models"]["per_pixel"] == {"parameters": 9, "gflop": 1.0}
    assert summary["runs"][0]["step_seconds"] == 1.0


def test_more_seeds_and_rates_join_a_folder_other_settings_do_not(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "launch", Program())
    run_claim(_asked(source, tmp_path, seeds=[0]), [])
    text = run_claim(_asked(source, tmp_path, seeds=[0, 1], rates=[0.5]), [])
    assert "lr 0.001 | lr 0.5" in text and "(2 seeds)" in text
    for changes, said in (
        ({"overrides": [*PAINTED, "data.flip=0"]}, "another data.flip "),
        ({"held_out": 1}, "another held_out "),
        ({"bands": Bands(1, 3)}, "another bands.common "),
        ({"overrides": ["model.num_classes=4", "train.steps=8"]}, "another train.steps "),
    ):
        with pytest.raises(UserError, match=said):
            run_claim(_asked(source, tmp_path, **changes), [])


COUNT = claim._model


def test_what_differs_is_the_head() -> None:
    models = {kind: COUNT(load_config(CONFIG), kind) for kind in KINDS}
    plain, plus, masks = (models[kind] for kind in KINDS)
    assert 3e6 < plain["parameters"] < masks["parameters"] < 1.2 * plain["parameters"]
    assert abs(plus["parameters"] - masks["parameters"]) < 0.01 * plain["parameters"]
    assert 0 < plain["gflop"] < plus["gflop"]


@pytest.mark.parametrize(
    ("code", "error"), [(2, UserError), (3, UserError), (137, UserError), (75, FaultError), (85, StoppedOnRequest)]
)
def test_a_run_that_ends_otherwise_ends_the_command(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    stops: list[str] = []

    def end(call: int) -> int:
        if call == 5 and code == 85:
            stops.append("SIGTERM")
        return code if call == 5 else 0

    program = Program(end)
    monkeypatch.setattr(claim, "launch", program)
    with pytest.raises(error) as caught:
        run_claim(_asked(source, tmp_path), stops)
    assert type(caught.value) is error
    assert len(program.calls) == 5
    assert len(json.loads((tmp_path / "claim.json").read_text())["runs"]) == 1, "what is finished stands in the table"


def test_a_run_that_takes_too_long_is_asked_to_stop(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(arguments: Sequence[str], processes: int, asked: list[str]) -> int:
        deadline = 200
        while not asked and (deadline := deadline - 1):
            time.sleep(0.05)
        return 85 if asked == ["SIGTERM"] else 0

    monkeypatch.setattr(claim, "launch", wait)
    with pytest.raises(FaultError, match=r"train took more than 0.001 minutes"):
        run_claim(_asked(source, tmp_path, minutes=0.001), [])


def test_the_command_line_reaches_the_experiment(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claim, "launch", Program())
    monkeypatch.setattr("mf_scale.training.preemption.install_handlers", lambda: type("Flag", (), {"signals": []}))
    told = ["--source", str(source), "--folder", str(tmp_path / "claim"), "--held-out", "2", "--rare", "1"]
    assert main(["bench", "claim", CONFIG, *PAINTED, *told, "--common", "2", "--seeds", "4"]) == 0
    assert "| mask_classification (1 seed)" in capsys.readouterr().out
    assert main(["bench", "claim", CONFIG, *PAINTED, *told, "--common", "1"]) == 2
    assert "--rare, --common" in capsys.readouterr().err
