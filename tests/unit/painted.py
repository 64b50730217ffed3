"""For evaluation's tests: a source of painted images, a model that reads classes off the colours, a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from data_tools.pack import PackOptions, plan_pack, run_pack
from data_tools.record import Annotation, FormatSource, Record, RecordSegment
from data_tools.target import prepare
from mf_scale.config.load import config_to_yaml
from mf_scale.config.schema import Config
from mf_scale.data.batch import NONE
from mf_scale.data.index import Index
from mf_scale.models.outputs import MaskPrediction
from mf_scale.rundir import CONFIG, FORMAT, MANIFEST, STATE, VOCABULARY, WEIGHTS, RunDir, file_digest
from mf_scale.vocabulary import ClassInfo, Vocabulary
from tests.random_batches import said_outright

VOCABULARY_4 = Vocabulary(
    "painted", tuple(ClassInfo(name, i < 2, i + 1) for i, name in enumerate(("cat", "dog", "sky", "grass")))
)
COLORS = np.array([[230, 40, 40], [40, 200, 60], [50, 80, 240], [240, 240, 60]], dtype=np.uint8)
UNLABELLED = np.array([0, 0, 0], dtype=np.uint8)
SIZES = [(64, 96), (96, 64), (80, 80), (61, 83), (128, 64)]
LAYOUTS: list[list[int | None]] = [[2, 0, 3, 1], [2, 2, 3, None], [0, 0, 2, 3], [1, 2, None, 3], [3, 2, 0, 1]]
"""Class of each quarter of each image, None: unlabelled. Image 2 has two cats, of which the first is a crowd."""


def annotate(record: Record) -> Annotation:
    """One segment a quarter; stuff of one class is one segment."""
    (height, width), layout, number = SIZES[record.payload], LAYOUTS[record.payload], record.payload
    segment_map = np.full((1, height, width), NONE, dtype=np.int32)
    segments: list[RecordSegment] = []
    of_stuff: dict[int, int] = {}
    for quarter, label in enumerate(layout):
        if label is None:
            continue
        thing = VOCABULARY_4.things[label]
        if thing or label not in of_stuff:
            of_stuff[label] = len(segments)
            segments.append(RecordSegment(label, 0, thing, number == 2 and quarter == 0, quarter + 1))
        segment_map[0][_quarter(quarter, height, width)] = of_stuff[label]
    return Annotation(segment_map, segments)


def painted_source(folder: Path) -> Index:
    """Five samples in shards of two."""
    images = folder / "images"
    images.mkdir(parents=True)
    records = []
    for number, ((height, width), layout) in enumerate(zip(SIZES, LAYOUTS, strict=True)):
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        for quarter, label in enumerate(layout):
            pixels[_quarter(quarter, height, width)] = UNLABELLED if label is None else COLORS[label]
        file = images / f"{number:04d}.png"
        Image.fromarray(pixels).save(file)
        records.append(Record(file.stem, file, {}, number))
    source = FormatSource(VOCABULARY_4, records, annotate, "painted", "panoptic")
    packing = plan_pack(source, folder / "packed", PackOptions("painted", "val", "2", 0, "none", "none"))
    prepare(packing.folder, packing.plan, overwrite=False)
    run_pack(packing, workers=1, progress=lambda **k: tqdm(disable=True, **k))
    return Index.open(folder / "packed")


def _quarter(quarter: int, height: int, width: int) -> tuple[slice, slice]:
    rows = slice(0, height // 2) if quarter < 2 else slice(height // 2, height)
    columns = slice(0, width // 2) if quarter % 2 == 0 else slice(width // 2, width)
    return rows, columns


class ColorModel(nn.Module):
    """One query a class; its mask is where the image has the class's colour."""

    def __init__(self, stride: int = 4) -> None:
        super().__init__()
        self.stride = stride
        self.colors = nn.Parameter(torch.from_numpy(COLORS.astype(np.float32)))

    def forward(self, images: Tensor) -> MaskPrediction:
        pooled = F.avg_pool2d(images.float(), self.stride, ceil_mode=True)  # [1,3,h,w]
        distance = (pooled[:, None] - self.colors[None, :, :, None, None]).norm(dim=2)
        queries = torch.eye(4, device=images.device)[None]
        return said_outright(F.pad(9 * queries, (0, 1)), queries, (100 - distance) / 10)


def painted_config(**options: Any) -> Config:
    """A configuration whose inference size is a little above the images'."""
    config = Config()
    config.eval.short_side, config.eval.max_side = 96, 192
    config.train.precision = "fp32"
    for name, value in options.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return config


def write_checkpoint(
    run: RunDir, config: Config, model: nn.Module, step: int, vocabulary: Vocabulary = VOCABULARY_4
) -> Path:
    """A committed checkpoint folder as far as evaluation reads it."""
    folder = run.checkpoint(step)
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)
    (folder / STATE).write_text(json.dumps({"step": step}))
    (folder / CONFIG).write_text(config_to_yaml(config))
    (folder / VOCABULARY).write_text(json.dumps(vocabulary.to_dict()))
    files = {f.name: {"size": f.stat().st_size, "sha256": file_digest(f)} for f in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}))
    return folder
