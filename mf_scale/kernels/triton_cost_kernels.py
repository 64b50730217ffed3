"""Triton kernels of the matching cost, launched by triton_cost.py.

A program holds a block of queries of all layers, walks over tiles of pixels, makes their logits in registers, the three
values a logit gives (two focal terms and the probability), and multiplies them by the one-hot columns of a block of
segments, made from the map on the way. Logits, masks and columns are never in memory. Three transcendentals a logit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from mf_scale.kernels.triton_common import LN_2, LOG2_E, jit, sigmoid_terms, tl, to_gamma


@jit
def cost_maps(segment_map, maps, h, w, H, W, BLOCK: tl.constexpr):
    """The map [B L,H,W] at its pixels nearest to h x w: cell i reads pixel floor(i H / h)."""
    layer, cell = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = cell < h * w
    value = tl.load(segment_map + layer * H * W + (cell // w * H // h) * W + cell % w * W // w, mask=there)
    tl.store(maps + layer * (h * w) + cell, value, mask=there)


@jit
def _columns(
    maps, layer, t, place, there, T, pixels,
    EXCLUDE: tl.constexpr, IGNORE: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """One-hot columns [pixels,segments] of the map, and which pixels count, both as bool."""
    top = tl.load(maps + place, mask=there, other=IGNORE).to(tl.int32)
    kept = there & (top != IGNORE) if EXCLUDE else there
    members = (top[:, None] == t[None, :]) & (layer == 0)[None, :]
    for below in tl.static_range(1, LAYERS):
        value = tl.load(maps + below * pixels + place, mask=there, other=IGNORE).to(tl.int32)
        members = members | ((value[:, None] == t[None, :]) & (layer == below)[None, :])
    return members & kept[:, None] & (t < T)[None, :], kept


@jit
def _logits(
    queries, features, rows, place, there, N, C, pixels,
    BN: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, PARTS: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Product [BN,BP] of embeddings [N,C] and pixel embeddings [C,hw], added up in fp32."""
    z = tl.zeros([BN, BP], tl.float32)
    for part in tl.static_range(PARTS):
        c = part * BC + tl.arange(0, BC)
        left = tl.load(queries + rows[:, None] * C + c[None, :], mask=(rows < N)[:, None] & (c < C)[None, :], other=0.0)
        right = tl.load(
            features + c[:, None] * pixels + place[None, :], mask=(c < C)[:, None] & there[None, :], other=0.0
        )
        if not GPU:  # the interpreter has no arithmetic of bf16
            left, right = left.to(tl.float32), right.to(tl.float32)
        z = tl.dot(left, right, z, input_precision="tf32")
    return z


@jit
def _add_product(total, values, members, GPU: tl.constexpr):
    """total + values @ members for fp32 values and a one-hot matrix, as two bf16 products: of values and of the rest.

    Right to 2^-17 of each value, because zeros and ones are exact. In bf16 the values go from one product into the next
    without leaving their registers, which in TF32 they do not.
    """
    upper = values.to(tl.bfloat16)
    rest = (values - upper.to(tl.float32)).to(tl.bfloat16)
    columns = members.to(tl.bfloat16)
    if not GPU:
        upper, rest, columns = upper.to(tl.float32), rest.to(tl.float32), members.to(tl.float32)
    return tl.dot(rest, columns, tl.dot(upper, columns, total))


@jit(do_not_specialize=["T", "tiles"])
def cost_sums(
    queries, features, maps, segment_layer, inside, whole, areas, N, C, T, pixels, tiles, alpha,
    GAMMA: tl.constexpr, EXCLUDE: tl.constexpr, IGNORE: tl.constexpr, LAYERS: tl.constexpr, BN: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr, T_BLOCKS: tl.constexpr,
    GPU: tl.constexpr,
):  # fmt: skip
    """Sums of queries [B,N,C] over one split of the pixels.

    inside [split,B,2,N,T]: in each segment, focal term of target 1 minus the one of target 0, and probability;
    whole [split,B,2,N]: anywhere, focal term of target 0, and probability;
    areas [split,B,T+1]: pixels of each segment, and those that count.
    """
    b, split, block = tl.program_id(2), tl.program_id(1) // T_BLOCKS, tl.program_id(1) % T_BLOCKS
    rows, t = tl.program_id(0) * BN + tl.arange(0, BN), block * BT + tl.arange(0, BT)
    layer = tl.minimum(tl.load(segment_layer + b * T + t, mask=t < T, other=0), LAYERS - 1).to(tl.int32)
    queries, features = queries + b.to(tl.int64) * N * C, features + b.to(tl.int64) * C * pixels
    maps = maps + b.to(tl.int64) * LAYERS * pixels
    focal_in, mass_in = tl.zeros([BN, BT], tl.float32), tl.zeros([BN, BT], tl.float32)
    focal_out, mass = tl.zeros([BN, BP], tl.float32), tl.zeros([BN, BP], tl.float32)
    sizes, counted = tl.zeros([BP, BT], tl.int32), tl.zeros([BP], tl.int32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(pixels, BP))):
        place = tile * BP + tl.arange(0, BP)
        there = place < pixels
        members, kept = _columns(maps, layer, t, place, there, T, pixels, EXCLUDE, IGNORE, LAYERS)
        # A block of segments behind the first skips tiles that hold none of them: few hold many of a thousand.
        if T_BLOCKS == 1 or (block == 0) | (tl.max(tl.max(members.to(tl.int32), axis=1), axis=0) > 0):
            z = _logits(queries, features, rows, place, there, N, C, pixels, BN, BP, BC, PARTS, GPU)
            lower, s, cross = sigmoid_terms(z * LOG2_E, GPU)
            focal_0 = (1.0 - alpha) * LN_2 * to_gamma(lower, s, GAMMA) * cross
            focal_1 = -alpha * LN_2 * to_gamma(-cross, 1.0 - s, GAMMA) * lower
            focal_in = _add_product(focal_in, focal_1 - focal_0, members, GPU)
            mass_in = _add_product(mass_in, s, members, GPU)
            counts = kept.to(tl.float32)[None, :]  # a factor, for NaN is not to hide where ignored
            focal_out, mass = focal_out + focal_0 * counts, mass + s * counts
            sizes, counted = sizes + members.to(tl.int32), counted + kept.to(tl.int32)
    number = split * tl.num_programs(2) + b
    mask = (rows < N)[:, None] & (t < T)[None, :]
    tl.store(inside + (2 * number.to(tl.int64) * N + rows)[:, None] * T + t[None, :], focal_in, mask=mask)
    tl.store(inside + ((2 * number + 1).to(tl.int64) * N + rows)[:, None] * T + t[None, :], mass_in, mask=mask)
    if block == 0:
        tl.store(whole + number * 2 * N + rows, tl.sum(focal_out, axis=1), mask=rows < N)
        tl.store(whole + (number * 2 + 1) * N + rows, tl.sum(mass, axis=1), mask=rows < N)
    if tl.program_id(0) == 0:
        tl.store(areas + number * (T + 1) + t, tl.sum(sizes, axis=0).to(tl.float32), mask=t < T)
        if block == 0:
            tl.store(areas + number * (T + 1) + T, tl.sum(counted, axis=0).to(tl.float32))


@jit(do_not_specialize=["T", "splits"])
def cost_finish(
    probability, inside, whole, areas, costs, N, T, splits, class_weight, focal_weight, dice_weight,
    BT: tl.constexpr,
):  # fmt: skip
    """Class, focal, dice and total cost [4,B,N,T] of one query: its splits added in their order."""
    n, b, B = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    focal_out, mass, counted = 0.0, 0.0, 0.0
    for split in range(splits):
        number = split * B + b
        focal_out += tl.load(whole + number * 2 * N + n)
        mass += tl.load(whole + (number * 2 + 1) * N + n)
        counted += tl.load(areas + number * (T + 1) + T)
    for start in range(0, T, BT):
        t = start + tl.arange(0, BT)
        real = t < T
        focal_in, mass_in, size = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
        for split in range(splits):
            number = split * B + b
            focal_in += tl.load(inside + (2 * number.to(tl.int64) * N + n) * T + t, mask=real, other=0.0)
            mass_in += tl.load(inside + ((2 * number + 1).to(tl.int64) * N + n) * T + t, mask=real, other=0.0)
            size += tl.load(areas + number * (T + 1) + t, mask=real, other=0.0)
        by_class = -tl.load(probability + (b.to(tl.int64) * N + n) * T + t, mask=real, other=0.0)
        focal = (focal_in + focal_out) / tl.maximum(counted, 1.0)
        dice = 1.0 - (2.0 * mass_in + 1.0) / (mass + size + 1.0)
        out = costs + (b.to(tl.int64) * N + n) * T + t
        of_kind = (B * N).to(tl.int64) * T
        tl.store(out, by_class, mask=real)
        tl.store(out + of_kind, focal, mask=real)
        tl.store(out + 2 * of_kind, dice, mask=real)
        total = class_weight * by_class + focal_weight * focal + dice_weight * dice
        tl.store(out + 3 * of_kind, total, mask=real)
