"""Lists that are no lists and names that are no text: refused in every format with a message, not a traceback."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from data_tools.formats import FORMATS, ade20k_full, coco_instances, coco_stuff
from data_tools.formats.coco_lists import Shapes, runs_in
from data_tools.formats.names import file_names
from data_tools.formats.pairs import IMAGES, by_stem
from data_tools.formats.shapes import layered
from data_tools.record import BadRecord, Record, RecordSegment
from mf_scale.errors import UserError
from mf_scale.vocabulary import Vocabulary
from tests.unit.packed_formats import VOCABULARIES

DEEP = "[" * 200_000
INFINITE = '{"images": [{"id": 1e999}], "annotations": [], "categories": [{"id": 1e999, "name": "x"}], "labels": [[]]}'
TREES = {
    "coco_panoptic": ("annotations/panoptic_val.json", ("val", "annotations/panoptic_val")),
    "coco_instances": ("annotations/instances_val.json", ("val",)),
    "coco_stuff": ("annotations/instances_val.json", ("val",)),
    "lvis_v1": ("annotations/lvis_v1_val.json", ("train2017", "val2017")),
    "mapillary_v2.0": ("config_v2.0.json", ("val/images", "val/v2.0/instances")),
    "folder": ("classes.json", ("images/val", "labels/val")),
}
"""The list of each format, and the folders that it needs."""


def segment(number: int) -> RecordSegment:
    return RecordSegment(0, 0, True, False, number)


@pytest.mark.parametrize("text", [DEEP, INFINITE, '{"images": 3}', "[1]", "null"])
@pytest.mark.parametrize("name", TREES)
def test_a_list_that_is_none_is_refused(tmp_path, name, text):
    if name.startswith(("coco_i", "coco_s", "lvis")):
        pytest.importorskip("pycocotools.mask", reason="polygons are drawn with pycocotools")
    listing, folders = TREES[name]
    for folder in (*folders, "annotations"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "annotations" / "stuff_val.json").write_text('{"images": [], "annotations": [], "categories": []}')
    (tmp_path / listing).write_text(text)
    vocabulary = FORMATS[name].vocabulary
    known = Vocabulary.load(VOCABULARIES / vocabulary) if vocabulary else None
    with pytest.raises(UserError, match=r"is not|are not|cannot be read"):
        FORMATS[name].open_source(tmp_path, "val", known)


@pytest.mark.parametrize("ids", ['{"ignore": [1e999]}', '{"offset": 1e999}'])
def test_a_meaning_of_ids_that_is_none_is_refused(tmp_path, ids):
    classes = '[{"name": "x", "thing": true, "source_id": 1}]'
    (tmp_path / "classes.json").write_text(f'{{"name": "v", "classes": {classes}, "ids": {ids}}}')
    with pytest.raises(UserError, match="the meaning of ids cannot be read"):
        FORMATS["folder"].open_source(tmp_path, "val", None)


def test_numbers_without_end_are_names_of_classes(tmp_path):
    (tmp_path / "classes.txt").write_text("9" * 5000 + ":sky")
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    with pytest.raises(UserError, match="no image with a map was found"):
        FORMATS["folder"].open_source(tmp_path, "all", None)


@pytest.mark.parametrize(
    "text", [DEEP, '{"annotation": {"object": [{"name_ndx": 1e999, "parts": {"part_level": 0}}]}}', '["x"]']
)
def test_an_image_whose_json_is_none_is_a_bad_record(tmp_path, text):
    Image.new("RGB", (4, 4)).save(tmp_path / "a_seg.png")
    (tmp_path / "a.json").write_text(text)
    record = Record("a", tmp_path / "a.jpg", {}, (tmp_path / "a_seg.png", tmp_path / "a.json"))
    with pytest.raises(BadRecord, match="jsons that cannot be read"):
        ade20k_full.annotate(Vocabulary.load(VOCABULARIES / ade20k_full.VOCABULARY), record)


def test_file_names_that_are_no_text_are_refused_with_counts(tmp_path):
    street = tmp_path / "images" / "ADE" / "training" / "street"
    street.mkdir(parents=True)
    for number in range(2):
        for ending in (b".jpg", b"_seg.png", b".json"):
            Path(os.fsdecode(os.fsencode(street) + b"/i%d\xff" % number + ending)).touch()
    told = r"file names that are not UTF-8: {} \(\S*i\d\\xff"
    with pytest.raises(UserError, match=told.format(6)):
        file_names(street)
    with pytest.raises(UserError, match=told.format(2)):
        by_stem([street], IMAGES[:1])
    with pytest.raises(UserError, match=told.format(2)):
        ade20k_full.open_source(tmp_path, "train", Vocabulary.load(VOCABULARIES / ade20k_full.VOCABULARY))


@pytest.mark.parametrize("wide", [20.0, 3900.0])
def test_memory_does_not_grow_with_the_number_of_shapes(tmp_path, wide):
    pytest.importorskip("pycocotools.mask", reason="polygons are drawn with pycocotools")
    Image.new("1", (4000, 4000)).save(tmp_path / "a.png")
    shapes = [(segment(i), [[10.0, 100.0 * i, wide, 100.0 * i, wide, 100.0 * i + 90]]) for i in range(30)]
    record = Record("a", tmp_path / "a.png", {}, Shapes((4000, 4000), shapes))
    tracemalloc.start()
    runs, notes = runs_in(record)
    assert len(runs) == 30 and not notes
    assert tracemalloc.get_traced_memory()[1] < 16 << 20  # one mask has 16 MB
    layers = layered(runs, (4000, 4000))
    assert tracemalloc.get_traced_memory()[1] < 1.5 * 4 * 4000 * 4000 and len(layers.maps) == 1
    tracemalloc.stop()
    assert int((layers.maps[0] >= 0).sum()) == sum(shape.area for _, shape in runs)


@pytest.mark.parametrize("module", [coco_instances, coco_stuff])
def test_an_image_of_another_size_is_refused_before_it_is_drawn(tmp_path, module):
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    runs = {"size": [8000, 8000], "counts": [10, 20, 8000 * 8000 - 30]}
    record = Record("a", tmp_path / "a.png", {}, Shapes((8000, 8000), [(segment(1), runs)]))
    tracemalloc.start()
    with pytest.raises(BadRecord, match="another size than their entry"):
        module.annotate(record)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(BadRecord, match="do not decode"):
        module.annotate(record)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()
