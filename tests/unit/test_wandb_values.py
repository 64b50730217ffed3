"""The one law from metrics.jsonl to W&B, and what W&B shows of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mf_scale.config.schema import Config
from mf_scale.config.urls import without_secrets
from mf_scale.rundir import RunDir
from mf_scale.tracking.metrics import MetricsLog, read_metrics
from mf_scale.tracking.pictures import write_class_map
from mf_scale.tracking.wandb_sync import shown_settings, sync_lines
from mf_scale.tracking.wandb_tables import (
    MASK_IDS,
    MOST_PICTURES,
    WHOLE_TABLE,
    evaluation_overlays,
    evaluation_tables,
    mask_names,
    told_apart,
)
from mf_scale.tracking.wandb_values import rows, wandb_summary, wandb_values

STEP = {
    "event": "step",
    "step": 40,
    "time": 7.5,
    "start": 2,
    "loss": 3.5,
    "loss_class": 1.5,
    "loss_dice": None,
    "nonfinite": ["loss_dice"],
    "loss_layers": {"class": [0.5, 0.25], "focal": [0.1]},
    "lr": 0.01,
    "lrs": {"backbone": 0.001, "rest/no_decay": 0.01},
    "grad_norm": 2.0,
    "grad_norms": {"backbone": 1.0},
    "images_per_second": 8.0,
    "step_time": 0.5,
    "data_wait": 0.1,
    "phases": {"data": 0.1, "forward": 0.2},
    "memory": {"device_peak_gib": None, "host_rss_gib": 1.5},
    "matched": 17.0,
    "skipped": 1,
    "quarantined": 3,
    "updates": 38,
    "compiled": True,
}


def test_every_number_of_a_step_has_one_name_and_nothing_else_is_sent() -> None:
    assert wandb_values(STEP) == {
        "train/loss": 3.5,
        "train/loss_class": 1.5,
        "loss_layers/class/0": 0.5,
        "loss_layers/class/1": 0.25,
        "loss_layers/focal/0": 0.1,
        "train/lr": 0.01,
        "lr/backbone": 0.001,
        "lr/rest/no_decay": 0.01,
        "train/grad_norm": 2.0,
        "grad_norm/backbone": 1.0,
        "speed/images_per_second": 8.0,
        "speed/step_time": 0.5,
        "speed/data_wait": 0.1,
        "phases/data": 0.1,
        "phases/forward": 0.2,
        "memory/host_rss_gib": 1.5,
        "train/matched": 17.0,
        "train/skipped": 1,
        "train/skipped_total": 2,
        "train/quarantined": 3,
        "train/updates": 38,
    }


@pytest.mark.parametrize(
    ("record", "values"),
    [
        ({"event": "validation", "weights": "ema", "loss": 2.0, "undecodable": 1}, {"loss": 2.0, "undecodable": 1}),
        ({"event": "evaluation", "split": "val", "where": "command", "samples": 9, "mIoU": 0.5}, {"mIoU": 0.5}),
        ({"event": "straggler", "rank": 3, "host": "n", "phase": "data", "seconds": 2.0, "median": 1.0}, None),
        ({"event": "keys", "keys": ["a"]}, {}),
        ({"event": "save", "seconds": 1.0}, {}),
        ({"event": "start", "steps": 9}, {}),
    ],
)  # fmt: skip
def test_other_events(record: dict[str, Any], values: dict[str, float] | None) -> None:
    prefix = "evaluation/val" if record["event"] == "evaluation" else record["event"]
    expected = {"rank": 3, "seconds": 2.0, "median": 1.0} if values is None else values
    assert wandb_values({**record, "step": 4, "time": 1.0}) == {f"{prefix}/{n}": v for n, v in expected.items()}


@pytest.mark.parametrize(
    ("code", "state"), [(0, "done"), (2, "mistake"), (3, "guard"), (75, "fault"), (85, "stopped"), (1, "failed")]
)
def test_where_a_run_stands(code: int, state: str) -> None:
    stop = {"event": "stop", "step": 9, "time": 1.0, "reason": "so", "exit_code": code}
    told = {"run/state": state, "run/reason": "so", "run/step": 9, "run/exit_code": code}
    assert wandb_summary(stop) == told
    assert wandb_summary({"event": "start", "step": 9, "time": 1.0, "steps": 20})["run/state"] == "running"


def _history(run: RunDir) -> None:
    """A stop at 4, a start from 2 with other losses, an evaluation that no longer holds and one that does."""
    for start, first, last in ((1, 0, 4), (2, 2, 6)):
        log = MetricsLog(run.metrics, start=start)
        log.write("start", first, steps=6, world=2, versions={"torch": "2"}, code={"fingerprint": "f", "commit": None})
        for step in range(first + 1, last + 1):
            log.write("step", step, loss=start + step / 10)
        log.write("validation", last, loss=float(start))
        log.write("evaluation", last, split="val", mIoU=0.1 * start)
        log.write("stop", last, reason="asked", exit_code=85)
        log.close()


@pytest.mark.parametrize("kept", [4, 6])
def test_a_clean_run_is_what_the_file_holds_step_by_step(tmp_path: Path, kept: int) -> None:
    run = RunDir(tmp_path)
    _history(run)
    run.report.mkdir()
    (run.report / "evaluation-val.json").write_text(f'{{"split": "val", "step": {kept}}}')
    records = read_metrics(run.metrics)
    opened, *lines = list(sync_lines(run, records, {"open": {}}))
    told = [(line["at"], line["row"].get("train/loss")) for line in lines if "row" in line]
    assert told == [(1, 1.1), (2, 1.2), (3, 2.3), (4, 2.4), (5, 2.5), (6, 2.6)] and opened == {"open": {}}
    assert rows(records)[6]["validation/loss"] == 2.0 and rows(records)[6]["evaluation/val/mIoU"] == 0.2
    assert "validation/loss" not in rows(records)[4], "it was superseded with its step"
    tables = [line for line in lines if "evaluation" in line]
    assert tables == ([{"evaluation": "evaluation-val.json", "at": 6}] if kept == 6 else [])
    assert lines[-2]["summary"]["run/state"] == "stopped" and lines[-1]["finish"] == 85


def test_secrets_never_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    config = Config()
    config.data.train = "https://user:p4ss@host/data?sig=qu3ry"
    config.deepspeed = {"x": {"hf_token": "t0ken", "list": ["s3://a:w0rd@c/d"]}, "said": "key 0123456789abcdef"}
    text = str(shown_settings(config, []))
    assert not [secret for secret in ("p4ss", "qu3ry", "t0ken", "w0rd", "0123456789abcdef") if secret in text]
    assert "https://***@host/data?***" in text
    assert without_secrets({"lr": 0.1, "steps": [1, 2]}) == {"lr": 0.1, "steps": [1, 2]}


def _results(classes: int) -> dict[str, Any]:
    values: list[float | None] = [None, *(k / classes for k in range(1, classes))]
    return {
        "class_names": [f"class {k}" for k in range(classes)],
        "things": [True] * classes,
        "semantic": {"per_class": {"IoU": values}},
        "instances": {"per_class": {"AP": values[::-1], "instances": [1] * classes}},
        "bands": {"of_class": ["rare"] * classes} | {b: {"classes": 1, "mIoU": 0.1} for b in ("rare", "frequent")},
    }


def test_tables_of_ten_thousand_classes_stay_readable() -> None:
    whole = {table.name: table for table in evaluation_tables(_results(WHOLE_TABLE))}
    assert list(whole) == ["bands", "classes"] and len(whole["classes"].rows) == WHOLE_TABLE - 1
    tables = {table.name: table for table in evaluation_tables(_results(10_000))}
    assert [(name, len(table.rows)) for name, table in tables.items()] == [("bands", 2), ("best", 50), ("worst", 50)]
    assert tables["best"].columns == ["class", "id", "thing", "band", "IoU", "AP", "instances"]
    assert [row[1] for row in tables["best"].rows[:2]] == [9999, 9998], "class 0 has no value"
    assert [row[1] for row in tables["worst"].rows[:2]] == [1, 2]
    assert all(len(row) == len(table.columns) for table in tables.values() for row in table.rows)
    assert evaluation_tables({"class_names": [], "things": []}) == []


def test_masks_of_a_large_vocabulary_fit_into_their_bits_and_never_change_a_name() -> None:
    names = [f"class {k}" for k in range(10_000)]
    many = np.arange(1000).reshape(20, 50)
    first = told_apart(10_000, [], [np.array([[-1, 9000, 9000, 7]])])
    assert first == [9000, 7]
    later = told_apart(10_000, first, [many])
    assert later[:2] == first and len(later) == len(set(later)) == MASK_IDS
    told = mask_names(names, later)
    assert told[1] == "class 9000" and max(told) == 255 and told[255] == "another class"
    assert mask_names(["sky"], told_apart(1, [], [])) == {0: "none", 1: "sky"}


def test_overlays_take_the_size_of_their_picture_and_leave_out_what_is_gone(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / "a.png")
    write_class_map(tmp_path / "a-classes.png", np.array([[9_999, -1]]).repeat(5, 0))
    views = [{"title": "image", "file": "a.png"}, {"title": "prediction", "file": "a.png", "classes": "a-classes.png"}]
    gone = [{"title": "image", "file": "gone.png"}, {"title": "prediction", "file": "gone.png", "classes": "no.png"}]
    drawn = [{"title": "image", "file": "a.png"}, {"title": "prediction", "file": "a.png"}]
    pictures = [{"key": key, "views": v} for key, v in (("one", views), ("two", gone), ("three", drawn))]
    results = {"class_names": [str(k) for k in range(10_000)], "pictures": pictures}
    (one, two), apart = evaluation_overlays(results, tmp_path, [])
    assert apart == [9_999] and one.caption == "one" and two.caption == "three · prediction" and not two.masks
    mask = one.masks["prediction"]
    assert mask.shape == (20, 40) and mask.dtype == np.uint8
    assert (mask[:, :20] == 1).all() and (mask[:, 20:] == 0).all()
    kinds = ["first"] * 9 + ["best"] * 4 + ["median"] * 4 + ["worst"] * 4
    results["pictures"] = [{"key": f"{place}", "why": why, "views": views} for place, why in enumerate(kinds)]
    few = [overlay.caption for overlay in evaluation_overlays(results, tmp_path, [])[0]]
    assert few == ["17 · worst", "0 · first", "9 · best", "13 · median", "18 · worst", "1 · first"]
    assert len(few) == MOST_PICTURES


def test_what_is_told_late_of_an_older_step_takes_its_place() -> None:
    lines = [{"event": "step", "step": step, "time": 1.0, "loss": 1.0} for step in (10, 20)]
    late = {"event": "evaluation", "step": 15, "time": 2.0, "split": "val", "mIoU": 0.5}
    assert list(rows([*lines, late])) == [10, 15, 20]
