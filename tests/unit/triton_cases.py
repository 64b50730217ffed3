"""Cases of the Triton kernels against the plain reference in fp64, on any device.

Run as a program they are all checked in Triton's CPU interpreter, which must be chosen before Triton is imported.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mf_scale.config.schema import LossConfig, MatchingConfig
from mf_scale.data.batch import IGNORE, NONE, Batch
from mf_scale.kernels.settings import Settings
from mf_scale.kernels.triton_cost import CostWeights, pairwise_cost
from mf_scale.kernels.triton_mask_loss import mask_loss
from mf_scale.losses import reference

# Mask loss


def make_pairs(
    shape: tuple[int, int, int, int], size: tuple[int, int], *, layers: int = 1, segments: int = 4, device: str = "cpu"
) -> list[Tensor]:
    """Logits [B,P,h,w], a map with NONE and IGNORE [B,L,H,W], segments, layers [B,P] and counts [B]."""
    (B, P, *_), g = shape, torch.Generator().manual_seed(sum(shape) + sum(size))
    segment_map = torch.randint(IGNORE, segments, (B, layers, *size), generator=g, dtype=torch.int16)
    segment_map[:, 1:][segment_map[:, 1:] == IGNORE] = NONE
    counts = torch.randint(0, P + 1, (B,), generator=g)
    counts[0] = P
    made = [
        torch.randn(shape, generator=g) * 4,
        segment_map,
        torch.randint(0, segments, (B, P), generator=g),
        torch.randint(0, layers, (B, P), generator=g),
        counts,
    ]
    return [tensor.to(device) for tensor in made]


def plain_mask_loss(pairs: list[Tensor], settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """By the reference, torch's upsampling and autograd, in fp64."""
    segment_map, segments, layers, counts = (tensor.cpu() for tensor in pairs[1:])
    logits = pairs[0].cpu().double().requires_grad_()
    upsampled = F.interpolate(logits, size=segment_map.shape[2:], mode="bilinear", align_corners=False)
    focal, dice = (torch.zeros(segments.shape, dtype=torch.float64) for _ in range(2))
    for b, count in enumerate(counts.tolist()):
        counted = reference.counted_pixels(segment_map[b], "exclude" if settings.exclude else "negative")
        for p in range(count):
            mask = reference.dense_mask(segment_map[b], int(layers[b, p]), int(segments[b, p]))
            focal[b, p] = reference.focal_loss(upsampled[b, p], mask, counted, settings.alpha, settings.gamma)
            dice[b, p] = reference.dice_loss(upsampled[b, p], mask, counted)
    (settings.focal_weight * focal.sum() + settings.dice_weight * dice.sum() + 0 * logits.sum()).backward()
    assert logits.grad is not None
    return focal.detach(), dice.detach(), logits.grad


def settings(*, exclude: bool = False, gamma: float = 2.0) -> Settings:
    return Settings(focal_weight=20.0, dice_weight=1.5, alpha=0.25, gamma=gamma, exclude=exclude)


def by_kernels(pairs: list[Tensor], wanted: Settings) -> tuple[Tensor, Tensor, Tensor]:
    logits, segment_map, segments, layers, counts = pairs
    focal, dice, gradient = mask_loss(logits, segment_map, segments, layers, counts, wanted, want_gradient=True)
    assert gradient is not None
    return focal, dice, gradient


def compare_mask_loss(pairs: list[Tensor], wanted: Settings) -> None:
    logits, segment_map, segments, layers, counts = pairs
    first, again = by_kernels(pairs, wanted), by_kernels(pairs, wanted)
    for name, got, repeated, right in zip(
        ("focal", "dice", "gradient"), first, again, plain_mask_loss(_signed(pairs), wanted), strict=True
    ):
        assert got.dtype == torch.float32, name
        assert torch.equal(got, repeated), f"{name} is not the same bit for bit"
        error, scale = (got.cpu() - right).abs().max().item(), max(right.abs().max().item(), 1e-30)
        assert error <= 3e-6 * (scale if name == "gradient" else max(1.0, scale)), f"{name} {error} of {scale}"
        behind = torch.arange(got.shape[1]) >= counts.cpu()[:, None]
        assert not got.cpu()[behind].any(), f"{name} of padding"
    without = mask_loss(logits, segment_map, segments, layers, counts, wanted, want_gradient=False)
    assert without[2] is None
    assert torch.equal(without[0], first[0])


def _signed(pairs: list[Tensor]) -> list[Tensor]:
    """A map of bytes back in int16."""
    if pairs[1].dtype != torch.uint8:
        return pairs
    return [pairs[0], pairs[1].to(torch.int8).to(torch.int16), *pairs[2:]]


def ratio_of_four(device: str) -> None:
    compare_mask_loss(make_pairs((2, 3, 4, 5), (16, 20), device=device), settings())


def layers_and_ignored(device: str) -> None:
    compare_mask_loss(make_pairs((2, 3, 4, 3), (8, 9), layers=2, device=device), settings(exclude=True))


def any_ratio(device: str) -> None:
    sizes = [((3, 2), (8, 9)), ((2, 5), (7, 4)), ((1, 1), (3, 2)), ((5, 1), (3, 4)), ((2, 2), (1, 1)), ((3, 4), (3, 4))]
    for number, (short, long) in enumerate(sizes):
        compare_mask_loss(make_pairs((1, 2, *short), long, device=device), settings(exclude=number % 2 == 0))


def bands_and_blocks(device: str) -> None:
    """Several bands of rows, and pairs that begin in one block of lanes and end in the next."""
    compare_mask_loss(make_pairs((1, 3, 17, 60), (17, 60), device=device), settings())


def half_logits(device: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        pairs = make_pairs((1, 2, 3, 3), (12, 12), device=device)
        compare_mask_loss([pairs[0].to(dtype), *pairs[1:]], settings())


def map_of_bytes(device: str) -> None:
    pairs = make_pairs((1, 2, 3, 3), (9, 6), layers=2, device=device)
    compare_mask_loss([pairs[0], pairs[1].to(torch.uint8), *pairs[2:]], settings(exclude=True))


def other_gammas(device: str) -> None:
    for gamma in (0.0, 1.0, 2.5):
        compare_mask_loss(make_pairs((1, 2, 2, 3), (4, 6), device=device), settings(gamma=gamma))


def odd_segments(device: str) -> None:
    """An index above 255, a single pixel, one without any pixel; nothing but ignored pixels."""
    logits, segment_map, segments, layers, counts = make_pairs((1, 3, 3, 4), (12, 16), device=device)
    segment_map.fill_(NONE)
    segment_map[0, 0, :5], segment_map[0, 0, 7, 9] = 300, 1
    segments[0] = torch.tensor([300, 1, 2])
    compare_mask_loss([logits, segment_map, segments, layers, counts], settings())
    segment_map.fill_(IGNORE)
    compare_mask_loss([logits, segment_map, segments, layers, counts], settings(exclude=True))
    compare_mask_loss([logits, segment_map, segments, layers, counts], settings(exclude=False))
    for term in by_kernels([logits, segment_map, segments, layers, counts], settings(exclude=True)):
        assert not term.any()


def extreme_logits(device: str) -> None:
    pairs = make_pairs((1, 2, 3, 3), (12, 12), device=device)
    compare_mask_loss([pairs[0].sign() * 1e4, *pairs[1:]], settings())
    clean = by_kernels(pairs, settings())
    for bad in (float("nan"), float("inf"), float("-inf")):
        for exclude in (False, True):
            logits = pairs[0].clone()
            logits[0, 0, 1, 1] = bad
            segment_map = torch.full_like(pairs[1], IGNORE) if exclude else pairs[1]
            got = by_kernels([logits, segment_map, *pairs[2:]], settings(exclude=exclude))
            assert not got[0][0, 0].isfinite(), bad
            assert not got[2][0, 0].isfinite().all(), bad
            assert exclude or torch.equal(got[2][0, 1], clean[2][0, 1])


def layers_beyond_the_map(device: str) -> None:
    """Read as the nearest ones: no memory outside the map is read."""
    pairs = make_pairs((1, 3, 3, 3), (9, 6), layers=2, device=device)
    wild = [*pairs[:3], torch.where(pairs[3] == 0, -(10**6), 10**6), pairs[4]]
    assert all(map(torch.equal, by_kernels(wild, settings()), by_kernels(pairs, settings())))


def no_pair(device: str) -> None:
    pairs = make_pairs((1, 2, 2, 2), (4, 4), device=device)
    pairs[4].zero_()
    compare_mask_loss(pairs, settings())


# Matching cost


def by_cost_kernels(arguments: list[Tensor], weights: CostWeights, device: str) -> tuple[Tensor, ...]:
    probability, queries, pixels, segment_map, layers = (argument.to(device) for argument in arguments)
    return pairwise_cost(probability, queries, pixels, segment_map, layers, weights)


def compare_cost(
    shape: tuple[int, int, int, int, int, int],
    size: tuple[int, int],
    segments: int,
    *,
    layers: int = 1,
    exclude: bool = False,
    byte: bool = False,
    dtype: torch.dtype = torch.float32,
    gamma: float = 2.0,
    classes: int = 5,
    device: str = "cpu",
    tolerance: float = 1e-5,
) -> None:
    """Costs of B images, S layers, Q queries, C channels at h x w against the reference, term by term."""
    (B, S, Q, C, h, w), g = shape, torch.Generator().manual_seed(sum(shape) + segments)
    class_logits = torch.randn(B, S, Q, classes + 1, generator=g).to(dtype)
    queries = torch.randn(B, S, Q, C, generator=g).to(dtype)
    pixels = (torch.randn(B, C, h, w, generator=g) / C**0.5 * 3).to(dtype)
    batch = Batch(
        images=torch.zeros(B, 3, 1, 1, dtype=torch.uint8),
        segment_map=torch.randint(IGNORE, max(1, segments), (B, layers, *size), generator=g, dtype=torch.int16),
        labels=torch.randint(0, classes, (B, segments), generator=g),
        segment_layer=torch.randint(0, layers, (B, segments), generator=g),
        keys=["image"] * B,
    )
    weights = CostWeights(1.5, 20.0, 1.0, alpha=0.25, gamma=gamma, exclude=exclude)
    labels = batch.labels[:, None].expand(B, S * Q, segments)
    arguments = [class_logits.flatten(1, 2).float().softmax(-1).gather(2, labels), queries.flatten(1, 2), pixels]
    arguments += [batch.segment_map.to(torch.uint8 if byte else torch.int16), batch.segment_layer]
    got, again = (by_cost_kernels(arguments, weights, device) for _ in range(2))
    loss = LossConfig(focal_gamma=gamma, ignored_pixels="exclude" if exclude else "negative")
    logits = torch.einsum("bsqc,bchw->bsqhw", queries.double(), pixels.double())
    for kind, terms in enumerate(((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), weights[:3])):
        matching = MatchingConfig(class_weight=terms[0], focal_weight=terms[1], dice_weight=terms[2])
        right = [
            reference.matching_cost(class_logits[b, s].double(), logits[b, s], batch, b, matching, loss)
            for b in range(B)
            for s in range(S)
        ]
        assert torch.equal(got[kind], again[kind])
        difference = got[kind].cpu().double() - torch.stack(right).view(B, S * Q, segments)
        assert difference.abs().max() <= tolerance * (20.0 if kind == 3 else 1.0), (kind, difference.abs().max())


def cost_of_layers(device: str) -> None:
    compare_cost((2, 2, 3, 8, 4, 5), (16, 20), 3, device=device)
    compare_cost((1, 2, 10, 20, 9, 7), (31, 20), 5, layers=2, exclude=True, device=device)
    compare_cost((1, 1, 3, 17, 5, 6), (5, 6), 2, layers=3, exclude=True, byte=True, gamma=1.5, device=device)


def cost_of_any_count(device: str) -> None:
    compare_cost((1, 2, 3, 8, 6, 9), (24, 36), 300, exclude=True, classes=40, device=device)
    compare_cost((1, 1, 1, 1, 1, 1), (2, 3), 1, device=device)
    nothing = [torch.zeros(shape) for shape in ((1, 4, 0), (1, 4, 2), (1, 2, 2, 2))]
    nothing += [torch.zeros(1, 1, 4, 4, dtype=torch.int16), torch.zeros(1, 0, dtype=torch.int64)]
    weights = CostWeights(1.0, 20.0, 1.0, alpha=0.25, gamma=2.0, exclude=False)
    empty = by_cost_kernels(nothing, weights, device)
    assert [term.shape for term in empty] == [(1, 4, 0)] * 4


def cost_of_large_blocks(device: str) -> None:
    """More queries, channels and pixels than a block; several splits of the pixels."""
    compare_cost((1, 1, 70, 270, 3, 4), (6, 8), 2, device=device)
    compare_cost((1, 1, 2, 4, 23, 24), (23, 24), 3, exclude=True, device=device)


def cost_of_half_embeddings(device: str) -> None:
    compare_cost((1, 1, 4, 16, 4, 4), (8, 8), 3, dtype=torch.bfloat16, device=device)
    compare_cost((1, 1, 4, 16, 4, 4), (8, 8), 3, dtype=torch.float16, device=device)


def cost_not_finite(device: str) -> None:
    """Shown in the row of the query, wherever the pixel is, and in no other row."""
    g = torch.Generator().manual_seed(3)
    for bad in (float("nan"), float("inf"), float("-inf")):
        queries, pixels = torch.rand(1, 3, 4, generator=g), torch.rand(1, 4, 3, 3, generator=g)
        queries[0, 1, 2] = bad
        segment_map = torch.zeros(1, 1, 3, 3, dtype=torch.int16)
        segment_map[0, 0, 0] = IGNORE
        layers, probability = torch.zeros(1, 2, dtype=torch.int64), torch.rand(1, 3, 2, generator=g)
        arguments = [probability, queries, pixels, segment_map, layers]
        weights = CostWeights(1.0, 20.0, 1.0, alpha=0.25, gamma=2.0, exclude=True)
        total = by_cost_kernels(arguments, weights, device)[3]
        assert total.isfinite().all(dim=2).tolist() == [[True, False, True]], bad
    probability[0, 2, 1] = float("nan")
    arguments = [probability, torch.rand(1, 3, 4, generator=g), *arguments[2:]]
    total = by_cost_kernels(arguments, weights, device)[3]
    assert total.isfinite().all(dim=2).tolist() == [[True, True, False]]


CASES: dict[str, Callable[[str], None]] = {
    case.__name__: case
    for case in (
        *(ratio_of_four, layers_and_ignored, any_ratio, bands_and_blocks, half_logits, map_of_bytes, other_gammas),
        *(odd_segments, extreme_logits, no_pair, cost_of_layers, cost_of_any_count, cost_of_large_blocks),
        *(cost_of_half_embeddings, cost_not_finite, layers_beyond_the_map),
    )
}


def _run_cases() -> dict[str, str]:
    found = {}
    for name, case in CASES.items():
        try:
            case("cpu")
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()[-3000:]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_run_cases()))
