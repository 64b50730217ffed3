"""Packing COCO-Stuff: layers of a segment map."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.__main__ import main
from data_tools.source import open_reader
from mf_scale.data.index import Index

SOURCE = Path(__file__).parents[2] / "data_tools" / "sample" / "coco_stuff"


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
def test_coco_stuff_lays_things_over_stuff_and_overlaps_on_layers(tmp_path):
    rle = pytest.importorskip("pycocotools.mask", reason="COCO-Stuff is read with pycocotools")
    assert main(["pack", "coco_stuff", str(SOURCE), str(tmp_path / "out"), "--split", "val", "--workers", "1"]) == 0
    index = Index.open(tmp_path / "out")
    assert index.samples == 12 and len(index.vocabulary) == 171
    listing = json.loads((SOURCE / "annotations" / "instances_val.json").read_text())
    label_of = index.vocabulary.index_of_source_id()
    reader = open_reader(index)
    layered = 0
    for i in range(index.samples):
        sample = reader.load_exact(i)
        things = [a for a in listing["annotations"] if a["image_id"] == int(sample.key)]
        numbers = np.flatnonzero(np.array(index.vocabulary.things)[sample.labels])
        packed = {(int(sample.labels[n]), int((sample.stored_map == n).sum())) for n in numbers}
        assert packed == {(label_of[a["category_id"]], a["area"]) for a in things}  # none lost a pixel
        covered = np.isin(sample.stored_map, numbers).any(axis=0)
        stuff = (sample.stored_map[0] < 254) & ~np.isin(sample.stored_map[0], numbers)
        assert not (covered & stuff).any()
        layered += len(sample.stored_map) > 1
        shape = things[0]["segmentation"] if things else None
        if isinstance(shape, list):
            mask = rle.decode(rle.merge(rle.frPyObjects(shape, *sample.image.shape[:2]))) > 0
            assert any((mask == (sample.stored_map == n).any(axis=0)).all() for n in numbers)
    assert layered
