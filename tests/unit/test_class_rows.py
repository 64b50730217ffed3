"""Fine-tuning across vocabularies: classes that both have keep their rows of the class head."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from mf_scale.data.index import Index
from mf_scale.distributed.env import World
from mf_scale.errors import UserError
from mf_scale.models.build import build_model
from mf_scale.rundir import RunDir
from mf_scale.training.class_rows import CLASS_HEADS, LENT, LentClasses, class_images, lent_classes, match_classes
from mf_scale.training.initial import initial_model
from mf_scale.training.preflight import examine
from mf_scale.unify import MergeTable, Source, unify
from mf_scale.vocabulary import ClassInfo, Vocabulary
from tests.unit.painted import VOCABULARY_4, painted_source
from tests.unit.test_start import _config, _trained

# cat, dog, sky, grass are the run's.
OLD = Vocabulary(
    "old", tuple(ClassInfo(n, True, i) for i, n in enumerate(("Cat", "grass", "sea", "dog", "sky ", "lawn", "turf")))
)
ROWS = [
    {"name": "sky", "members": {"old": "sky "}},
    {"name": "feline", "members": {"old": "Cat", "painted": "cat"}},
    {"name": "grass", "members": {"old": ["lawn", "turf"]}},
]


def _table(rows: Sequence[Mapping[str, object]], **others: object) -> MergeTable:
    return MergeTable.from_dict({"name": "t", "classes": list(rows), **others})


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return painted_source(tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("kind", list(CLASS_HEADS))
def test_classes_of_the_same_name_keep_their_rows_and_no_object_its_own(tmp_path: Path, kind: str) -> None:
    config = _config(kind=kind)
    config.train.init_from, old = _trained(tmp_path / "old", OLD, kind)
    model, (note,) = initial_model(config, VOCABULARY_4, None)
    fresh = build_model(config.model, 4, seed=config.seed).state_dict()
    of_head = [name for name in fresh if name.startswith(CLASS_HEADS[kind])]
    assert of_head
    for name, value in model.state_dict().items():
        if name not in of_head:
            assert torch.equal(value, old[name]), name
            continue
        # Exactly: "Cat" is not "cat", and "sky " is not "sky".
        for label, lender in ((0, None), (1, 3), (2, None), (3, 1)):
            assert torch.equal(value[label], fresh[name][label] if lender is None else old[name][lender]), (name, label)
        if kind == "mask_classification":
            assert torch.equal(value[4], old[name][7])
        assert len(value) == 4 + (kind == "mask_classification")
    assert "2 of 4 classes take their rows" in note and "'old', 7 classes, 5 of them not used" in note
    assert "kept      2  dog, grass\n" in note and "anew      2  cat, sky\n" in note


def test_a_merge_table_says_more_and_an_equal_name_goes_first() -> None:
    assert match_classes(OLD, VOCABULARY_4) == ((), (3,), (), (1,))
    assert match_classes(OLD, VOCABULARY_4, [_table(ROWS)]) == ((0,), (3,), (4,), (1,))
    without = Vocabulary("old", tuple(c for c in OLD.classes if c.name != "grass"))
    assert match_classes(without, VOCABULARY_4, [_table(ROWS)])[3] == (4, 5)  # lawn and turf: their mean
    renamed = _table(ROWS[1:2], rename={"feline": "pussycat"})
    new = Vocabulary("new", (ClassInfo("pussycat", True, 0),))
    assert match_classes(OLD, new, [renamed]) == ((0,),)


def test_a_unified_vocabulary_knows_what_it_was_made_of() -> None:
    unified = unify([Source(OLD, where="a"), Source(VOCABULARY_4, where="b")], [_table(ROWS)]).vocabulary
    read = Vocabulary.from_dict(json.loads(json.dumps(unified.to_dict())))
    label = {name: i for i, name in enumerate(read.names)}
    # From the unified one to one of its sources, and back, without the tables.
    there = match_classes(read, OLD)
    assert [read.names[label] for label in there[0]] == ["feline"] and all(there)
    back = match_classes(VOCABULARY_4, read)
    assert back[label["feline"]] == (0,) and back[label["sky"]] == (2,) and back[label["sea"]] == ()


def test_several_lenders_give_their_mean(tmp_path: Path) -> None:
    config = _config()
    config.train.init_from, old = _trained(tmp_path / "old", OLD)
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"name": "t", "classes": [{"name": "sky", "members": {"old": ["sea", "turf"]}}]}))
    config.data.merge = [str(table)]
    model, (note,) = initial_model(config, VOCABULARY_4, None)
    weight = model.state_dict()["heads.class_head.weight"]
    assert torch.allclose(weight[2], old["heads.class_head.weight"][[2, 6]].mean(0))
    assert "sky (from sea + turf)" in note


def test_the_start_prints_short_lists_and_writes_whole_ones(index: Index, tmp_path: Path) -> None:
    config = _config(index, queries=4)
    config.train.init_from, _ = _trained(tmp_path / "old", OLD)
    found = examine(config, RunDir(tmp_path / "run"), World(), [])
    lists = json.loads(found["texts"][LENT])
    assert lists["kept"] == {"dog": ["dog"], "grass": ["grass"]} and lists["anew"] == ["cat", "sky"]
    assert lists["not_used"] == ["Cat", "sea", "sky ", "lawn", "turf"] and lists["its_vocabulary"] == "old"
    assert found["class_images"] == [int(n) for n in index.class_counts()] == class_images([index])
    many = Vocabulary("many", tuple(ClassInfo(f"class {i:05}", True, i) for i in range(10_000)))
    more = Vocabulary("more", tuple(ClassInfo(f"class {i:05}", True, i) for i in range(5_000, 15_000)))
    lent = LentClasses(many, more, match_classes(many, more), "there")
    note = lent.note()
    assert len(note) < 1500 and "5,000 of 10,000 classes" in note and "and 4,988 more" in note
    whole = json.loads(lent.text())
    assert len(whole["kept"]) == len(whole["anew"]) == len(whole["not_used"]) == 5_000


def test_one_vocabulary_or_a_new_head_match_nothing(tmp_path: Path) -> None:
    config = _config()
    config.train.init_from, old = _trained(tmp_path / "same", VOCABULARY_4)
    model, notes = initial_model(config, VOCABULARY_4, None)
    assert notes == [] and all(torch.equal(value, old[name]) for name, value in model.state_dict().items())
    config.train.init_from, _ = _trained(tmp_path / "old", OLD)
    config.train.reinit_head = True
    _, (note,) = initial_model(config, VOCABULARY_4, None)
    assert "the class head starts anew" in note
    checkpoint = RunDir(tmp_path / "old").checkpoint(3)
    assert lent_classes(config, checkpoint, VOCABULARY_4) is None


def test_the_same_classes_in_another_order_keep_their_rows(tmp_path: Path) -> None:
    turned = Vocabulary("turned", VOCABULARY_4.classes[::-1])
    config = _config()
    config.train.init_from, old = _trained(tmp_path / "old", turned)
    model, (note,) = initial_model(config, VOCABULARY_4, None)
    name = "heads.class_head.weight"
    assert torch.equal(model.state_dict()[name], old[name][[3, 2, 1, 0, 4]])
    assert "4 of 4 classes" in note and "anew      0  none" in note


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    config = _config()
    config.train.init_from, _ = _trained(tmp_path / "old", OLD)
    config.model.decoder.width = 32
    with pytest.raises(UserError, match="do not fit the model"):
        initial_model(config, VOCABULARY_4, None)
