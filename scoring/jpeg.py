"""Which JPEGs a GPU's decoder may have: the plainest, and what Pillow says is one.

Owns that choice. What is not plainly a whole baseline colour JPEG is left to Pillow: the hardware decoder skips progressive
files, guesses at CMYK and returns grey for what is cut off.
"""

import re

from scoring.images import BadImageError, open_image

_BEGIN, _END = b"\xff\xd8", b"\xff\xd9"
# Plain ones have some 620.
_MOST_HEADER_BYTES = 1024
# 4:4:4, 4:2:2 and 4:2:0, as Pillow counts them.
_SAMPLINGS = (0, 1, 2)
_YCBCR = 1


# What a plain file holds: a JFIF header, tables and comments before one baseline frame of 8 bits and three components, 1, 2
# and 3, in 4:4:4, 4:2:2 or 4:2:0.
_JFIF, _TABLES, _FRAME, _SCAN = (bytes((0xFF, code)) for code in (0xE0, 0xDB, 0xC0, 0xDA))
# Huffman tables, restart intervals, comments: Pillow skips them.
_SKIPPED = (b"\xff\xc4", b"\xff\xdd", b"\xff\xfe")
_FRAME_BEGIN = _FRAME + b"\0\x11\x08"
# A colour file's scan header, the marker included.
_SCAN_BYTES = 14
# What was around the size in headers that `plain_size` has read.
_known: set[tuple[bytes, bytes]] = set()
_MOST_KNOWN = 1024
_PLAIN_FRAME = re.compile(rb"\x08....\x03\x01[\x11\x21\x22][\0-\3]\x02\x11[\0-\3]\x03\x11[\0-\3]", re.DOTALL)
_JFIF_BYTES, _TABLE_BYTES = 14, 65


def hardware_size(content: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that a hardware decoder reads as Pillow does; None for any other file.

    A file whose header Pillow refuses is a bad image in every mode: it is asked (120 us) about all but the plainest (6 us).
    """
    if not content.startswith(_BEGIN) or not content.endswith(_END):
        return None
    return plain_size(content) or pillow_size(content)


def plain_file_size(content: memoryview) -> tuple[int, int] | None:
    """`plain_size` of a file that lies in somebody else's memory; None also where its header is longer than most."""
    if content[-2:] != _END:
        return None
    header = bytes(content[:_MOST_HEADER_BYTES])
    return _known_size(header) if header.startswith(_BEGIN) else None


def _known_size(header: bytes) -> tuple[int, int] | None:
    """`plain_size`, by memory: one encoder's headers differ in their size alone, and reading one takes 10 us, not 2."""
    place = header.find(_FRAME_BEGIN) + len(_FRAME_BEGIN)
    end = header.find(_SCAN, place) + _SCAN_BYTES
    around = header[:place], header[place + 4 : end]
    if around not in _known:
        found = _find_size(header[:end])
        if found is None or found[0] != place:
            return None if found is None else found[1]
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known.add(around)
    return _read_size(header[place : place + 4])


def plain_size(content: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG with nothing in its header that Pillow or a decoder could see otherwise; None for others."""
    found = _find_size(content)
    return None if found is None else found[1]


def _find_size(content: bytes) -> tuple[int, tuple[int, int]] | None:
    """Where a plain JPEG's header has the size, and `plain_size`."""
    at, found = 2, None
    while True:
        marker, length = content[at : at + 2], int.from_bytes(content[at + 2 : at + 4], "big")
        segment = content[at + 4 : at + 2 + length]
        if len(segment) != length - 2:
            return None
        if marker == _SCAN:
            return found
        if marker == _FRAME:
            size = _read_size(segment[1:5]) if _PLAIN_FRAME.fullmatch(segment) else None
            if size is None or found is not None:
                return None
            found = at + 5, size
        elif marker == _TABLES:
            # 8 bits each, with a number from 0 to 3 before them.
            if length - 2 < _TABLE_BYTES or (length - 2) % _TABLE_BYTES or max(segment[::_TABLE_BYTES]) > 3:
                return None
        elif marker == _JFIF:
            if not segment.startswith(b"JFIF\0") or len(segment) < _JFIF_BYTES:
                return None
        elif marker not in _SKIPPED:
            return None
        at += 2 + length


def _read_size(content: bytes) -> tuple[int, int] | None:
    height, width = int.from_bytes(content[:2], "big"), int.from_bytes(content[2:], "big")
    return (width, height) if width and height else None


def pillow_size(content: bytes) -> tuple[int, int] | None:
    """`hardware_size` by what Pillow says of the file."""
    from PIL.JpegImagePlugin import JpegImageFile, get_sampling

    try:
        with open_image(content) as image:
            # Phones' files of several pictures are a format of their own, and a class below this one.
            if not isinstance(image, JpegImageFile) or image.format != "JPEG" or image.mode != "RGB":
                return None
            # Identifiers "RGB", or Adobe's transform 0, mean that no conversion was made.
            has_ycbcr = [identifier for identifier, *_ in image.layer] != [*b"RGB"]
            is_plain = not image.info.get("progressive") and image.info.get("adobe_transform", _YCBCR) == _YCBCR
            return image.size if has_ycbcr and is_plain and get_sampling(image) in _SAMPLINGS else None
    except BadImageError:
        return None  # whoever decodes it says why
