"""Tokens and pixels against transformers' own LLaVA processor, and every picture and batch that must be refused."""

import json
import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from splitq_jax.errors import InputError
from splitq_jax.models import Processor, copy_processor, open_image
from splitq_jax.models.llava import Llava, LlavaConfig

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "USER", "ASSISTANT", ":", "what", "is", "this", "and", "that", "?"]
IMAGE = WORDS.index("<image>")
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
CONFIG = {
    "model_type": "llava",
    "image_token_index": IMAGE,
    "text_config": {"vocab_size": len(WORDS), "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1},
    "vision_config": {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2},
}
TOKENS = 4
PIXELS = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
}
SQUARE = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 16, "width": 16}}


def make(folder: Path, template: str = TEMPLATE, bos: bool = True, pixels: dict[str, Any] = PIXELS) -> Path:
    folder.mkdir()
    base = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        base.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, extra_special_tokens=["<image>"], **named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("processor") / "model")


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return Processor.from_folder(folder)


@pytest.fixture(scope="module")
def model() -> Llava:
    return Llava(LlavaConfig.from_hf(CONFIG))


def picture(width: int = 23, height: int = 19, seed: int = 0, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def theirs(folder: Path, question: str, images: list[Image.Image]) -> dict[str, np.ndarray]:
    """What transformers makes of the same chat."""
    settings = {k: v for k, v in PIXELS.items() if k != "image_processor_type"}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    whole = LlavaProcessor(
        CLIPImageProcessorPil(**settings),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    content = [{"type": "image", "image": i} for i in images] + [{"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    return dict(whole.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"))


@pytest.mark.parametrize("kind", ["bos by the tokenizer", "bos by the template", "no bos"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_equals_transformers(kind: str, count: int, tmp_path: Path) -> None:
    template = "{{ bos_token }}" + TEMPLATE if kind == "bos by the template" else TEMPLATE
    folder = make(tmp_path / "model", template, bos=kind != "no bos")
    images = [picture(23 + 9 * i, 19, i) for i in range(count)]
    ours, reference = Processor.from_folder(folder)(["what is this?"], [images]), theirs(folder, "what is this?", images)
    np.testing.assert_array_equal(ours["input_ids"], reference["input_ids"])
    assert list(ours["input_ids"][0][:2]).count(1) == (kind != "no bos")
    assert (ours["input_ids"] == IMAGE).sum() == count * TOKENS
    if count:
        np.testing.assert_array_equal(ours["pixel_values"], reference["pixel_values"])
    else:
        assert "pixel_values" not in ours


def test_pixels_by_hand(processor: Processor) -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    expected = (array / 255 - PIXELS["image_mean"]) / PIXELS["image_std"]
    got = processor.pixels([array, Image.fromarray(array)])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.stack([expected.transpose(2, 0, 1)] * 2), atol=1e-6)


@pytest.mark.parametrize("settings", [PIXELS, SQUARE], ids=["clip", "siglip"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 3), (3, 40), (40, 3), (4, 7), (200, 1)])
def test_small_pictures_are_read_as_rows_and_columns(size: tuple[int, int], settings: dict[str, Any], tmp_path: Path) -> None:
    """A height of 1 or 3 looks like the channels."""
    processor = Processor.from_folder(make(tmp_path / "model", pixels=settings))
    colour = (250, 120, 10)
    kind = CLIPImageProcessorPil if settings is PIXELS else SiglipImageProcessorPil
    plain = kind(**{k: v for k, v in settings.items() if k != "image_processor_type"})
    large = plain([Image.new("RGB", (16, 16), colour)], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(processor.pixels([Image.new("RGB", size, colour)]), large, atol=0.02)


def test_a_batch_is_padded_on_the_left(processor: Processor, model: Llava) -> None:
    batch = processor(["what is this?", "what?", "and that?"], [picture(), None, [picture(9, 9, 1), picture(8, 30, 2)]])
    model.check(batch)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.dtype == np.int32 and mask.dtype == bool and ids.shape == mask.shape
    assert [list(row) for row in (ids == IMAGE).sum(axis=1)[:, None]] == [[TOKENS], [0], [2 * TOKENS]]
    assert mask[:, -1].all() and (np.diff(mask.astype(int), axis=1) >= 0).all()
    assert (ids[~mask] == WORDS.index("<pad>")).all() and (ids[mask] != WORDS.index("<pad>")).all()
    for row, question, images in zip(range(3), ["what is this?", "what?", "and that?"], [1, 0, 2], strict=True):
        assert list(ids[row][mask[row]]) == processor.tokens(question, images)
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    np.testing.assert_array_equal(batch["pixel_values"][2], processor.pixels([picture(8, 30, 2)])[0])
    longer = processor(["what?"], [None], length=20)
    assert longer["input_ids"].shape == (1, 20) and longer["attention_mask"].sum() == mask[1].sum()


def test_questions_are_refused(processor: Processor) -> None:
    for question in ("what is <image>?", "<image>"):
        with pytest.raises(InputError, match=r"<image> is put in for you"):
            processor([question], [picture()])
    with pytest.raises(InputError, match="2 questions, 1 entries of images"):
        processor(["a", "b"], [picture()])
    with pytest.raises(InputError, match="0 questions"):
        processor([], [])
    with pytest.raises(InputError, match=r"the string 'what\?'"):
        processor("what?", [None] * 5)
    with pytest.raises(InputError, match=r"takes \d+ tokens with its images; the row has 5"):
        processor(["what?"], [picture()], length=5)


# --- folders


def test_the_processor_is_copied_and_found_in_newer_files(folder: Path, tmp_path: Path) -> None:
    copy_processor(folder, tmp_path)
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "old")
    nested = {"image_processor": json.loads((tmp_path / "old").read_text()) | {"image_processor_type": "CLIPImageProcessorFast"}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    one, other = (Processor.from_folder(f)(["what?"], [picture()]) for f in (folder, tmp_path))
    assert one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)
    # as in transformers, the nested settings come first
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PIXELS | {"image_mean": [0, 0, 0]}))
    assert np.array_equal(Processor.from_folder(tmp_path).pixels([picture()]), one["pixel_values"])


def write(name: str, value: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def auto_map(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(value | {"auto_map": {"AutoTokenizer": ["x.X", None]}}))

    return change


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "no processor": (lambda f: (f / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
    "empty processor": (write("preprocessor_config.json", {}), "no preprocessor_config.json"),
    "broken tokenizer": (write("tokenizer.json", "{"), "the tokenizer cannot be read"),
    "other tokenizer": (write("tokenizer.json", {"version": "9"}), "the tokenizer cannot be read"),
    "broken processor": (write("preprocessor_config.json", "["), r"preprocessor_config\.json: not JSON"),
    "processor of another kind": (write("processor_config.json", {"image_processor": [1]}), "no preprocessor_config.json"),
    "unknown processor": (
        write("preprocessor_config.json", {"image_processor_type": "PixtralImageProcessor"}),
        "'PixtralImageProcessor'",
    ),
    "settings": (write("preprocessor_config.json", {"size": "large"}), "settings cannot be used"),
    "tokenizer code": (auto_map("tokenizer_config.json"), r"tokenizer_config\.json: auto_map"),
    "processor code": (auto_map("preprocessor_config.json"), r"preprocessor_config\.json: auto_map"),
    "another image token": (write("config.json", CONFIG | {"image_token_index": 5}), "'<image>' is token 4; config.json says 5"),
    "config": (write("config.json", "{"), r"config\.json: not JSON"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_are_refused(kind: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    change, message = FOLDERS[kind]
    change(folder)
    with pytest.raises(InputError, match=message):
        Processor.from_folder(folder)


TEMPLATES = {
    "{{ messages[0]['content'] | length }}": "0 placeholders for 1 images",
    TEMPLATE + "<image>": "2 placeholders for 1 images",
    "{{ raise_exception('no images') }}<image>": "chat template: no images",
    "{% if %}<image>": "chat template: ",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_are_refused(template: str, tmp_path: Path) -> None:
    processor = Processor.from_folder(make(tmp_path / "model", template))
    with pytest.raises(InputError, match=TEMPLATES[template]):
        processor(["what?"], [picture()])


def test_other_templates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no chat template"):
        Processor.from_folder(make(tmp_path / "none", None))(["what?"], [None])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no tokens"):
        Processor.from_folder(make(tmp_path / "empty", " ", bos=False))(["what?"], [None])
    folder = make(tmp_path / "small")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"text_config": CONFIG["text_config"] | {"vocab_size": 9}}))  # type: ignore[operator]
    with pytest.raises(InputError, match=r"token id 13 is past the model's vocabulary of 9"):
        Processor.from_folder(folder)(["what?"], [None])


# --- pictures


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
        processor.pixels([picture(), np.zeros((0, 4, 3), np.uint8)])


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


# --- Llava.check


def good() -> dict[str, np.ndarray]:
    ids = np.array([[5, *[IMAGE] * TOKENS, 6], [7, 8, 9, 10, 11, 12]], np.int32)
    return {"input_ids": ids, "attention_mask": np.ones((2, 6), bool), "pixel_values": np.zeros((1, 3, 16, 16), np.float32)}


def ids(value: int) -> dict[str, np.ndarray]:
    array = good()["input_ids"]
    array[1, 2] = value
    return {"input_ids": array}


NO_ROOM = np.array([[5, *[IMAGE] * 3, 6, 7], [IMAGE, 8, 9, 10, 11, 12]], np.int32)
NAN = np.full((1, 3, 16, 16), np.nan, np.float32)
BATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "one placeholder too many": (ids(IMAGE), "4, 1 image placeholders a sample with 1 images in all; an image takes 4"),
    "an image over two samples": ({"input_ids": NO_ROOM}, "3, 1 image placeholders"),
    "no image": ({"pixel_values": None}, "4, 0 image placeholders a sample with 0 images"),
    "two images": ({"pixel_values": np.zeros((2, 3, 16, 16), np.float32)}, "with 2 images"),
    "past the vocabulary": (ids(14), "token id 14; the vocabulary has 14"),
    "negative": (ids(-1), "token id -1"),
    "nan": ({"pixel_values": NAN}, "pixel_values: not finite"),
    "infinite": ({"pixel_values": np.full_like(NAN, np.inf)}, "pixel_values: not finite"),
    "another size": ({"pixel_values": np.zeros((1, 3, 16, 15), np.float32)}, r"\(1, 3, 16, 15\); expected \(images, 3, 16, 16\)"),
    "channels last": ({"pixel_values": np.zeros((1, 16, 16, 3), np.float32)}, "pixel_values: shape"),
    "bytes": ({"pixel_values": np.zeros((1, 3, 16, 16), np.uint8)}, "pixel_values: uint8"),
    "one row": ({"input_ids": good()["input_ids"][0]}, r"int32\[6\]; expected integers \(samples, length\)"),
    "floats": ({"input_ids": good()["input_ids"] * 1.0}, r"float64\[2, 6\]"),
    "nothing": ({"input_ids": np.zeros((2, 0), np.int32)}, r"int32\[2, 0\]"),
    "no ids": ({"input_ids": None}, "input_ids: "),
    "mask": ({"attention_mask": np.ones((2, 5), bool)}, r"attention_mask: shape \(2, 5\)"),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_are_refused(kind: str, model: Llava) -> None:
    model.check(good())
    change, message = BATCHES[kind]
    with pytest.raises(InputError, match=message):
        model.check(good() | change)
