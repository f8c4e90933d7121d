"""Triton kernels of Pillow's 8-bit resize: its weights, and two passes of integer sums, the horizontal one first.

Imports triton, so `resample.py` imports it where it is needed. Images are read through a table of addresses: padding them
into one array in Python stopped at 7,000 images/s. `TRITON_INTERPRET=1` runs these on the CPU, for tests.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

# Pillow's PRECISION_BITS, and the half that rounds.
BITS = tl.constexpr(22)
HALF = tl.constexpr(1 << 21)
SCALE = tl.constexpr(float(1 << 22))


@triton.jit
def _bicubic(x):
    """Pillow's bicubic_filter with a = -0.5, in its order of operations."""
    x = tl.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@triton.jit
def resize_weights(
    in_sizes,  # (n,) int64
    out_sizes,  # (n,) int64: before the crop, at least `size`
    first,  # (n, size) int32: first source pixel of an output pixel of the centre crop
    count,  # (n, size) int32: how many
    weights,  # (n, taps, size) int32
    taps,
    size,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Pillow's weights along one axis (Resample.c, precompute_coeffs and normalize_coeffs_8bpc), its sums in its order.

    Launch with enable_fp_fusion=False: a fused operation rounds once where Pillow rounds twice.
    """
    image = tl.program_id(0)
    xs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_used = xs < size
    in_size = tl.load(in_sizes + image)
    out_size = tl.load(out_sizes + image)
    # Python's round, half to even, as torchvision's center_crop has it.
    excess = out_size - size
    half = excess // 2
    offset = half + (excess % 2) * (half % 2)
    scale = in_size.to(tl.float64) / out_size.to(tl.float64)
    filter_scale = tl.maximum(scale, 1.0)
    support = filter_scale * 2.0  # bicubic's, in source pixels at scale 1
    inverse = 1.0 / filter_scale
    center = (xs.to(tl.float64) + offset.to(tl.float64) + 0.5) * scale
    low = tl.maximum((center - support + 0.5).to(tl.int64), 0)
    num = tl.minimum((center + support + 0.5).to(tl.int64), in_size) - low
    total = tl.zeros((BLOCK,), tl.float64)
    for tap in range(taps):
        weight = _bicubic(((low + tap).to(tl.float64) - center + 0.5) * inverse)
        total += tl.where(tap < num, weight, 0.0)
    line = image * size + xs
    tl.store(first + line, low.to(tl.int32), mask=is_used)
    tl.store(count + line, num.to(tl.int32), mask=is_used)
    for tap in range(taps):
        weight = tl.where(tap < num, _bicubic(((low + tap).to(tl.float64) - center + 0.5) * inverse), 0.0)
        scaled = tl.where(total != 0.0, weight / total, weight) * SCALE
        rounded = tl.where(weight < 0.0, scaled - 0.5, scaled + 0.5).to(tl.int32)
        tl.store(weights + (image.to(tl.int64) * taps + tap) * size + xs, rounded, mask=is_used)


@triton.jit
def _word(words, missing, mask):
    """The words at those pointers, 0 where an image's bytes do not reach them."""
    return tl.load(words, mask=mask & (missing > 0), other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _join(low, high, shift):
    """The 32 bits from bit `shift` of a word, less than 32, on into the next one."""
    return ((high.to(tl.uint64) << 32 | low.to(tl.uint64)) >> shift.to(tl.uint64)).to(tl.uint32)


@triton.jit
def _add(sums, word, byte: tl.constexpr, weight):
    """`sums` and a word's byte times its weight."""
    return sums + ((word >> (8 * byte)) & 255).to(tl.int32) * weight


@triton.jit
def resize_rows(
    addresses,  # (n,) int64: first byte of each image
    pitches,  # (n,) int64: bytes from row to row
    heights,  # (n,) int64
    starts,  # (n,) int64: first row of each image in `out`
    first,  # (n, size) int32: first source column of an output column
    count,  # (n, size) int32: how many
    weights,  # (n, taps, size) int32
    taps,
    out,  # (rows of all images, size, 3) uint8
    size,
    BLOCK_Y: tl.constexpr,  # noqa: N803
    BLOCK_X: tl.constexpr,  # noqa: N803
):
    """Each row of each image from its width to `size` output columns.

    Four pixels at a time from four aligned words, wherever they begin: as bytes they are twelve loads.
    """
    image = tl.program_id(0)
    height = tl.load(heights + image).to(tl.int32)
    top = tl.program_id(1) * BLOCK_Y
    if top < height:
        ys = top + tl.arange(0, BLOCK_Y)
        xs = tl.program_id(2) * BLOCK_X + tl.arange(0, BLOCK_X)
        is_row, is_column = ys < height, xs < size
        column = image * size + xs
        left = tl.load(first + column, mask=is_column, other=0)
        num = tl.load(count + column, mask=is_column, other=0)
        address = tl.load(addresses + image)
        words = (address & -4).to(tl.pointer_type(tl.int32))
        # Bytes from there; an image has fewer than 2**31.
        begin = (address & 3).to(tl.int32) + ys[:, None] * tl.load(pitches + image).to(tl.int32) + (left * 3)[None, :]
        end = begin + (num * 3)[None, :]
        weight = weights + image.to(tl.int64) * taps * size + xs
        red = tl.full((BLOCK_Y, BLOCK_X), HALF, tl.int32)
        green = tl.full((BLOCK_Y, BLOCK_X), HALF, tl.int32)
        blue = tl.full((BLOCK_Y, BLOCK_X), HALF, tl.int32)
        for tap in range(0, tl.max(num, axis=0), 4):
            place = begin + tap * 3
            is_used = is_row[:, None] & (tap < num)[None, :]
            word = words + (place >> 2)
            missing = end - (place & -4)
            word0 = _word(word, missing, is_used)
            word1 = _word(word + 1, missing - 4, is_used)
            word2 = _word(word + 2, missing - 8, is_used)
            word3 = _word(word + 3, missing - 12, is_used)
            shift = (place & 3) * 8
            # R G B R, G B R G, B R G B.
            bytes0 = _join(word0, word1, shift)
            bytes1 = _join(word1, word2, shift)
            bytes2 = _join(word2, word3, shift)
            weight0 = tl.load(weight + tap * size, mask=tap < num, other=0)[None, :]
            weight1 = tl.load(weight + (tap + 1) * size, mask=tap + 1 < num, other=0)[None, :]
            weight2 = tl.load(weight + (tap + 2) * size, mask=tap + 2 < num, other=0)[None, :]
            weight3 = tl.load(weight + (tap + 3) * size, mask=tap + 3 < num, other=0)[None, :]
            red = _add(
                _add(_add(_add(red, bytes0, 0, weight0), bytes0, 3, weight1), bytes1, 2, weight2), bytes2, 1, weight3
            )
            green = _add(
                _add(_add(_add(green, bytes0, 1, weight0), bytes1, 0, weight1), bytes1, 3, weight2), bytes2, 2, weight3
            )
            blue = _add(
                _add(_add(_add(blue, bytes0, 2, weight0), bytes1, 1, weight1), bytes2, 0, weight2), bytes2, 3, weight3
            )
        target = out + (tl.load(starts + image) + ys)[:, None] * (size * 3) + (xs * 3)[None, :]
        mask = is_row[:, None] & is_column[None, :]
        tl.store(target, tl.minimum(tl.maximum(red >> BITS, 0), 255).to(tl.uint8), mask=mask)
        tl.store(target + 1, tl.minimum(tl.maximum(green >> BITS, 0), 255).to(tl.uint8), mask=mask)
        tl.store(target + 2, tl.minimum(tl.maximum(blue >> BITS, 0), 255).to(tl.uint8), mask=mask)


@triton.jit
def resize_columns(
    rows,  # what resize_rows wrote
    starts,  # (n,) int64
    first,  # (n, size) int32: first source row of an output row
    count,  # (n, size) int32
    weights,  # (n, taps, size) int32
    taps,
    slots,  # (n,) int64: which image of `out` this one is
    out,  # (images, size, size, 3) uint8
    size,
    BLOCK: tl.constexpr,  # noqa: N803 -- a power of two, at least size * 3
):
    """Each column of each resized row set to `size` output rows."""
    image, y = tl.program_id(0), tl.program_id(1)
    xs = tl.arange(0, BLOCK)
    width = size * 3
    line = image * size + y
    top = tl.load(starts + image) + tl.load(first + line)
    total = tl.full((BLOCK,), HALF, tl.int32)
    for tap in range(tl.load(count + line)):
        weight = tl.load(weights + (image.to(tl.int64) * taps + tap) * size + y)
        total += tl.load(rows + (top + tap) * width + xs, mask=xs < width, other=0).to(tl.int32) * weight
    target = out + (tl.load(slots + image) * size + y) * width + xs
    tl.store(target, tl.minimum(tl.maximum(total >> BITS, 0), 255).to(tl.uint8), mask=xs < width)
