"""Pictures in every format and mode, and all that must be refused."""

import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processors import make, picture

from splitq_jax.errors import InputError
from splitq_jax.models import Processor, open_image


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return Processor.from_folder(make(tmp_path_factory.mktemp("processor") / "model"))


def saved(image: Image.Image, kind: str, **settings: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a readable image"),
    "text": (b"hello", "not a readable image"),
    "truncated": (saved(picture(64, 64), "PNG")[:-4000], "not a readable image"),
    "truncated jpeg": (saved(picture(64, 64), "JPEG")[:700], "not a readable image"),
    "bomb": (bomb(50_000, 50_000), "not a readable image|50000 x 50000 pixels"),
    "warned bomb": (bomb(10_000, 9_500), "not a readable image|10000 x 9500 pixels"),
    "large": (bomb(8193, 8193), "8193 x 8193 pixels; expected at most 67,108,864"),
    "long": (bomb(4000, 19), "4000 x 19 pixels; expected .* an aspect ratio up to 200"),
    "no width": (bomb(0, 5), "not a readable image|it is empty"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not a readable image"),
    "16 bits": (saved(Image.fromarray(np.arange(9_000, 9_099, dtype=np.uint16).reshape(9, 11)), "PNG"), "more than 8 bits"),
    "floats": (saved(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "more than 8 bits"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_refused(kind: str, tmp_path: Path, processor: Processor) -> None:
    content, message = BAD_FILES[kind]
    file = tmp_path / "picture.png"
    file.write_bytes(content)
    for given in (file, str(file)):
        with pytest.raises(InputError, match=message) as refused:
            open_image(given)
        assert str(file) in str(refused.value)
    with pytest.raises(InputError, match=message):
        processor(["what?"], [file])


BAD: dict[str, tuple[Any, str]] = {
    "http": ("http://127.0.0.1/x.png", "a URL; nothing is fetched"),
    "https": ("https://example.org/x.png", "a URL; nothing is fetched"),
    "file url": ("file:///etc/passwd", "a URL; nothing is fetched"),
    "data url": ("data:image/png;base64,AAAA", "a URL; nothing is fetched"),
    "missing": ("no/such/file.png", "no/such/file.png: not a readable image"),
    "null byte": ("x\0.png", "not a readable image"),
    "folder": (".", "not a readable image"),
    "nothing": (None, "a NoneType; expected a path"),
    "bytes": (b"x", "a bytes; expected a path"),
    "list": ([1], "a list; expected a path"),
    "floats": (np.zeros((4, 4, 3), np.float32), r"an array float32\[4, 4, 3\]; expected uint8"),
    "truths": (np.zeros((4, 4), bool), r"an array bool\[4, 4\]"),
    "channels first": (np.zeros((3, 8, 8), np.uint8), r"an array uint8\[3, 8, 8\]"),
    "five dimensions": (np.zeros((1, 1, 4, 4, 3), np.uint8), r"an array uint8\[1, 1, 4, 4, 3\]"),
    "no rows": (np.zeros((0, 4, 3), np.uint8), "4 x 0 pixels; it is empty"),
    "no columns": (np.zeros((4, 0), np.uint8), "0 x 4 pixels; it is empty"),
    "no pixels": (Image.new("RGB", (0, 0)), "0 x 0 pixels; it is empty"),
    "long": (np.zeros((1, 201, 3), np.uint8), "201 x 1 pixels; expected .* 200"),
    "integers": (Image.new("I", (4, 4), 70_000), "more than 8 bits"),
    "16 bits": (Image.new("I;16", (4, 4), 7000), "more than 8 bits"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_pictures_are_refused(kind: str) -> None:
    given, message = BAD[kind]
    with pytest.raises(InputError, match=message):
        open_image(given)


def test_refusals_count_the_images(processor: Processor) -> None:
    with pytest.raises(InputError, match="image 1: 4 x 0 pixels"):
        processor.vision([picture(), np.zeros((0, 4, 3), np.uint8)])


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_shown_as_rgb(mode: str) -> None:
    if mode == "PA":
        source = picture(mode="P").convert("PA")
    else:
        source = picture().convert(mode) if mode != "LAB" else Image.new("LAB", (23, 19))
    opened = open_image(source)
    assert opened.mode == "RGB" and opened.size == (23, 19)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_files_are_read_and_damaged_ones_never_crash(kind: str, tmp_path: Path) -> None:
    content = saved(picture(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    file = tmp_path / "picture"
    file.write_bytes(content)
    assert open_image(file).size == (23, 19)
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            damaged = bytearray(content[: rng.integers(1, len(content))] if rng.random() < 0.3 else content)
            for at in rng.integers(0, min(len(damaged), 120), 3):
                damaged[at] = rng.integers(256)
            file.write_bytes(damaged)
            try:
                open_image(file)
            except InputError as e:
                assert str(file) in str(e)


def test_turned_and_moving_pictures(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera lay on its side
    picture().save(tmp_path / "turned.jpg", exif=turned)
    assert open_image(tmp_path / "turned.jpg").size == (19, 23)
    red, blue = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[blue])
    assert open_image(tmp_path / "moving.gif").getpixel((4, 4)) == (255, 0, 0)
