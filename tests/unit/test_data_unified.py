"""Sources with vocabularies of their own, trained on and evaluated together: labels, masks, order, what is refused."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from data_tools.index import Meaning, index_source
from mf_scale.config.load import config_from_dict, config_to_dict, load_config
from mf_scale.config.schema import Config, DataConfig, SourceConfig
from mf_scale.config.validate import validate
from mf_scale.data.batch import NOT_EXHAUSTIVE, UNKNOWN
from mf_scale.data.collate import cut, join
from mf_scale.data.federated import is_federated, partly_known
from mf_scale.data.index import HEAD, Index, head_digest
from mf_scale.data.loader import eval_samples, loss_batches, train_steps
from mf_scale.data.making import make_reader
from mf_scale.data.sources import continue_order, open_training, open_validation
from mf_scale.data.state import DataState
from mf_scale.data.unified import merges_of, way_note, what_changed
from mf_scale.errors import UserError
from mf_scale.unify import LEFT_OUT, Source, UnifiedSource, place
from mf_scale.vocabulary import ClassInfo, Vocabulary
from tests.sources import VOCABULARY, make_source, sample_members, small_config, write_shard

OTHER = Vocabulary("other", tuple(ClassInfo(f"o{i}", i < 4, i) for i in range(6)))
"""Of a second source with the same pictures: things 0 to 3, stuff 4 and 5."""
TABLE = {
    "name": "t",
    "classes": [
        {"name": "one", "members": {"test": "class0", "other": "o0"}},
        {"name": "two", "members": {"test": "class1", "other": ["o1", "o2"]}},
        {"name": "ground", "members": {"test": "class4", "other": ["o3", "o4"]}, "thing": "if all"},
    ],
}
"""one, two, class2 and class3 of test alone, ground (o3 is packed as a thing), class5 of test, o5 of other."""
NAMES = ["one", "two", "class2", "class3", "ground", "class5", "o5"]


def relabel(folder: Path, vocabulary: Vocabulary) -> Index:
    head = json.loads((folder / HEAD).read_text())
    head["vocabulary"] = vocabulary.to_dict()
    (folder / HEAD).write_text(json.dumps({**head, "digest": head_digest(head)}))
    return Index.open(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[str, str, str]:
    """Source test, source other, table."""
    folder = tmp_path_factory.mktemp("two")
    make_source(folder / "test", [8, 5])
    make_source(folder / "other", [7])
    relabel(folder / "other", OTHER)
    (folder / "t.json").write_text(json.dumps(TABLE))
    return str(folder / "test"), str(folder / "other"), str(folder / "t.json")


def union(two: tuple[str, str, str], **changes: object) -> DataConfig:
    sources = [SourceConfig(two[0], 3), SourceConfig(two[1], 1)]
    return small_config(**{"sources": sources, "merge": [two[2]], **changes})


def way_of(index: Index | None) -> UnifiedSource:
    """How a source is seen in another vocabulary, where it is."""
    assert index is not None and index.way is not None
    return index.way


def validated(data: DataConfig, vocabulary: Vocabulary) -> Index:
    """Its validation source, where it has one."""
    index = open_validation(data, vocabulary)
    assert index is not None
    return index


def not_none(class_mask: torch.Tensor | None) -> torch.Tensor:
    assert class_mask is not None
    return class_mask


def refused(data: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        open_training(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_sources_have_the_labels_of_one_vocabulary(two):
    first, second = open_training(union(two))
    assert first.vocabulary is second.vocabulary and first.vocabulary.names == NAMES
    assert way_of(first).labels.tolist() == [0, 1, 2, 3, 4, 5] and way_of(second).labels.tolist() == [0, 1, 1, 4, 4, 6]
    plain = Index.open(two[1])
    mapped = make_reader(second, small_config()).load_exact(2)
    stored = make_reader(plain, small_config()).load_exact(2)
    assert mapped.labels.tolist() == way_of(second).labels[stored.labels].tolist()
    there = pickle.loads(pickle.dumps(second))  # noqa: S301 - as worker processes get it
    assert there.vocabulary == second.vocabulary and there.way.labels.tolist() == way_of(second).labels.tolist()
    merges = merges_of((first, second))
    assert merges is not None and merges.members == first.vocabulary.members


def test_a_vocabulary_that_all_share_is_left_alone(two, tmp_path):
    make_source(tmp_path / "more", [2], crowd="ignore")
    indexes = open_training(small_config(sources=[SourceConfig(two[0]), SourceConfig(str(tmp_path / "more"))]))
    assert all(index.vocabulary is index.packed and index.way is None for index in indexes)
    assert merges_of(indexes) is None and not any(map(partly_known, indexes))
    (again,) = open_training(small_config(train=two[0]))
    assert again.vocabulary.to_dict() == VOCABULARY.to_dict()


def test_counts_and_lists_are_of_images_by_unified_classes(two):
    for index, plain in zip(open_training(union(two)), (Index.open(two[0]), Index.open(two[1])), strict=True):
        wanted = np.zeros(7, np.int64)
        for sample_id in range(index.samples):
            labels = set(way_of(index).labels[plain.sample(sample_id).class_ids].tolist()) - {LEFT_OUT}
            wanted[sorted(labels)] += 1
            offsets, listed = index.class_lists(sample_id, sample_id + 1)
            assert listed.tolist() == sorted(labels) and offsets.tolist() == [0, len(labels)]
        assert index.class_counts().tolist() == wanted.tolist()
    banded = open_training(union(two, bands=True))
    assert {info.frequency for info in banded[0].vocabulary.classes} == {"rare", "common"}


def batches(two: tuple[str, str, str], workers: int, world: int, **changes: object):
    config = Config(data=union(two, workers=workers, **changes))
    config.train.global_batch = 8
    indexes = open_training(config.data)
    state = continue_order(config, indexes, None, 0)[0]
    found = []
    for rank in range(world):
        steps = train_steps(indexes, state, config.data, rank=rank, world=world, step=0)
        found.append([next(steps)[1] for _ in range(3)])
        steps.close()
    return indexes, [join([of_rank[step] for of_rank in found]) for step in range(3)]


def test_unknown_classes_are_masked_in_every_batch_of_every_world(two):
    indexes, alone = batches(two, 0, 1)
    for workers, world in ((2, 1), (0, 2)):
        _, others = batches(two, workers, world)
        for ours, theirs in zip(alone, others, strict=True):
            places = [*range(8)] if world == 1 else [*range(0, 8, 2), *range(1, 8, 2)]
            assert [ours.keys[i] for i in places] == theirs.keys
            assert torch.equal(not_none(ours.class_mask)[places], not_none(theirs.class_mask))
            assert torch.equal(ours.segment_map[places], theirs.segment_map)
    for batch in alone:
        assert batch.class_mask is not None and batch.class_mask.dtype == torch.uint8
        assert batch.class_mask.shape == (8, 7)
        for lane, row in enumerate(batch.class_mask):
            index = indexes[0 if lane < 6 else 1]  # 3 : 1 of a global batch of 8
            assert (row == UNKNOWN).tolist() == (~way_of(index).known).tolist()
            assert not (row[batch.labels[lane][batch.labels[lane] >= 0]] == UNKNOWN).any(), "what is marked is known"
        assert torch.equal(not_none(cut(batch, 2, 5).class_mask), batch.class_mask[2:5])


def test_stuff_of_several_segments_is_one_and_what_is_left_out_is_ignored(two):
    sources = [SourceConfig(two[0], 1), SourceConfig(two[1], 1, map={"o0": None})]
    for indexes in (open_training(union(two)), open_training(union(two, sources=sources))):
        _, second = indexes
        for sample in eval_samples(second, union(two), rank=0, world=1):
            ground = [i for i, label in enumerate(sample.labels) if label == 4]
            assert len(ground) <= 1 and not sample.crowd[ground].any()
            assert (sample.labels >= 0).all()
    stored = make_reader(Index.open(two[1]), union(two)).load_exact(0)  # stuff o4 above, o0, o1 and a crowd of o0 below
    first = next(iter(eval_samples(second, union(two), rank=0, world=1)))
    assert ((first.segment_map[0] == -2) == np.isin(stored.stored_map[0], np.flatnonzero(stored.labels == 0))).all()


def test_a_validation_source_is_seen_in_the_vocabulary_of_the_run(two, tmp_path):
    vocabulary = open_training(union(two))[0].vocabulary
    index = validated(union(two, val=two[1]), vocabulary)
    assert way_of(index).labels.tolist() == [0, 1, 1, 4, 4, 6] and "annotates 4 of 7" in str(way_note(index, "val"))
    mapped = {"index": two[1], "vocabulary": "other", "map": {"o5": "class5", "o1": None}}
    assert way_of(validated(union(two, val=mapped), vocabulary)).labels.tolist() == [0, LEFT_OUT, 1, 4, 4, 5]
    fewer = union(two, sources=[SourceConfig(two[0]), SourceConfig(two[1], map={"o0": None})], val=two[1])
    left_out = way_of(validated(fewer, open_training(fewer)[0].vocabulary))
    assert left_out.left_out == ("o0",), "what training leaves out stays left out, whatever the table says"
    made = Vocabulary(
        "u", OTHER.classes[:2], ((("test", "o0"),), (("test", "x"), ("other", "o1"))), (("other", OTHER.digest),)
    )
    way = place(made, Source(OTHER), by_name=True)
    assert way.labels.tolist() == [LEFT_OUT, 1] + [LEFT_OUT] * 4, "nor does its name bring it back"
    # one that no training source has: by table, by name, by map
    make_source(tmp_path / "third", [2])
    names = ("class2", "k", "class0", "z", "class4", "class5")
    kinds = (True, True, True, True, False, False)
    relabel(tmp_path / "third", Vocabulary("third", tuple(map(ClassInfo, names, kinds, range(6)))))
    (tmp_path / "k.json").write_text(
        json.dumps(
            {
                "name": "k",
                "vocabularies": ["third"],
                "classes": [{"name": "k", "members": {"third": "k", "other": "o1"}}],
            }
        )
    )
    data = union(two, merge=[two[2], str(tmp_path / "k.json")], by_name=True, val=str(tmp_path / "third"))
    found = way_of(validated(data, vocabulary))
    assert found.labels.tolist() == [2, 1, 0, LEFT_OUT, 4, 5] and found.left_out == ("z",)
    for said, message in (
        ({"map": {"k": "tow"}}, "leads to 'tow', and the run has no such class (data.val). Did you mean 'two'?"),
        ({"map": {"j": "two"}}, "'third' does not have: 'j'"),
        ({"map": {"class4": "two"}}, "is stuff, and 'two' is a thing"),
        ({"vocabulary": "other"}, "packed with vocabulary 'third', not 'other'"),
    ):
        with pytest.raises(UserError) as caught:
            validated(replace(data, val={"index": str(tmp_path / "third"), **said}), vocabulary)
        assert message in str(caught.value)
    with pytest.raises(UserError, match="no class of 'third' is one of 'unified'"):
        validated(union(two, val=str(tmp_path / "third")), vocabulary)
    with pytest.raises(UserError, match=r"the source has vocabulary 'third' \(6 classes\), the run 'test'"):
        validated(small_config(val=str(tmp_path / "third")), VOCABULARY)
    folded = small_config(val={"index": str(tmp_path / "third"), "map": {"k": "class1"}})
    assert way_of(validated(folded, VOCABULARY)).labels.tolist() == [LEFT_OUT, 1] + [LEFT_OUT] * 4


def test_what_cannot_be_meant_is_refused_before_anything_is_trained(two, tmp_path):
    same = [SourceConfig(two[0], map={"class0": "x"}), SourceConfig(two[1])]
    assert "label differently" in refused(union(two, merge=[]))
    assert len(open_training(union(two, merge=[], by_name=True))[0].vocabulary) == 12
    named = [SourceConfig(two[0], vocabulary="test"), SourceConfig(two[1], vocabulary="other")]
    assert len(open_training(union(two, merge=[], sources=named))[0].vocabulary) == 12
    assert "packed with vocabulary 'test', not 'tset'" in refused(union(two, sources=[SourceConfig(two[0], 1, "tset")]))
    make_source(tmp_path / "more", [3], crowd="ignore")
    assert 'sources map test "class0" differently' in refused(
        union(two, merge=[], sources=[*same, SourceConfig(str(tmp_path / "more"))])
    )
    circle = {**TABLE, "rename": {"one": "two", "two": "one"}}
    (tmp_path / "c.json").write_text(json.dumps(circle))
    assert "circle" in refused(union(two, merge=[str(tmp_path / "c.json")]))
    assert "there is no merge table 'comon'" in refused(union(two, merge=["comon"]))
    clash = [SourceConfig(two[0]), SourceConfig(two[1], map={"o5": "two"})]
    assert "two classes of one vocabulary would become one" in refused(union(two, sources=clash))
    make_source(tmp_path / "few", [1])
    assert "have no image, and so no frequency band" in refused(small_config(train=str(tmp_path / "few"), bands=True))


def test_a_configuration_with_maps_is_written_and_read_back(two, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        f"data:\n  sources:\n    - {{index: {two[0]}, map: {{class0: one, class1: null}}}}\n"
        f"  val: {{index: {two[0]}, map: {{class0: one}}}}\n  merge: [common]\n"
    )
    config = load_config(file)
    validate(config)
    assert config.data.sources[0].map == {"class0": "one", "class1": None}
    assert config_from_dict(config_to_dict(config), where="x") == config
    for said, message in (
        ("data.val={indx: x}", "data.val.indx is not a key. Did you mean index?"),
        ("data.val={map: {a: b}}", "data.val.index is missing"),
        ("data.val=[x]", "neither a folder nor a mapping"),
        ("data.val={index: ~/x}", "data.val = ~/x: ~ is not expanded"),
        ("data.val={index: 'pipe:cat x'}", "'pipe:' are not read"),
        ("data.sources=[{index: x, map: [a]}]", "data.sources[0].map = ['a'] must be"),
        ("data.merge=[a,a]", "data.merge names a twice"),
        ("data.merge=['']", "name a bundled table or a file"),
    ):
        with pytest.raises(UserError) as caught:
            validate(load_config(None, [said]))
        assert message in str(caught.value), said


def test_another_map_is_another_order_only_where_repeats_go_by_the_classes(two):
    def order(state: DataState | None, step: int, threshold: float, **of_map: str | None):
        sources = [SourceConfig(two[0], 1), SourceConfig(two[1], 1, map=of_map or None)]
        config = Config(data=union(two, sources=sources, repeat_threshold=threshold))
        config.train.global_batch = 4
        return continue_order(config, open_training(config.data), state, step)

    grounded = dict.fromkeys(["o3", "o4", "o5"], "ground")
    plain = order(None, 0, 0.0)[0]
    assert "labels" not in plain.to_dict()["segments"][0]["streams"][0], "as it was before there were maps"
    assert order(plain, 5, 0.0, **grounded)[1] is None
    repeated = order(None, 0, 0.5)[0]
    assert DataState.from_dict(json.loads(json.dumps(repeated.to_dict()))) == repeated
    assert order(repeated, 5, 0.5)[1] is None
    assert "the classes its images are repeated by" in order(repeated, 5, 0.5, **grounded)[1]


def test_what_the_same_classes_are_made_of_may_change_and_is_told(two):
    before = open_training(union(two))[0].vocabulary
    again = Vocabulary.from_dict(json.loads(json.dumps(before.to_dict())))
    assert again.members == before.members and what_changed(again, before) is None
    other = replace(before, members=(before.members[0] + (("x", "y"),), *before.members[1:]))
    assert what_changed(other, before) == "1 classes are made of other source classes than before: one"
    with pytest.raises(UserError, match="members of 1 classes"):
        Vocabulary.from_dict({**before.to_dict(), "members": [[["a", "b"]]]})


def federated_source(folder: Path, lists: dict[int, dict[str, list[int]]], shards: tuple[int, ...] = (4,)) -> str:
    folder.mkdir()
    number = 0
    for shard, count in enumerate(shards):
        samples = []
        for i in range(number, number + count):
            members = sample_members(i, f"s{i:03d}")
            if i in lists:
                members["json"] = json.dumps(json.loads(members["json"]) | {"federated": lists[i]}).encode()
            samples.append(members)
        write_shard(folder / f"part-{shard}.tar", samples)
        number += count
    meaning = Meaning(crowd="none", unlabelled="none", kind="instance")
    index_source(folder, VOCABULARY, meaning, progress=partial(tqdm, disable=True))
    return str(folder)


def test_what_nobody_looked_for_in_an_image_is_unknown_there(tmp_path):
    """Sample i holds the stuff 4 + i % 2 and the things i % 4 and (i + 1) % 4."""
    lists = {i: {"negative": [(i + 2) % 4], "not_exhaustive": [i % 4]} for i in range(4)}
    source = federated_source(tmp_path / "f", lists)
    config = Config(data=small_config(train=source, task="instance"))
    config.train.global_batch = 4
    indexes = open_training(config.data)
    assert is_federated(indexes[0]) and indexes[0].way is None
    state = continue_order(config, indexes, None, 0)[0]
    _, batch = next(train_steps(indexes, state, config.data, rank=0, world=1, step=0))
    (loss_batch,) = loss_batches(indexes[0], config.data, count=3, batch=4, rank=0, world=1)
    assert not not_none(loss_batch.class_mask)[3].any(), "a blank place counts nothing anyway"
    for made in (batch, loss_batch):
        for key, row in zip(made.keys, not_none(made.class_mask), strict=True):
            if key:
                i, wanted = int(key[1:]), [UNKNOWN] * 6
                wanted[(i + 1) % 4] = wanted[(i + 2) % 4] = wanted[4 + i % 2] = 0
                wanted[i % 4] = NOT_EXHAUSTIVE
                assert row.tolist() == wanted


def test_lists_of_some_samples_only_are_found_by_shard_or_refused(tmp_path):
    said = {"negative": [0], "not_exhaustive": []}
    found = Index.open(federated_source(tmp_path / "found", {4: said}, (4, 2)))
    assert is_federated(found)
    late = Index.open(federated_source(tmp_path / "late", {5: said}, (4, 2)))
    assert not is_federated(late)
    with pytest.raises(UserError, match="sample s005 lists which classes were looked for"):
        list(loss_batches(late, small_config(task="instance"), count=6, batch=2, rank=0, world=1))
    plain = Index.open(federated_source(tmp_path / "plain", {}))
    (batch,) = loss_batches(plain, small_config(task="instance"), count=2, batch=2, rank=0, world=1)
    assert batch.class_mask is None


def test_federated_lists_are_mapped_with_the_labels(tmp_path, two):
    lists = {i: {"negative": [(i + 2) % 4], "not_exhaustive": [i % 4]} for i in range(4)}
    source = federated_source(tmp_path / "f", lists)
    fold = {"class0": "pair", "class1": "pair"}
    (index,) = open_training(small_config(sources=[SourceConfig(source, map=fold)], task="instance"))
    assert index.vocabulary.names == ["pair", "class2", "class3", "class4", "class5"]
    samples = list(eval_samples(index, small_config(task="instance"), rank=0, world=1))
    for sample in samples:
        i = int(sample.key[1:])
        looked_for = {i % 4, (i + 1) % 4, (i + 2) % 4}
        assert sample.federated is not None
        absent = set(sample.federated.negative.tolist())
        assert (0 in absent) == (not looked_for & {0, 1} - {(i + 2) % 4} and {0, 1} <= looked_for)
