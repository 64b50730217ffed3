"""Small real samples for the recipes of large vocabularies: ../shared/data, laid out as the datasets are, and packed.

Bands: LVIS's vocabulary has its own. The others get theirs here from the images of the sample, written into vocabulary
files: `data.bands=true` wants an image of every class, and a sample has none of most.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.__main__ import main
from mf_scale.config.load import load_config
from mf_scale.data.index import Index
from mf_scale.data.sources import open_training
from mf_scale.vocabulary import ClassInfo, Vocabulary

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
VOCABULARIES = ROOT / "data_tools" / "vocabularies"
CONFIGS = ROOT / "configs"


@dataclass(frozen=True)
class Recipe:
    """A configuration, and what its sample is."""

    config: Path
    needs: tuple[str, ...]
    """Folders of ../shared/data."""
    measure: str
    """mIoU or AP: the number of its table."""

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if not (SHARED / name).is_dir()]


RECIPES = {
    "ade20k_full": Recipe(CONFIGS / "ade20k_full/maskformer_resnet50.yaml", ("ade20k_full",), "mIoU"),
    "lvis_1203": Recipe(CONFIGS / "lvis_1203/maskformer_resnet50.yaml", ("lvis_val_100",), "AP"),
    "union_247": Recipe(
        CONFIGS / "union_247/maskformer_resnet50.yaml", ("coco_stuff", "coco_panoptic", "ade20k_150"), "mIoU"
    ),
}


def pack_sample(name: str, folder: Path) -> list[str]:
    """Pack the sample of a recipe into `folder`; the overrides that point the recipe to it."""
    return {"ade20k_full": _ade20k_full, "lvis_1203": _lvis, "union_247": _union}[name](folder)


def _pack(form: str, source: Path, target: Path, split: str, *more: str) -> None:
    words = ["pack", form, str(source), str(target), "--split", split, "--workers", "2", *more]
    if main(words) not in (0, None):
        raise RuntimeError(f"{' '.join(words)} failed")


def _ade20k_full(folder: Path) -> list[str]:
    """3 images with 24 of the 847 classes, trained on and evaluated; a band by how many of the three hold a class."""
    _pack("ade20k_full", SHARED / "ade20k_full", folder / "counted", "train")
    index = Index.open(folder / "counted")
    file = write_bands(index.vocabulary, index.class_counts(), folder / "bands.json", rare=1, common=2)
    _pack("ade20k_full", SHARED / "ade20k_full", folder / "train", "train", "--vocabulary", str(file))
    return [f"data.train={folder}/train", f"data.val={folder}/train"]


def _lvis(folder: Path) -> list[str]:
    """12 images, trained on and evaluated; v0.5's annotation as LVIS v1's, by synset."""
    listing = as_lvis_v1(json.loads((SHARED / "lvis_val_100/lvis_val_100.json").read_text()))
    (folder / "lvis").mkdir(parents=True, exist_ok=True)
    (folder / "lvis/lvis_v1_val.json").write_text(json.dumps(listing))
    shutil.copytree(SHARED / "lvis_val_100/val2017", folder / "lvis/val2017", dirs_exist_ok=True)
    _pack("lvis_v1", folder / "lvis", folder / "train", "val")
    return [f"data.train={folder}/train", f"data.val={folder}/train"]


def as_lvis_v1(old: Mapping[str, Any]) -> dict[str, Any]:
    """A list of LVIS v0.5 with the categories of v1: those of one synset are one, what v1 has not is left out."""
    info = json.loads((SHARED / "class_names/detic/lvis_v1_train_cat_info.json").read_text())
    number = {category["synset"]: category["id"] for category in info}
    new = {category["id"]: number.get(category["synset"]) for category in old["categories"]}
    here = {int(path.stem) for path in (SHARED / "lvis_val_100/val2017").glob("*.jpg")}
    images = [dict(image) for image in old["images"] if image["id"] in here]
    for image in images:
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            image[key] = sorted({new[i] for i in image[key]} - {None})
    shapes = [
        {**shape, "category_id": new[shape["category_id"]]}
        for shape in old["annotations"]
        if shape["image_id"] in here and new[shape["category_id"]] is not None
    ]
    return {**old, "images": images, "annotations": shapes, "categories": info}


def _union(folder: Path) -> list[str]:
    """234 images, trained on; 100 others of COCO panoptic, evaluated. Bands by LVIS's law, over all sources."""
    ade = folder / "ade"
    shutil.copytree(SHARED / "ade20k_150/images", ade / "images/training", dirs_exist_ok=True)
    shutil.copytree(SHARED / "ade20k_150/annotations", ade / "annotations/training", dirs_exist_ok=True)
    forms = {
        "coco_stuff": ("coco_stuff", SHARED / "coco_stuff", "train2017"),
        "coco_panoptic": ("coco_panoptic", SHARED / "coco_panoptic", "train2017"),
        "ade20k_150": ("ade20k_150", ade, "training"),
    }
    for name, (form, source, split) in forms.items():
        _pack(form, source, folder / "counted" / name, split)
    files = _pooled_bands(folder)
    for name, (form, source, split) in forms.items():
        _pack(form, source, folder / name, split, "--vocabulary", str(files[name]))
    _pack(
        "coco_panoptic",
        SHARED / "coco_panoptic",
        folder / "val",
        "val2017",
        "--vocabulary",
        str(files["coco_panoptic"]),
    )
    return [f"data.sources={_sources(folder)}", f"data.val={folder}/val", "data.bands=false"]


def _sources(folder: Path) -> str:
    said = load_config(RECIPES["union_247"].config).data.sources
    told = [(f"{folder}/{Path(source.index).parent.name}", source) for source in said]
    return "[" + ", ".join(f"{{index: {i}, weight: {s.weight}, vocabulary: {s.vocabulary}}}" for i, s in told) + "]"


def _pooled_bands(folder: Path) -> dict[str, Path]:
    """A vocabulary file of each source, a class's band being that of the unified class which it belongs to."""
    words = [f"data.sources={_sources(folder / 'counted')}", "data.bands=false"]
    indexes = open_training(load_config(RECIPES["union_247"].config, words).data)
    images = np.sum([index.class_counts() for index in indexes], axis=0)
    files = {}
    for index in indexes:
        own, name = Index.open(index.source).vocabulary, Path(index.source).name
        assert index.way is not None
        files[name] = write_bands(own, images[index.way.labels], folder / f"{name}.json", rare=10, common=100)
    return files


def write_bands(
    vocabulary: Vocabulary, images: np.ndarray | Sequence[int], path: Path, *, rare: int, common: int
) -> Path:
    """The vocabulary with bands by `images` [K]; a class without an image has none."""

    def banded(info: ClassInfo, count: int) -> ClassInfo:
        band = "rare" if count <= rare else "common" if count <= common else "frequent"
        return replace(info, frequency=band if count else None)

    pairs = zip(vocabulary.classes, images, strict=True)
    banded_one = replace(vocabulary, classes=tuple(banded(info, int(count)) for info, count in pairs))
    path.write_text(json.dumps(banded_one.to_dict()))
    return path
