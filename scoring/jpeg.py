"""JPEG headers: whether a GPU's decoder can take a file, and its size.

Owns the parsing of markers, nothing of pixels. What is not plainly a whole baseline colour JPEG is left to Pillow: the
hardware decoder skips progressive files, guesses at CMYK and returns grey for what is cut off.
"""

import struct

_START, _END = b"\xff\xd8", b"\xff\xd9"
_BASELINE, _ADOBE, _SCAN = 0xC0, 0xEE, 0xDA
# Frames that are not baseline: progressive, lossless, arithmetic. C4, C8 and CC are tables, not frames.
_OTHER_FRAMES = frozenset(range(0xC1, 0xD0)) - {0xC4, 0xC8, 0xCC}
_YCBCR = 1
# Luma sampling of 4:4:4, 4:2:2, 4:4:0 and 4:2:0: the hardware engine's; chroma is 1 x 1 in all of them.
_LUMA_SAMPLING = frozenset({0x11, 0x21, 0x12, 0x22})
_CHROMA_SAMPLING = 0x11


def hardware_size(content: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that a hardware decoder reads as Pillow does; None for any other file."""
    if not content.startswith(_START) or not content.endswith(_END):
        return None
    try:
        return _walk(content)
    except (struct.error, IndexError):
        return None


def _walk(content: bytes) -> tuple[int, int] | None:
    place, size = 2, None
    while True:
        if content[place] != 0xFF:
            return None
        marker = content[place + 1]
        if marker == 0xFF:  # fill bytes may stand before a marker
            place += 1
            continue
        if marker == _SCAN:
            return size
        (length,) = struct.unpack_from(">H", content, place + 2)
        body = place + 4
        if marker == _BASELINE:
            size = _frame_size(content, body)
            if size is None:
                return None
        elif marker in _OTHER_FRAMES or (marker == _ADOBE and _is_not_ycbcr(content[body : body + 12])):
            return None
        place += 2 + length


def _is_not_ycbcr(segment: bytes) -> bool:
    return segment.startswith(b"Adobe") and segment[11] != _YCBCR


def _frame_size(content: bytes, body: int) -> tuple[int, int] | None:
    precision, height, width, components = struct.unpack_from(">BHHB", content, body)
    if precision != 8 or components != 3 or not width or not height:
        return None
    identifiers = content[body + 6], content[body + 9], content[body + 12]
    # Without an Adobe marker the identifiers "RGB" mean that no conversion was made.
    if identifiers == (0x52, 0x47, 0x42):
        return None
    luma, blue, red = content[body + 7], content[body + 10], content[body + 13]
    if luma not in _LUMA_SAMPLING or blue != _CHROMA_SAMPLING or red != _CHROMA_SAMPLING:
        return None
    return width, height
