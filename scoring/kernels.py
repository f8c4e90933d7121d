"""Triton kernels of Pillow's 8-bit resize: its weights, and two passes of integer sums, the horizontal one first.

Imports triton, so `resample.py` imports it where it is needed. Images are read through a table of addresses: padding them
into one array in Python stopped at 7,000 images/s. `TRITON_INTERPRET=1` runs these on the CPU, for tests.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Triton also compiles what comes after a branch that returns.
# ruff: noqa: RET505

import triton
import triton.language as tl

# Pillow's PRECISION_BITS, and the half that rounds.
BITS = tl.constexpr(22)
HALF = tl.constexpr(1 << 21)
SCALE = tl.constexpr(float(1 << 22))
# Triton's interpreter has no assembler: it takes the same in arithmetic.
ON_GPU = tl.constexpr(not triton.knobs.runtime.interpret)


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
def _bytes(low, high):
    """Two words as one of 64 bits, for the interpreter, which has no assembler."""
    return high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32 | low.to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def _join(low, high, first):
    """Four of eight bytes, from place `first` on, 0 to 3."""
    if ON_GPU:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, 0x3210 + 0x1111 * first],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return (_bytes(low, high) >> (8 * first).to(tl.uint64)).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def _pick(low, high, places: tl.constexpr):
    """Four of eight bytes, by place, a hexadecimal digit each; the last digit's becomes the lowest."""
    if ON_GPU:
        return tl.inline_asm_elementwise(
            f"prmt.b32 $0, $1, $2, {places};", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        both = _bytes(low, high)
        picked = both & 0
        for byte in tl.static_range(4):
            picked |= ((both >> (8 * ((places >> (4 * byte)) & 7))) & 255) << (8 * byte)
        return picked.to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def _dot(sums, pixels, weights, kind: tl.constexpr):
    """`sums` and the products of four bytes with four bytes, which are signed ("s32") or not ("u32")."""
    if ON_GPU:
        return tl.inline_asm_elementwise(
            f"dp4a.u32.{kind} $0, $1, $2, $3;",
            "=r,r,r,r",
            [pixels, weights, sums],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        for byte in tl.static_range(4):
            weight = (weights << (24 - 8 * byte)) >> 24
            sums += ((pixels >> (8 * byte)) & 255) * (weight if kind == "s32" else weight & 255)
        return sums


@triton.jit
def _value(low, middle, high):
    """A channel from its sums by the weights' bytes, rounded and clipped as Pillow does it."""
    total = low + (middle << 8) + (high << 16) + HALF
    return tl.minimum(tl.maximum(total >> BITS, 0), 255).to(tl.uint8)


@triton.jit
def resize_rows(
    addresses,  # (n,) int64: first byte of each image
    pitches,  # (n,) int64: bytes from row to row
    heights,  # (n,) int64
    starts,  # (n,) int64: first row of each image in `out`
    first,  # (n, size) int32: first source column of an output column
    count,  # (n, size) int32: how many
    weights,  # (n, taps, size) int32: 0 from `count` on
    taps,  # a multiple of 4
    out,  # (rows of all images, size, 3) uint8
    size,
    BLOCK_Y: tl.constexpr,  # noqa: N803
    BLOCK_X: tl.constexpr,  # noqa: N803
):
    """Each row of each image from its width to `size` output columns. Reads up to `resample.OVERREAD` bytes past an image.

    Four pixels at a time from four aligned words, wherever they begin, and one instruction for four products of bytes: a
    weight, which is below 2 in size, has three. On an H100 512 images of 320 to 640 x 300 to 500 took 0.54 ms, with products
    of 32 bits 0.72.
    """
    image = tl.program_id(0)
    height = tl.load(heights + image).to(tl.int32)
    top = tl.program_id(1) * BLOCK_Y
    if top < height:
        ys = top + tl.arange(0, BLOCK_Y)
        xs = tl.program_id(2) * BLOCK_X + tl.arange(0, BLOCK_X)
        # Those beyond the edges do what the last one does, and are not stored.
        y, x = tl.minimum(ys, height - 1), tl.minimum(xs, size - 1)
        num = tl.load(count + image * size + x)
        left = tl.load(first + image * size + x)
        address = tl.load(addresses + image)
        # Bytes from an aligned word; an image has fewer than 2**31.
        begin = (address & 3).to(tl.int32) + y[:, None] * tl.load(pitches + image).to(tl.int32) + (left * 3)[None, :]
        words = (address & -4).to(tl.pointer_type(tl.int32)) + (begin >> 2)
        place = begin & 3
        weight = weights + image.to(tl.int64) * taps * size + x
        zeros = tl.zeros((BLOCK_Y, BLOCK_X), tl.int32)
        red0, red1, red2 = zeros, zeros, zeros
        green0, green1, green2 = zeros, zeros, zeros
        blue0, blue1, blue2 = zeros, zeros, zeros
        word0 = tl.load(words)
        for tap in range(0, tl.max(num, axis=0), 4):
            is_used = tl.broadcast_to((tap < num)[None, :], (BLOCK_Y, BLOCK_X))
            word1 = tl.load(words + 1, mask=is_used, other=0)
            word2 = tl.load(words + 2, mask=is_used, other=0)
            word3 = tl.load(words + 3, mask=is_used, other=0)
            # R G B R, G B R G, B R G B.
            bytes0, bytes1, bytes2 = _join(word0, word1, place), _join(word1, word2, place), _join(word2, word3, place)
            reds = _pick(_pick(bytes0, bytes1, 0x0630), bytes2, 0x5210)
            greens = _pick(_pick(bytes0, bytes1, 0x0741), bytes2, 0x6210)
            blues = _pick(_pick(bytes0, bytes1, 0x0052), bytes2, 0x7410)
            weight0, weight1 = tl.load(weight), tl.load(weight + size)
            weight2, weight3 = tl.load(weight + 2 * size), tl.load(weight + 3 * size)
            low, high = _pick(weight0, weight1, 0x5140), _pick(weight2, weight3, 0x5140)
            weights0, weights1 = _pick(low, high, 0x5410)[None, :], _pick(low, high, 0x7632)[None, :]
            weights2 = _pick(_pick(weight0, weight1, 0x0062), _pick(weight2, weight3, 0x0062), 0x5410)[None, :]
            red0, green0, blue0 = (
                _dot(red0, reds, weights0, "u32"),
                _dot(green0, greens, weights0, "u32"),
                _dot(blue0, blues, weights0, "u32"),
            )
            red1, green1, blue1 = (
                _dot(red1, reds, weights1, "u32"),
                _dot(green1, greens, weights1, "u32"),
                _dot(blue1, blues, weights1, "u32"),
            )
            red2, green2, blue2 = (
                _dot(red2, reds, weights2, "s32"),
                _dot(green2, greens, weights2, "s32"),
                _dot(blue2, blues, weights2, "s32"),
            )
            word0 = word3
            words += 3
            weight += 4 * size
        target = out + (tl.load(starts + image) + ys)[:, None] * (size * 3) + (xs * 3)[None, :]
        mask = (ys < height)[:, None] & (xs < size)[None, :]
        tl.store(target, _value(red0, red1, red2), mask=mask)
        tl.store(target + 1, _value(green0, green1, green2), mask=mask)
        tl.store(target + 2, _value(blue0, blue1, blue2), mask=mask)


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
