"""The peers of our data path, in the ways of the field: each makes a training sample of the same image and segments.

The recipe is that of MaskFormer's ADE20K configuration: shorter side 0.5 to 2.0 of the crop, a crop, SSD's colour
jitter (brightness, contrast, saturation and hue, each with p 0.5), a flip; then the masks that a MaskFormer takes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image

from mf_scale.bench.data_inputs import PNG_OPTIONS
from mf_scale.data.decode import StoredSample, none_value

SCALE, LONGEST = (0.5, 2.0), 4
"""Of the shorter side as a multiple of the crop, and the longer side at most."""
PAD, IGNORED = 128, 255
"""Value of the image outside of it, and of the label map."""


@dataclass(frozen=True)
class PeerInput:
    """A sample as the peers store it; layer 0 of its map. No tar, no json."""

    image: bytes
    """As in the shard."""
    labels: bytes
    """Grey PNG of segments, as packed: read faster than others."""
    panoptic: bytes
    """The same as COCO has it, PNG of id = R + 256 G + 65536 B; segment + 1, and 0 without one."""
    segments: int


Make = Callable[[PeerInput, np.random.Generator], Any]


@dataclass(frozen=True)
class Peer:
    """A way to make training samples."""

    name: str
    make: Make


def peer_input(image: bytes, sample: StoredSample) -> PeerInput:
    """A sample in the forms that the peers read."""
    stored = sample.stored_map[0]
    ids = np.where(stored < none_value(stored.dtype), stored.astype(np.int32) + 1, 0)
    coded = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    panoptic = io.BytesIO()
    Image.fromarray(coded).save(panoptic, "PNG")
    labels = cv2.imencode(".png", stored, PNG_OPTIONS)[1].tobytes()
    return PeerInput(image, labels, panoptic.getvalue(), int((sample.segment_layer == 0).sum()))


def image_peers(crop: int) -> tuple[list[Peer], str]:
    """Who is installed, and a sentence on who is not."""
    peers = [Peer("detectron2's way", lambda given, generator: detectron2_sample(given, crop, generator))]
    try:
        peers += [
            Peer("albumentations + cv2", albumentations_sample(crop, "through")),
            Peer("the same, masks made behind", albumentations_sample(crop, "behind")),
            Peer("the same, no masks at all", albumentations_sample(crop, "none")),
        ]
    except ImportError:
        return peers, "albumentations: not installed (pip install 'mf_scale[bench]')"
    return peers, ""


def detectron2_sample(given: PeerInput, crop: int, generator: np.random.Generator) -> dict[str, Any]:
    """As MaskFormer's mapper for panoptic data: Pillow decodes and resizes the whole image and the whole panoptic map,
    torch the semantic map in double precision, which goes along with it.

    uint8 [3,crop,crop], int64 [crop,crop], bool [T,crop,crop]. The crop's rule on the largest category is off, as
    published.
    """
    import torch
    from torch.nn.functional import interpolate, pad

    with Image.open(io.BytesIO(given.image)) as file:
        image = np.asarray(file.convert("RGB"))
    with Image.open(io.BytesIO(given.panoptic)) as file:
        panoptic = np.asarray(file.convert("RGB"))
    with Image.open(io.BytesIO(given.labels)) as file:
        semantic = np.asarray(file).astype("double")
    shorter = int(generator.integers(int(SCALE[0] * crop), int(SCALE[1] * crop) + 1))
    size = _size((image.shape[0], image.shape[1]), shorter, crop)
    image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    panoptic = np.asarray(Image.fromarray(panoptic).resize(size, Image.Resampling.NEAREST))
    semantic = interpolate(torch.from_numpy(semantic)[None, None], size=size[::-1], mode="nearest")[0, 0].numpy()
    top = int(generator.integers(0, max(size[1] - crop, 0) + 1))
    left = int(generator.integers(0, max(size[0] - crop, 0) + 1))
    image = ssd_color(image[top : top + crop, left : left + crop], generator)
    panoptic, semantic = (a[top : top + crop, left : left + crop] for a in (panoptic, semantic))
    if generator.random() < 0.5:
        image, panoptic, semantic = (np.flip(array, axis=1) for array in (image, panoptic, semantic))
    coded = panoptic.astype(np.int32)
    ids = coded[..., 0] + 256 * coded[..., 1] + 256 * 256 * coded[..., 2]
    beside = (0, crop - image.shape[1], 0, crop - image.shape[0])
    pixels = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
    ids = pad(torch.as_tensor(ids.astype(np.int64)), beside, value=0).numpy()
    masks = [torch.from_numpy(np.equal(ids, segment + 1).copy()) for segment in range(given.segments)]
    return {
        "image": pad(pixels, beside, value=PAD).contiguous(),
        "sem_seg": pad(torch.as_tensor(semantic.astype(np.int64)), beside, value=IGNORED).contiguous(),
        "masks": torch.stack(masks) if masks else torch.zeros((0, crop, crop), dtype=torch.bool),
    }


def ssd_color(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """SSD's jitter in floating point, each of its four parts by itself, as BGR within; uint8 RGB [h,w,3]."""

    def scaled(values: np.ndarray, factor: float, added: float = 0.0) -> np.ndarray:
        return np.clip(values.astype(np.float32) * factor + added, 0, 255).astype(np.uint8)

    def contrast(values: np.ndarray) -> np.ndarray:
        return scaled(values, generator.uniform(0.5, 1.5)) if generator.random() < 0.5 else values

    image = image[:, :, [2, 1, 0]]
    if generator.random() < 0.5:
        image = scaled(image, 1.0, generator.uniform(-32, 32))
    contrast_first = generator.random() < 0.5
    image = contrast(image) if contrast_first else image
    if generator.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[:, :, 1] = scaled(hsv[:, :, 1], generator.uniform(0.5, 1.5))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if generator.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + int(generator.integers(-18, 19))) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    image = image if contrast_first else contrast(image)
    return image[:, :, [2, 1, 0]]


def albumentations_sample(crop: int, masks: str) -> Make:
    """OpenCV decodes; albumentations resizes, pads, crops, jitters and flips.

    uint8 [3,crop,crop] and bool [T,crop,crop]: the masks go `through` it, as its guide shows for segments, or are cut
    out of the map `behind` it, as transformers' examples do; `none`: the map [crop,crop] alone.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for its newest version
    import albumentations as peer

    shorter = list(range(int(SCALE[0] * crop), int(SCALE[1] * crop) + 1))
    filled = {"border_mode": cv2.BORDER_CONSTANT, "fill": PAD, "fill_mask": 0 if masks == "through" else IGNORED}
    pipeline = peer.Compose(
        [
            peer.SmallestMaxSize(max_size=shorter, interpolation=cv2.INTER_LINEAR),
            peer.PadIfNeeded(crop, crop, position="top_left", **filled),
            peer.RandomCrop(crop, crop),
            peer.RandomBrightnessContrast(brightness_limit=32 / 255, contrast_limit=0, p=0.5),
            peer.RandomBrightnessContrast(brightness_limit=0, contrast_limit=0.5, p=0.5),
            peer.ColorJitter(brightness=(1, 1), contrast=(1, 1), saturation=(0.5, 1.5), hue=(0, 0), p=0.5),
            peer.HueSaturationValue(hue_shift_limit=18, sat_shift_limit=0, val_shift_limit=0, p=0.5),
            peer.HorizontalFlip(p=0.5),
        ]
    )

    def make(given: PeerInput, _: np.random.Generator) -> dict[str, Any]:
        image = cv2.imdecode(np.frombuffer(given.image, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        labels = np.asarray(cv2.imdecode(np.frombuffer(given.labels, np.uint8), cv2.IMREAD_UNCHANGED))
        if masks == "through":
            several = [np.equal(labels, segment).view(np.uint8) for segment in range(given.segments)]
            made = pipeline(image=image, masks=several)
            target = {"masks": np.stack(made["masks"]).astype(bool)}
        else:
            made = pipeline(image=image, mask=labels)
            target = {"map": made["mask"]}
        if masks == "behind":
            target = {"masks": np.stack([np.equal(made["mask"], segment) for segment in range(given.segments)])}
        return {"image": np.ascontiguousarray(made["image"].transpose(2, 0, 1)), **target}

    return make


def _size(source: tuple[int, int], shorter: int, crop: int) -> tuple[int, int]:
    """(width, height) of an image with this shorter side, or with the longest longer side that is allowed."""
    height, width = source
    factor = min(shorter / min(height, width), LONGEST * crop / max(height, width))
    return max(1, round(width * factor)), max(1, round(height * factor))
