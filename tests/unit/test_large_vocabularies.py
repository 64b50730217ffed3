"""The recipes of large vocabularies: ADE20K-Full, LVIS, three datasets as one: short, planned, of the right classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mf_scale.config.load import config_files, load_config
from mf_scale.config.schema import Config, LossConfig
from mf_scale.config.validate import plan_batch, validate
from mf_scale.evaluation.results import bands_table
from mf_scale.plan.parts import count_parts
from mf_scale.unify import MergeTable, Source, Unified, unify
from mf_scale.vocabulary import Vocabulary
from tests.recipe_samples import CONFIGS, RECIPES, SHARED, VOCABULARIES, as_lvis_v1, write_bands

RECIPE_FILES = sorted(path for name in RECIPES for path in (CONFIGS / name).glob("*.yaml"))
CLASSES = {"ade20k_full": 847, "lvis_1203": 1203, "union_247": 247}
every_recipe = pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")


def load(name: str) -> Config:
    config = load_config(RECIPES[name].config)
    validate(config)
    return config


@every_recipe
def test_a_recipe_is_short_and_says_what_it_is(path: Path) -> None:
    own = [file for file in config_files(path) if file.name != "base.yaml"]
    assert path in own and len(own) == 3, "it, its data, its model"
    assert sum(len(file.read_text().splitlines()) for file in own) < 40
    assert "published" in path.read_text().splitlines()[0]
    config = load_config(path)
    validate(config)
    assert config.run_dir == f"runs/{path.parent.name}_{path.stem}"
    assert config.model.num_classes == CLASSES[path.parent.name]
    assert plan_batch(config, 8).accumulation in (1, 8)


def test_what_works_against_long_tails_is_off_where_the_paper_has_it_off() -> None:
    for name, threshold in (("ade20k_full", 0.0), ("lvis_1203", 0.001), ("union_247", 0.0)):
        config = load(name)
        assert config.data.repeat_threshold == threshold, name
        assert config.loss.class_balance == LossConfig().class_balance and config.eval.logit_adjustment == 0.0, name
        assert config.data.bands is (name == "union_247"), "LVIS's vocabulary has bands of its own"


def test_lvis_is_trained_as_its_comments_say() -> None:
    config = load("lvis_1203")
    assert config.data.task == "instance" and config.eval.instance_top_k == config.model.decoder.queries == 300
    assert tuple(config.data.scale) == pytest.approx((0.1 * 3 / 4, 2.0 * 3 / 4)), "of the shorter side, 4:3"
    images, epochs = 100_170, 300  # of LVIS v1's train split; MaskFormer's 554,400 x 64 of COCO's 118,287 images
    assert config.train.steps * config.train.global_batch == pytest.approx(images * epochs, rel=1e-3)
    assert config.schedule.milestones == [config.train.steps * 2 // 3]


def unified(*tables: str) -> Unified:
    sources = load("union_247").data.sources
    parts = [
        Source(Vocabulary.load(VOCABULARIES / f"{source.vocabulary}.json"), f"data.sources[{number}]")
        for number, source in enumerate(sources)
    ]
    return unify(parts, [MergeTable.load(name) for name in tables])


def test_the_union_has_the_classes_that_its_tables_make() -> None:
    config = load("union_247")
    found = unified(*config.data.merge)
    assert len(found.vocabulary) == config.model.num_classes == 247
    assert [int(source.known.sum()) for source in found.sources] == [145, 133, 148]
    assert len(unified("common", "semantic").vocabulary) == 291, "the comment's way to keep COCO-Stuff's fine classes"
    assert len(unified("common", "coco_coarse").vocabulary) == 257, "the comment's panoptic union"


def test_the_union_sees_ade_as_often_as_the_papers_own_recipe() -> None:
    config, ade = load("union_247"), load_config(CONFIGS / "ade20k_150/maskformer_resnet50.yaml")
    weights = [source.weight for source in config.data.sources]
    assert config.data.task == "semantic" and ade.data.task == "semantic"
    share = config.train.global_batch * weights[2] / sum(weights)
    assert share == 8 and config.train.steps * share == ade.train.steps * ade.train.global_batch


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_planned(name: str) -> None:
    """Parameters follow K: a row of 256 and a bias a class, and no-object's."""
    heads = {part.name: part for part in count_parts(load(name))}["heads"]
    masks = 3 * (256 * 256 + 256)
    assert heads.parameters == masks + (CLASSES[name] + 1) * 257


def test_lvis_annotation_of_v05_is_v1s_by_synset() -> None:
    path = SHARED / "lvis_val_100/lvis_val_100.json"
    if not path.is_file():
        pytest.skip("LVIS's sample is not beside this repository")
    old = json.loads(path.read_text())
    new = as_lvis_v1(old)
    synset = [{c["id"]: c["synset"] for c in said["categories"]} for said in (old, new)]
    before = {shape["id"]: synset[0][shape["category_id"]] for shape in old["annotations"]}
    assert len(new["images"]) == 12 and len(new["annotations"]) == 145
    assert all(synset[1][shape["category_id"]] == before[shape["id"]] for shape in new["annotations"])
    for image in new["images"]:
        was = next(one for one in old["images"] if one["id"] == image["id"])
        told = {synset[1][i] for i in image["neg_category_ids"]}
        assert told == {synset[0][i] for i in was["neg_category_ids"]} & set(synset[1].values())


def test_bands_of_a_sample_are_written_into_its_vocabulary(tmp_path: Path) -> None:
    vocabulary = Vocabulary.load(VOCABULARIES / "coco_things_80.json")
    images = np.zeros(80, int)
    images[:4] = 1, 10, 11, 101
    written = Vocabulary.load(write_bands(vocabulary, images, tmp_path / "bands.json", rare=10, common=100))
    assert [c.frequency for c in written.classes[:5]] == ["rare", "rare", "common", "frequent", None]
    assert written.digest == vocabulary.digest and written.name == vocabulary.name


def test_the_table_by_bands_counts_what_the_split_holds() -> None:
    bands = {"of_class": ["rare", "rare", "common", None]}
    semantic, instances = {"IoU": [0.25, None, None, 0.75]}, {"AP": [None, None, 0.125, 0.5]}
    results = {"bands": bands, "semantic": {"per_class": semantic}, "instances": {"per_class": instances}}
    lines = bands_table(results).splitlines()
    assert [line.split() for line in lines] == [
        ["band", "classes", "in", "split", "mIoU", "AP"],
        ["rare", "2", "1", "25.00", "-"],
        ["common", "1", "1", "-", "12.50"],
        ["frequent", "0", "0", "-", "-"],
        ["no", "band", "1", "1", "75.00", "50.00"],
        ["all", "4", "3", "50.00", "31.25"],
    ]
    assert len({len(line) for line in lines}) == 1
    assert bands_table({"semantic": {"per_class": semantic}}) == ""
