"""Which JPEGs a GPU's decoder may have, by what Pillow says of their headers.

Owns that choice. What is not plainly a whole baseline colour JPEG is left to Pillow: the hardware decoder skips progressive
files, guesses at CMYK and returns grey for what is cut off.
"""

from scoring.images import BadImageError, open_image

_END = b"\xff\xd9"
# 4:4:4, 4:2:2 and 4:2:0, as Pillow counts them.
_SAMPLINGS = (0, 1, 2)
_YCBCR = 1


def hardware_size(content: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that a hardware decoder reads as Pillow does; None for any other file.

    Pillow opens it (50 us): a file whose header it refuses is a bad image in every mode.
    """
    if not content.startswith(b"\xff\xd8") or not content.endswith(_END):
        return None
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
