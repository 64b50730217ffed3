"""Triton kernels of the mask loss, launched by triton_mask_loss.py.

Geometry. Four neighbouring cell centres of the logits span a quad; the output pixels whose source lies between them are
the quad's. Quad row q, of 0..h, lies between cell rows q-1 and q (at a border both are the border row), columns alike.
So a pixel belongs to one quad whatever the ratio, and the transposed upsampling adds to four corners only.

A lane is one quad column of one pair and walks down a band of quad rows. It keeps all its pixels to itself: sums are
made in the order of its walk, nothing is added atomically, and no value of the map's resolution leaves a register.

Per pixel and pass: three transcendentals (exp2, log2, exp2) and one element of the map.

Where a quad row's pixels begin is worked out for each row though it is where those of the row before end: Triton 3.6
takes a whole number that a loop hands on for constant if only the bounds of an inner loop use it (seen on an H100: all
rows above were counted again in every quad row).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from mf_scale.kernels.triton_common import LN_2, LOG2_E, jit, sigmoid_terms, tl, to_gamma

FAR = tl.constexpr(-1e4)
"""An error logit so low that focal term, probability and gradient are exactly 0."""


@jit
def _first(quad, short, long):
    """First output pixel of a quad: ceil((2 quad - 1) long / (2 short) - 1/2), at least 0; short + 1 gives `long`."""
    start = tl.maximum((2 * quad - 1) * long + short - 1, 0) // (2 * short)
    return tl.minimum(start, long)


@jit
def _weight(pixel, quad, short, long):
    """Weight of a quad's farther corner at an output pixel; without meaning at the borders, where both are one."""
    return ((2 * pixel + 1) * short - long - 2 * long * (quad - 1)).to(tl.float32) * (0.5 / long)


@jit
def _lane(lane, b, segments, layers, counts, segment_map, P, w, L, H, W):
    """Of each lane: pair, quad column, first output column, how many, segment, its layer and layer 0 at that column."""
    pair, c = lane // (w + 1), lane % (w + 1)
    real = pair < tl.load(counts + b)
    segment = tl.load(segments + b * P + pair, mask=real, other=0).to(tl.int32)
    layer = tl.maximum(tl.minimum(tl.load(layers + b * P + pair, mask=real, other=0), L - 1), 0)
    first = _first(c, w, W)
    columns = tl.where(real, _first(c + 1, w, W) - first, 0)
    image = segment_map + (b * L).to(tl.int64) * H * W + first
    return pair, c, first, columns, segment, image + layer * (H * W), image


@jit
def _bottom(lane, b, counts, w, H):
    """Output rows a block visits whose first lane is `lane`: none where it holds padding only."""
    return tl.where(lane < tl.load(counts + b) * (w + 1), H, 0)


@jit
def _corners(logits, b, pair, c, P, h, w):
    """Pointers to the first row of a lane's left and right cells."""
    cells = logits + (b * P + pair).to(tl.int64) * (h * w)
    return cells + tl.maximum(c - 1, 0), cells + tl.minimum(c, w - 1)


@jit
def _cell(pointer, row, real):
    """Logits in fp32 in units of ln 2."""
    return tl.load(pointer + row, mask=real, other=0.0).to(tl.float32) * LOG2_E


@jit
def _row(y, q, top_left, top_right, bottom_left, bottom_right, start, h, w, H, W):
    """Weight of the lower corners in output row y; the row's logit at the lane's first pixel, and its slope a pixel."""
    down = _weight(y, q, h, H)
    left = top_left + down * (bottom_left - top_left)
    difference = top_right + down * (bottom_right - top_right) - left
    return down, left + start * difference, difference * (w / W)


@jit
def _to_sides(level, tilt, start, c, w, W):
    """What goes to the left and to the right cell, of sum g and sum i g; at the borders both are the one cell."""
    right = start * level + (w / W) * tilt
    return tl.where(c == w, level, level - right), tl.where(c == 0, level, right)


@jit
def _pixel(z, i, columns, own, shared, segment, EXCLUDE: tl.constexpr, IGNORE: tl.constexpr, LAYERED: tl.constexpr):
    """Is the lane's pixel i inside the segment, is it kept (0 or 1), its error logit (FAR where it does not count).

    A non-finite logit shows even where the pixel is ignored, as it does in the other kernels.
    """
    there = i < columns
    value = tl.load(own + i, mask=there).to(tl.int32)
    hit = there & (value == segment)
    kept = there
    u = tl.where(hit, -z, z)
    if EXCLUDE:
        if LAYERED:
            value = tl.load(shared + i, mask=there).to(tl.int32)
        kept = there & (value != IGNORE)
        hit = hit & kept
        u = tl.where(kept, u, z * 0.0 + FAR)
    return hit, kept, tl.where(there, u, FAR)


@jit(do_not_specialize=["P"])
def mask_loss_sums(
    logits, segment_map, segments, layers, counts, sums, P, h, w, L, H, W, band_rows, alpha,
    GAMMA: tl.constexpr, EXCLUDE: tl.constexpr, IGNORE: tl.constexpr, LAYERED: tl.constexpr,
    COLUMNS: tl.constexpr, LANES: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """First pass: each lane's sums of focal, s, s t, t (and, with EXCLUDE, kept) to sums [B,P,4 or 5,bands,w+1]."""
    b, band, bands = tl.program_id(2), tl.program_id(1), tl.num_programs(1)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    bottom = _bottom(tl.program_id(0) * LANES, b, counts, w, H)
    pair, c, first, columns, segment, own, shared = _lane(lane, b, segments, layers, counts, segment_map, P, w, L, H, W)
    real = columns > 0
    left, right = _corners(logits, b, pair, c, P, h, w)
    start = _weight(first, c, w, W)
    focal, wrong, missed = start * 0.0, start * 0.0, start * 0.0
    size, kept_pixels = start * 0.0, start * 0.0
    quad = band * band_rows
    row = tl.maximum(quad - 1, 0) * w
    top_left, top_right = _cell(left, row, real), _cell(right, row, real)
    for q in range(quad, tl.minimum(quad + band_rows, h + 1)):
        row = tl.minimum(q, h - 1) * w
        bottom_left, bottom_right = _cell(left, row, real), _cell(right, row, real)
        for y in range(_first(q, h, H), tl.minimum(_first(q + 1, h, H), bottom)):
            _, base, slope = _row(y, q, top_left, top_right, bottom_left, bottom_right, start, h, w, H, W)
            for i in tl.static_range(COLUMNS):
                hit, kept, u = _pixel(
                    base + i * slope, i, columns, own + y * W, shared + y * W, segment, EXCLUDE, IGNORE, LAYERED
                )
                lower, s, cross = sigmoid_terms(u, GPU)
                target = tl.where(hit, 1.0, 0.0)
                focal += (target * (2.0 * alpha - 1.0) + (1.0 - alpha)) * to_gamma(lower, s, GAMMA) * cross
                wrong += s
                missed += target * s
                size += target
                if EXCLUDE:
                    kept_pixels += tl.where(kept, 1.0, 0.0)
        top_left, top_right = bottom_left, bottom_right
    kinds = 5 if EXCLUDE else 4
    lanes = bands * (w + 1)
    out = sums + (b * P + pair).to(tl.int64) * (kinds * lanes) + band * (w + 1) + c
    tl.store(out, focal * LN_2, mask=pair < P)
    tl.store(out + lanes, wrong, mask=pair < P)
    tl.store(out + 2 * lanes, missed, mask=pair < P)
    tl.store(out + 3 * lanes, size, mask=pair < P)
    if EXCLUDE:
        tl.store(out + 4 * lanes, kept_pixels, mask=pair < P)


@jit
def _total(sums, lanes, BLOCK: tl.constexpr):
    """Sum of `lanes` numbers, in an order that depends on nothing but their count."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, lanes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(sums + i, mask=i < lanes, other=0.0)
    return tl.sum(total, axis=0)


@jit(do_not_specialize=["P"])
def mask_loss_finish(
    sums, focal, dice, coefficients, P, lanes, pixels, alpha, focal_weight, dice_weight,
    EXCLUDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A pair's focal and dice loss from its lanes' sums; both are 0 for padding, whose sums are.

    coefficients [B,P,4] are its gradient's: of focal outside and inside the segment, of dice outside and inside.
    """
    p, b = tl.program_id(0), tl.program_id(1)
    kinds = 5 if EXCLUDE else 4
    own = sums + (b * P + p).to(tl.int64) * (kinds * lanes)
    missed, size = _total(own + 2 * lanes, lanes, BLOCK), _total(own + 3 * lanes, lanes, BLOCK)
    mass = _total(own + lanes, lanes, BLOCK) - 2.0 * missed + size
    kept = pixels * 1.0
    if EXCLUDE:
        kept = tl.maximum(_total(own + 4 * lanes, lanes, BLOCK), 1.0)
    numerator, denominator = 2.0 * (size - missed) + 1.0, mass + size + 1.0
    tl.store(focal + b * P + p, _total(own, lanes, BLOCK) / kept)
    tl.store(dice + b * P + p, 1.0 - numerator / denominator)
    out = coefficients + (b * P + p) * 4
    tl.store(out, (1.0 - alpha) * focal_weight / kept)
    tl.store(out + 1, -alpha * focal_weight / kept)
    of_mass = dice_weight * numerator / (denominator * denominator)
    tl.store(out + 2, of_mass)
    tl.store(out + 3, of_mass - dice_weight * 2.0 / denominator)


@jit(do_not_specialize=["P"])
def mask_loss_gradient(
    logits, segment_map, segments, layers, counts, coefficients, gradient, P, h, w, L, H, W, band_rows,
    GAMMA: tl.constexpr, EXCLUDE: tl.constexpr, IGNORE: tl.constexpr, LAYERED: tl.constexpr,
    COLUMNS: tl.constexpr, LANES: tl.constexpr, GPU: tl.constexpr,
):  # fmt: skip
    """Second pass: the gradient [B,P,h,w] of the weighted loss, zero for padding pairs.

    A cell's gradient comes from its four quads: those above and below it meet in the walk, those on its left and right
    are neighbouring lanes, whence a block's last lane only serves the one before it. A band also walks the quad row
    behind its last cell row.
    """
    b, band = tl.program_id(2), tl.program_id(1)
    number = tl.arange(0, LANES)
    bottom = _bottom(tl.program_id(0) * (LANES - 1), b, counts, w, H)
    pair, c, first, columns, segment, own, shared = _lane(
        tl.program_id(0) * (LANES - 1) + number, b, segments, layers, counts, segment_map, P, w, L, H, W
    )
    real = columns > 0
    left, right = _corners(logits, b, pair, c, P, h, w)
    start = _weight(first, c, w, W)
    factors = coefficients + (b * P + pair) * 4
    focal_miss, focal_hit = tl.load(factors, mask=real, other=0.0), tl.load(factors + 1, mask=real, other=0.0)
    dice_miss, dice_hit = tl.load(factors + 2, mask=real, other=0.0), tl.load(factors + 3, mask=real, other=0.0)
    out = gradient + (b * P + pair).to(tl.int64) * (h * w) + c
    owned = (pair < P) & (c < w) & (number < LANES - 1)
    quad = band * band_rows
    row = tl.maximum(quad - 1, 0) * w
    top_left, top_right = _cell(left, row, real), _cell(right, row, real)
    above_left, above_right = start * 0.0, start * 0.0
    for q in range(quad, tl.minimum(quad + band_rows, h) + 1):
        row = tl.minimum(q, h - 1) * w
        bottom_left, bottom_right = _cell(left, row, real), _cell(right, row, real)
        level, tilt, lower_level, lower_tilt = start * 0.0, start * 0.0, start * 0.0, start * 0.0
        for y in range(_first(q, h, H), tl.minimum(_first(q + 1, h, H), bottom)):
            down, base, slope = _row(y, q, top_left, top_right, bottom_left, bottom_right, start, h, w, H, W)
            row_level, row_tilt = start * 0.0, start * 0.0
            for i in tl.static_range(COLUMNS):
                hit, _, u = _pixel(
                    base + i * slope, i, columns, own + y * W, shared + y * W, segment, EXCLUDE, IGNORE, LAYERED
                )
                lower, s, cross = sigmoid_terms(u, GPU)
                correct = 1.0 - s
                focal = (correct * cross * (GAMMA * LN_2) + s) * to_gamma(lower, s, GAMMA)
                g = tl.where(hit, focal_hit, focal_miss) * focal + tl.where(hit, dice_hit, dice_miss) * s * correct
                row_level += g
                row_tilt += i * g
            level, tilt = level + row_level, tilt + row_tilt
            lower_level, lower_tilt = lower_level + down * row_level, lower_tilt + down * row_tilt
        # At the upper and the lower border both corners are the one cell.
        lower_level, lower_tilt = tl.where(q == 0, level, lower_level), tl.where(q == 0, tilt, lower_tilt)
        upper_level = tl.where(q == h, level, level - lower_level)
        upper_tilt = tl.where(q == h, tilt, tilt - lower_tilt)
        to_left, to_right = _to_sides(upper_level, upper_tilt, start, c, w, W)
        above_left, above_right = above_left + to_left, above_right + to_right
        if q > quad:
            whole = above_right + tl.gather(above_left, tl.minimum(number + 1, LANES - 1), axis=0)
            tl.store(out + (q - 1) * w, whole, mask=owned)
        above_left, above_right = _to_sides(lower_level, lower_tilt, start, c, w, W)
        top_left, top_right = bottom_left, bottom_right
