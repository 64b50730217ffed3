"""Several views of an image: what their average is, and where it must be the plain answer to the bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mf_scale.config.schema import Config
from mf_scale.config.validate import validate
from mf_scale.data.transforms import Window, resize_part
from mf_scale.errors import UserError
from mf_scale.evaluation.averaging import averaged_semantic
from mf_scale.evaluation.forward import answer
from mf_scale.evaluation.inference import semantic
from mf_scale.evaluation.per_pixel import per_pixel_semantic
from mf_scale.evaluation.views import covered, inference_size, window_starts
from mf_scale.models.build import build_model
from mf_scale.models.outputs import MaskPrediction, PixelPrediction
from tests.random_batches import said_outright
from tests.unit.painted import COLORS, ColorModel, painted_config

SAMPLE = Path(__file__).parents[2] / "data_tools" / "sample" / "coco_panoptic" / "val"
CLASSES = 11
SMALL = 1 << 16


class Texture(nn.Module):
    """A small random network whose answer depends on the surroundings, so that windows and scales make a difference."""

    stride = 4

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        generator = torch.Generator().manual_seed(1)
        self.filters = nn.Parameter(torch.randn(16, 3, 5, 5, generator=generator) / 2)
        self.embeddings = torch.randn(1, CLASSES, 16, generator=generator)
        self.said = 4 * torch.randn(1, CLASSES, CLASSES + 1, generator=generator)
        self.bias = torch.randn(CLASSES, generator=generator)

    def forward(self, images: Tensor) -> MaskPrediction | PixelPrediction:
        pooled = F.avg_pool2d(images.float() / 64 - 2, self.stride, ceil_mode=True)
        pixels = F.conv2d(pooled, self.filters, padding=2)
        if self.kind == "per_pixel":
            return PixelPrediction(self.embeddings, pixels, self.bias)
        return said_outright(self.said, self.embeddings, pixels)


@pytest.fixture(scope="module", params=["mask_classification", "per_pixel"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return Texture(request.param).eval()


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """A real photograph, 96x128: half of it at stride 4 is a whole number of cells."""
    file = sorted(SAMPLE.glob("*.jpg"))[0]
    return np.asarray(Image.open(file).convert("RGB").resize((128, 96)))


class Diverged(Texture):
    """Says NaN: of every pixel, or of those of the right half."""

    whole = True

    def forward(self, images: Tensor) -> MaskPrediction | PixelPrediction:
        said = super().forward(images)
        pixels = said.pixel_embeddings.clone()
        pixels[..., 0 if self.whole else pixels.shape[-1] // 2 :] = torch.nan
        return replace(said, pixel_embeddings=pixels)


def _config(**options: Any) -> Config:
    return painted_config(eval__short_side=96, eval__max_side=1000, data__task="semantic", **options)


def test_one_view_is_the_plain_answer(model: nn.Module, image: np.ndarray) -> None:
    """Also through the averaging itself, which has one view to average, and in small bands and chunks."""
    odd = image[:61, :83]
    said = answer(model, odd, _config(eval__scales=[1.0], eval__flip=False))
    size = inference_size(61, 83, 96, 1000)
    pixels = resize_part(odd, Window(0, 0, 61, 83, *size)).transpose(2, 0, 1)
    with torch.no_grad():
        prediction = model(torch.from_numpy(np.ascontiguousarray(pixels))[None])
    plain = semantic if isinstance(prediction, MaskPrediction) else per_pixel_semantic
    extent = size[0] / 4, size[1] / 4
    expected = plain(prediction, (61, 83), extent=extent)[0].numpy()
    assert len(np.unique(expected)) > 2, "the answer is not one class"
    assert np.array_equal(said.semantic(), expected)
    assert np.array_equal(averaged_semantic(said.scales, said.size).numpy(), expected)
    assert np.array_equal(averaged_semantic(said.scales, said.size, budget=SMALL).numpy(), expected)


@pytest.mark.parametrize("kind", ["mask_classification", "per_pixel"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_diverged_has_an_answer_too(kind: str, whole: bool, image: np.ndarray) -> None:
    """Always the same one, of valid classes: what averages, in one piece or many, says what the plain way says."""
    model = Diverged(kind).eval()
    model.whole = whole
    said = answer(model, image, _config())
    plain = said.semantic()
    assert (plain[:, 80:] == 0).all() and (plain == 0).all() == whole
    for budget in (1, SMALL, 1 << 24):
        assert np.array_equal(averaged_semantic(said.scales, said.size, budget=budget).numpy(), plain)
        if isinstance(said.prediction, PixelPrediction):
            again = per_pixel_semantic(said.prediction, said.size, extent=said.extent, budget=budget)
            assert np.array_equal(again[0].numpy(), plain)
    for options in ({"eval__flip": True}, {"eval__scales": [0.5, 1.0]}, {"eval__window": [64, 64]}):
        first, second = (answer(model, image, _config(**options)).semantic() for _ in range(2))
        assert np.array_equal(first, second) and first.min() >= 0 and first.max() < CLASSES
        assert not whole or (first == 0).all()


def test_of_numbers_and_nan_the_class_of_nan_wins_in_one_piece_and_many() -> None:
    """As in one argmax of all logits: the rest of the classes is no better known."""
    embeddings = torch.arange(6.0)[None, :, None].clone()
    embeddings[0, [2, 4]] = torch.nan
    prediction = PixelPrediction(embeddings, torch.ones(1, 1, 4, 4))
    assert all((per_pixel_semantic(prediction, (4, 4), budget=budget) == 2).all() for budget in (1, 1 << 20))


@pytest.mark.parametrize("window", [[96, 128], [64, 0], [0, 64], [700, 900]])
def test_a_window_as_large_as_the_image_is_no_window(model: nn.Module, image: np.ndarray, window: list[int]) -> None:
    window = [side or whole for side, whole in zip(window, (96, 128), strict=True)]
    without = answer(model, image, _config()).semantic()
    found = answer(model, image, _config(eval__window=window)).semantic()
    assert np.array_equal(found, without) == (window[0] >= 96 and window[1] >= 128)


@pytest.mark.parametrize("options", [{}, {"eval__scales": [0.7, 1.0, 1.3]}, {"eval__window": [64, 80]}])
def test_a_mirrored_image_gives_the_mirrored_result(
    model: nn.Module, image: np.ndarray, options: dict[str, Any]
) -> None:
    odd = np.ascontiguousarray(image[:77, :101])
    config = _config(eval__flip=True, **options)
    upright = answer(model, odd, config).semantic()
    mirrored = answer(model, np.ascontiguousarray(odd[:, ::-1]), config).semantic()
    assert np.array_equal(mirrored[:, ::-1], upright)
    plain = _config(**options)
    assert not np.array_equal(answer(model, odd, plain).semantic(), upright), "the mirror image has a say"


@pytest.mark.parametrize(
    "options",
    [
        {"eval__scales": [1.0, 2.0]},
        {"eval__scales": [2.0]},
        {"eval__scales": [1.0, 2.0], "eval__flip": True},
        {"eval__window": [64, 64], "eval__window_overlap": 0.5},
        {"eval__window": [64, 96], "eval__window_overlap": 0.0, "eval__flip": True, "eval__scales": [2.0, 1.0]},
    ],
)
def test_the_average_is_its_definition(model: nn.Module, image: np.ndarray, options: dict[str, Any]) -> None:
    config = _config(**options)
    expected = _dense(model, image, config)
    said = answer(model, image, config)
    for budget in (1 << 24, SMALL):
        found = averaged_semantic(said.scales, said.size, budget=budget)
        best = expected.max(0).values
        assert (expected.gather(0, found[None])[0] >= best - 1e-5).all(), "every pixel has a class of the largest score"
    assert np.array_equal(said.semantic(), averaged_semantic(said.scales, said.size).numpy())


def _dense(model: nn.Module, image: np.ndarray, config: Config) -> Tensor:
    """Mean class scores [K,H,W]: every view at full size, with torch's own interpolation."""
    total = torch.zeros(CLASSES, *image.shape[:2])
    views = [(scale, flip) for scale in config.eval.scales for flip in ([False, True] if config.eval.flip else [False])]
    for scale, flip in views:
        height, width = round(image.shape[0] * scale), round(image.shape[1] * scale)
        shown = np.ascontiguousarray(image[:, ::-1]) if flip else image
        pixels = resize_part(shown, Window(0, 0, shown.shape[0], shown.shape[1], height, width))
        scores, count = torch.zeros(CLASSES, height, width), torch.zeros(height, width)
        tall, wide = config.eval.window or (height, width)
        for top in _starts(height, tall, config.eval.window_overlap):
            for left in _starts(width, wide, config.eval.window_overlap):
                part = pixels[top : top + tall, left : left + wide]
                here = (slice(top, top + part.shape[0]), slice(left, left + part.shape[1]))
                scores[:, here[0], here[1]] += _scores(model, part, scale)
                count[here] += 1
        scores /= count
        step = round(scale)
        if step > 1:  # the result's pixel centres lie between four of the larger image's, whose maps are linear there
            scores = scores[:, step // 2 :: step, step // 2 :: step]
        total += scores.flip(-1) if flip else scores
    return total / len(views)


def _scores(model: nn.Module, pixels: np.ndarray, scale: float) -> Tensor:
    """Scores at a view's own pixels; of an even scale at the corners between them, where the result's centres lie."""
    height, width = pixels.shape[:2]
    with torch.no_grad():
        said = model(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None])
    if isinstance(said, PixelPrediction):
        logits = torch.einsum("kc,chw->khw", said.class_embeddings[0], said.pixel_embeddings[0])
        logits = logits if said.bias is None else logits + said.bias[:, None, None]
        return _at_corners(logits, (height, width), scale).softmax(0)
    masks = torch.einsum("qc,chw->qhw", said.mask_embeddings[0], said.pixel_embeddings[0])
    masks = _at_corners(masks, (height, width), scale).sigmoid()
    return torch.einsum("qk,qhw->khw", said.class_logits[0].softmax(-1)[:, :-1], masks)


def _at_corners(maps: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """Maps at the pixels of a view; at scale 2 at the corner above and left of each."""
    if scale == 1:
        return F.interpolate(maps[None], size=size, mode="bilinear")[0]
    half = (2 * size[0], 2 * size[1])
    fine = F.interpolate(maps[None], size=half, mode="bilinear")[0]
    # A corner lies in the middle of the four fine centres around it, between which a bilinear map is linear.
    padded = F.pad(fine, (1, 0, 1, 0), mode="replicate")
    corners = (padded[:, :-1, :-1] + padded[:, 1:, :-1] + padded[:, :-1, 1:] + padded[:, 1:, 1:]) / 4
    return corners[:, ::2, ::2]


def _starts(size: int, window: int, overlap: float) -> list[int]:
    if window >= size:
        return [0]
    starts = list(range(0, size - window, int(window * (1 - overlap))))
    return [*starts, size - window]


@given(st.integers(1, 3000), st.integers(64, 1500), st.floats(0, 0.95))
def test_windows_cover_a_side(size: int, window: int, overlap: float) -> None:
    starts = window_starts(size, window, overlap)
    assert starts[0] == 0 and starts[-1] == max(0, size - window) and starts == sorted(set(starts))
    shared = [a + window - b for a, b in pairwise(starts)]
    assert all(s >= overlap * window - 1e-9 for s in shared)


@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 899), st.integers(1, 900))
def test_a_window_covers_the_pixels_whose_centres_lie_in_it(size: int, resized: int, start: int, length: int) -> None:
    window = slice(min(start, resized - 1), min(start, resized - 1) + length)
    found = covered(window, size, resized)
    inside = [y for y in range(size) if 2 * window.start * size <= (2 * y + 1) * resized < 2 * window.stop * size]
    assert list(range(found.start, found.stop)) == inside


@pytest.mark.parametrize("size", [(3, 500), (97, 211), (1, 1)])
def test_windows_on_any_image(size: tuple[int, int]) -> None:
    """Every pixel is in a window, also where the image is enlarged or shrunk to a few of its pixels."""
    config = painted_config().model
    config.backbone = replace(config.backbone, name="resnet18", weights="none")
    config.pixel_decoder = replace(config.pixel_decoder, width=16, mask_channels=16)
    config.decoder = replace(config.decoder, layers=1, queries=3, width=16, heads=2, feedforward=16)
    small = build_model(config, 3, seed=0).eval()
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    told = painted_config(data__task="semantic", eval__window=[64, 72], eval__short_side=80, eval__max_side=160)
    found = answer(small, pixels, told).semantic()
    assert found.shape == size and found.min() >= 0 and found.max() < 3


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"eval__flip": True}, "eval.flip = True averages"),
        ({"eval__scales": [1.0, 2.0]}, "eval.scales = "),
        ({"eval__window": [64, 64]}, "eval.window = "),
    ],
)
@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_segments_of_several_views_are_refused(
    image: np.ndarray, task: str, options: dict[str, Any], wrong: str
) -> None:
    config = painted_config(data__task=task, eval__short_side=96, **options)
    with pytest.raises(UserError, match=wrong):
        validate(config)
    said = answer(ColorModel().eval(), image, config)
    for asked in (said.panoptic, said.instance):
        with pytest.raises(UserError, match="cannot be averaged"):
            asked([True, True, False, False], config)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"eval__scales": []}, "above 0"),
        ({"eval__scales": [1.0, -2.0]}, "above 0"),
        ({"eval__scales": [1.0, 1.0]}, "twice"),
        ({"eval__window": [64]}, r"\[height, width\]"),
        ({"eval__window": [64, 12]}, r"\[height, width\]"),
        ({"eval__window": [64, 64], "eval__window_overlap": 1.0}, "window_overlap"),
        ({"eval__window_overlap": 0.5}, "does nothing without"),
        ({"eval__scales": [float("nan")]}, "finite"),
    ],
)
def test_settings_of_views_that_make_no_sense(options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        validate(painted_config(data__task="semantic", **options))


def test_one_other_scale_serves_every_task(image: np.ndarray) -> None:
    painted = np.zeros_like(image)
    painted[:, :64], painted[:, 64:] = COLORS[0], COLORS[2]
    config = painted_config(eval__short_side=96, eval__scales=[0.5])
    validate(config)
    segment_map, segments = answer(ColorModel().eval(), painted, config).panoptic([True, True, False, False], config)
    assert [s["label"] for s in segments] == [0, 2] and abs((segment_map == 0).mean() - 0.5) < 0.02
