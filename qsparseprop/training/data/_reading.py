"""One image of a file, as bytes."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from qsparseprop.utils.errors import ConfigurationError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["read_image"]


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """What is to be done with an image of a camera that was not held upright; None where it has been done already."""
    from PIL import ExifTags
    from PIL.Image import Transpose

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage, too
            number = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:
        return None  # damaged; the image itself need not be
    turns = (Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE,
             Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)  # fmt: skip
    return turns[number - 2] if number in range(2, 9) else None


def read_image(file: str, size: int) -> np.ndarray:
    """Read an image as RGB bytes, (size, size, 3), upright.

    Raises
    ------
    ConfigurationError
        If it is none.
    ImportError
        If Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install pillow") from error
    try:
        with Image.open(file) as image:
            # a JPEG can be decoded at a half, a quarter or an eighth of its size, which is faster; what is left is
            # still twice as large as wanted, so that scaling does not show it
            image.draft("RGB", (2 * size, 2 * size))
            image.load()
            turned = _orientation(image)
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
                # Pillow would cut off what is above 255: nearly all
                eight = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError("its pixels have 32 bits, of which nobody knows what is white: save it with 8 or 16")
            else:
                eight = image
            upright = eight if turned is None else eight.transpose(turned)
            return np.asarray(upright.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except MemoryError:
        raise
    except Exception as error:  # damaged files lead Pillow to errors of many types
        raise ConfigurationError(f"cannot read the image {file}: {error}") from error
