"""What a start refuses, says and takes over: vocabularies, a new class head, fewer queries than segments."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mf_scale.config.schema import Config
from mf_scale.config.validate import check_vocabulary, validate
from mf_scale.data.index import Index
from mf_scale.distributed.env import World
from mf_scale.errors import UserError
from mf_scale.models.build import build_model
from mf_scale.rundir import WEIGHTS, RunDir
from mf_scale.training import preflight
from mf_scale.training.fence import LOCK
from mf_scale.training.initial import CLASS_HEADS, initial_model
from mf_scale.training.optimizer import parameter_groups
from mf_scale.training.preflight import examine, segment_counts
from mf_scale.vocabulary import ClassInfo, Vocabulary
from tests.unit.painted import VOCABULARY_4, painted_config, painted_source, write_checkpoint

OTHER_4 = Vocabulary("other", tuple(ClassInfo(n, True, i + 1) for i, n in enumerate(("cat", "dog", "sea", "sand"))))
SIX = Vocabulary("six", tuple(ClassInfo(f"class {i}", True, i + 1) for i in range(6)))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return painted_source(tmp_path_factory.mktemp("source"))


def _config(index: Index | None = None, *, kind: str = "mask_classification", queries: int = 3) -> Config:
    config = painted_config(train__global_batch=2)
    config.model.kind = kind
    config.model.backbone = replace(config.model.backbone, name="resnet10t", weights="none")
    config.model.pixel_decoder = replace(config.model.pixel_decoder, width=16, mask_channels=16)
    config.model.decoder = replace(config.model.decoder, layers=1, queries=queries, width=16, heads=2, feedforward=16)
    config.data.train = None if index is None else str(index.source)
    config.eval.every_steps = config.eval.metrics_every_steps = 0  # else it is said that there is nothing to look at
    if kind != "mask_classification":
        config.data.task = "semantic"
    return config


def _trained(
    folder: Path, vocabulary: Vocabulary, kind: str = "mask_classification"
) -> tuple[str, dict[str, torch.Tensor]]:
    """A run on another vocabulary, and its weights."""
    config = _config(kind=kind)
    model = build_model(config.model, len(vocabulary), seed=7)
    write_checkpoint(RunDir(folder), config, model, 3, vocabulary)
    return str(folder), model.state_dict()


@pytest.fixture
def lock() -> Iterator[list[int]]:
    held: list[int] = []
    yield held
    while held:
        os.close(held.pop())


@pytest.mark.parametrize(
    ("task", "queries", "sentence"),
    [
        ("panoptic", 3, "60.0% of the images have more segments than the 3 queries; .* (most: 4; raise model.decoder"),
        ("panoptic", 4, None),
        ("semantic", 3, "40.0% of the images have more segments than the 3 queries"),
        ("instance", 1, "60.0% of the images may have more segments than the 1 queries; .* (most: 2;"),
        ("instance", 2, None),
    ],
)
def test_fewer_queries_than_segments_is_said_with_the_share_of_images(
    index: Index, tmp_path: Path, lock: list[int], task: str, queries: int, sentence: str | None
) -> None:
    config = _config(index, queries=queries)
    config.data.task = task
    notes = examine(config, RunDir(tmp_path), World(), lock)["notes"]
    if sentence is None:
        assert notes == []
    else:
        assert len(notes) == 1
        for part in sentence.split(" .* "):
            assert part in notes[0]


def test_the_segments_of_an_image_are_counted_as_the_task_has_them(index: Index) -> None:
    """Quarters: [sky cat grass dog], [sky sky grass -], [cat cat sky grass], [dog sky - grass], [grass sky cat dog]."""
    painted = np.argsort([index.sample(i).key for i in range(index.samples)])  # packing shuffles
    assert np.concatenate(list(segment_counts(index, "panoptic", images=2)))[painted].tolist() == [4, 2, 4, 3, 4]
    assert np.concatenate(list(segment_counts(index, "semantic", images=2)))[painted].tolist() == [4, 2, 3, 3, 4]
    assert np.concatenate(list(segment_counts(index, "instance", images=2)))[painted].tolist() == [2, 0, 2, 1, 2]


def test_the_baselines_have_no_queries_to_be_short_of(index: Index, tmp_path: Path, lock: list[int]) -> None:
    assert examine(_config(index, kind="per_pixel", queries=1), RunDir(tmp_path), World(), lock)["notes"] == []


def test_weights_of_a_vocabulary_without_a_class_in_common_name_both_and_offer_a_new_head(
    index: Index, tmp_path: Path, lock: list[int]
) -> None:
    config = _config(index)
    config.train.init_from, _ = _trained(tmp_path / "old", SIX)
    with pytest.raises(UserError) as refused:
        examine(config, RunDir(tmp_path / "new"), World(), lock)
    told = str(refused.value)
    assert "'six' (6 classes)" in told and "'painted' (4 classes)" in told and "no class of the one is in" in told
    assert "--reinit-head" in told and "merge table" in told
    config.train.reinit_head = True
    assert examine(config, RunDir(tmp_path / "newer"), World(), lock)["checkpoint"] is None


def test_a_resumed_run_with_another_source_is_refused_whatever_reinit_head_says(
    index: Index, tmp_path: Path, lock: list[int]
) -> None:
    config = _config(index)
    config.train.init_from, _ = _trained(tmp_path / "run", SIX)
    config.train.reinit_head = True
    run = RunDir(tmp_path / "run")
    run.metrics.write_text("")
    with pytest.raises(UserError, match=r"start a new run_dir with train\.init_from=.*run --reinit-head"):
        examine(config, run, World(), lock)


def test_what_others_left_is_swept_away_before_it_is_seen_what_is_there(
    index: Index, tmp_path: Path, lock: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a start that was cut off could commit in between, behind the back of the new one."""
    _trained(tmp_path / "run", VOCABULARY_4)
    run, seen = RunDir(tmp_path / "run"), list[list[str]]()
    run.metrics.write_text("")
    (run.checkpoints / ".writing-abc-step-00000004").mkdir()
    look = preflight.newest_sound_checkpoint

    def looks(run: RunDir) -> tuple[Path | None, dict[Path, str]]:
        seen.append([LOCK for _ in run.path.glob(LOCK)] + sorted(folder.name for folder in run.checkpoints.iterdir()))
        return look(run)

    monkeypatch.setattr(preflight, "newest_sound_checkpoint", looks)
    found = examine(_config(index, queries=4), run, World(), lock)
    assert seen == [[LOCK, "step-00000003"]]
    assert found["checkpoint"] == str(run.checkpoint(3)) and found["start"] == 1
    assert "removed the unfinished .writing-abc-step-00000004" in found["notes"]


@pytest.mark.parametrize("vocabulary", [SIX, OTHER_4], ids=["other size", "same size"])
@pytest.mark.parametrize("kind", list(CLASS_HEADS))
def test_a_new_class_head_and_all_else_from_the_old_run(tmp_path: Path, vocabulary: Vocabulary, kind: str) -> None:
    config = _config(kind=kind)
    config.train.init_from, old = _trained(tmp_path / "old", vocabulary, kind)
    config.train.reinit_head = True
    model, (note,) = initial_model(config, VOCABULARY_4, None)
    fresh = build_model(config.model, 4, seed=config.seed).state_dict()
    anew = [name for name in fresh if name.startswith(CLASS_HEADS[kind])]
    assert anew
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh[name] if name in anew else old[name]), name
        assert (name in note) == (name in anew)
    shape = list(old[anew[0]].shape)
    assert f"{list(fresh[anew[0]].shape)} ({shape} in " in note and f"{len(fresh) - len(anew)} tensors taken" in note


def test_a_resumed_run_takes_its_own_checkpoint_whole(tmp_path: Path) -> None:
    config = _config()
    config.train.init_from, _ = _trained(tmp_path / "old", SIX)
    config.train.reinit_head = True
    run, own = _trained(tmp_path / "own", VOCABULARY_4)
    model, notes = initial_model(config, VOCABULARY_4, RunDir(Path(run)).checkpoint(3))
    assert notes == [] and all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_a_new_head_does_not_hide_that_the_rest_does_not_fit(tmp_path: Path) -> None:
    config = _config()
    config.train.init_from, _ = _trained(tmp_path / "old", SIX)
    config.train.reinit_head = True
    config.model.decoder.queries = 5
    with pytest.raises(UserError, match=r"even without the class head(.|\n)*transformer_decoder\.queries\.weight"):
        initial_model(config, VOCABULARY_4, None)
    file = RunDir(tmp_path / "old").checkpoint(3) / WEIGHTS
    save_file({n: t for n, t in load_file(file).items() if "norm" not in n}, file)
    config.train.init_from = None
    with pytest.raises(UserError, match="do not fit"):
        initial_model(config, VOCABULARY_4, file.parent)


def test_options_that_do_nothing_or_contradict_are_refused() -> None:
    config = _config()
    config.train.reinit_head = True
    with pytest.raises(UserError, match=r"--reinit-head\) does nothing without train\.init_from"):
        validate(config)
    config.model.num_classes = 6
    with pytest.raises(UserError, match=r"model\.num_classes = 6, but vocabulary 'painted' has 4 .*--reinit-head"):
        check_vocabulary(config, VOCABULARY_4, where="here")


@pytest.mark.parametrize("crop", [[66, 64], [64, 97]])
def test_a_crop_that_the_stride_does_not_divide_is_refused(index, crop):
    """The loss spreads the cells over the crop: the masks would be trained up to a cell's width beside their places."""
    config = _config(index)
    config.data.crop = crop
    with pytest.raises(
        UserError, match=r"no multiple of the model's stride of 4 pixels.*Take data\.crop=\[64, 64|96\]"
    ):
        initial_model(config, VOCABULARY_4, None)


def test_the_new_pyramid_on_a_vit_trains_at_the_full_rate():
    config = _config()
    config.model.backbone = replace(config.model.backbone, name="vit_tiny_patch16_224", weights="none")
    model = build_model(config.model, 4, seed=0)
    of_backbone = next(g for g in parameter_groups(model, config.optimizer) if g["name"] == "backbone")
    numbers = {id(p) for p in of_backbone["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in numbers}
    assert names and all(name.startswith("backbone.net.") for name in names)


def test_what_a_run_will_not_look_at_is_said(index: Index, tmp_path: Path, lock: list[int]) -> None:
    config, one, two = _config(index, queries=4), World(), World(0, 2, 0)
    config.train.hang_timeout = config.train.collective_timeout = 600
    assert examine(config, RunDir(tmp_path / "1"), one, lock)["notes"] == []
    (note,) = examine(config, RunDir(tmp_path / "2"), two, lock)["notes"]
    assert "where a rank hangs, the others give up before its stacks are written" in note
    config.train.hang_timeout, config.eval.metrics_every_steps = 599, 100
    (note,) = examine(config, RunDir(tmp_path / "3"), two, lock)["notes"]
    assert note == "no validation source (data.val): no validation loss and no evaluation on the way"
    config.data.val = str(index.source)
    assert examine(config, RunDir(tmp_path / "4"), two, lock)["notes"] == []


def test_a_rank_that_is_to_be_profiled_and_is_not_there_is_refused(
    index: Index, tmp_path: Path, lock: list[int]
) -> None:
    config = _config(index, queries=4)
    config.train.profile, config.train.profile_ranks = [1, 2], [0, 2]
    with pytest.raises(UserError, match="profile_ranks names rank 2, and there are 2 ranks"):
        examine(config, RunDir(tmp_path), World(0, 2, 0), lock)
    assert not list(tmp_path.iterdir())
