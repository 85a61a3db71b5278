"""Pictures as users give them: opened as RGB, or refused."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from splitq_jax.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # of files; EPS, say, would start Ghostscript
MAX_PIXELS = 1 << 26
MAX_ASPECT = 200
Picture = str | Path | Image.Image | np.ndarray


def open_image(picture: Picture, name: str = "image") -> Image.Image:
    """Open a picture as RGB.

    Args:
      picture: a path, a PIL image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4).
      name: what an error calls it.

    Raises:
      InputError: a URL; a file that is missing or no image; an array of another type; an empty, huge or extremely long picture.
    """
    if isinstance(picture, str | Path):
        name = str(picture)
        if "://" in name or name.startswith("data:"):
            raise InputError(f"{name[:80]}: a URL; nothing is fetched: save the image and give its path")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image: Image.Image = Image.open(picture, formats=FORMATS)
                _check_size(image.size, name)  # from the header, before it is decoded
                image.load()
        except InputError:
            raise
        except Exception as e:  # Pillow's decoders raise anything on a damaged file
            raise InputError(f"{name}: not a readable image ({e}); expected {', '.join(FORMATS)}") from None
    elif isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] not in (3, 4)):
            raise InputError(
                f"{name}: an array {picture.dtype}{list(picture.shape)}; expected uint8 (H, W), (H, W, 3) or (H, W, 4)"
            )
        _check_size(picture.shape[1::-1], name)
        image = Image.fromarray(picture)
    elif isinstance(picture, Image.Image):
        _check_size(picture.size, name)
        image = picture
    else:
        raise InputError(f"{name}: a {type(picture).__name__}; expected a path, a PIL image or a uint8 array")
    if image.mode in {"I", "F"} or image.mode.startswith("I;"):
        raise InputError(f"{name}: has more than 8 bits a pixel (mode {image.mode}), which RGB would clip; save it with 8 bits")
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as e:
        raise InputError(f"{name}: cannot be shown as RGB ({e})") from None


def _check_size(size: Sequence[int], name: str) -> None:
    width, height = size
    if min(width, height) < 1:
        raise InputError(f"{name}: {width} x {height} pixels; it is empty")
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"{name}: {width} x {height} pixels; expected at most {MAX_PIXELS:,} and an aspect ratio up to {MAX_ASPECT}"
        )
