"""Tokens and pixels against transformers' own LLaVA processor, and every folder, template and batch that must be refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processors import CONFIG, IMAGE, PIXELS, SQUARE, TEMPLATE, TOKENS, WORDS, make, picture
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from splitq_jax.errors import InputError
from splitq_jax.models import Processor, copy_processor
from splitq_jax.models.llava import Llava, LlavaConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("processor") / "model")


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return Processor.from_folder(folder)


@pytest.fixture(scope="module")
def model() -> Llava:
    return Llava(LlavaConfig.from_hf(CONFIG))


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
    got = processor.vision([array, Image.fromarray(array)])["pixel_values"]
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
    np.testing.assert_allclose(processor.vision([Image.new("RGB", size, colour)])["pixel_values"], large, atol=0.02)


def test_a_batch_is_padded_on_the_left(processor: Processor, model: Llava) -> None:
    batch = processor(["what is this?", "what?", "and that?"], [picture(), None, [picture(9, 9, 1), picture(8, 30, 2)]])
    model.check(batch)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.dtype == np.int32 and mask.dtype == bool and ids.shape == mask.shape
    assert [list(row) for row in (ids == IMAGE).sum(axis=1)[:, None]] == [[TOKENS], [0], [2 * TOKENS]]
    assert mask[:, -1].all() and (np.diff(mask.astype(int), axis=1) >= 0).all()
    assert (ids[~mask] == WORDS.index("<pad>")).all() and (ids[mask] != WORDS.index("<pad>")).all()
    for row, question, images in zip(range(3), ["what is this?", "what?", "and that?"], [1, 0, 2], strict=True):
        (alone,) = processor.inputs(question, [picture()] * images)["input_ids"]
        assert list(ids[row][mask[row]]) == list(alone)
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    np.testing.assert_array_equal(batch["pixel_values"][2], processor.vision([picture(8, 30, 2)])["pixel_values"][0])
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
    assert np.array_equal(Processor.from_folder(tmp_path).vision([picture()])["pixel_values"], one["pixel_values"])


def write(name: str, value: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def auto_map(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(value | {"auto_map": {"AutoTokenizer": ["x.X", None]}}))

    return change


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "no processor": (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json is missing or empty"),
    "no spread": (write("preprocessor_config.json", {"image_std": [0, 0, 0]}), "image_std is"),
    "empty processor": (write("preprocessor_config.json", {}), "preprocessor_config.json is missing or empty"),
    "broken tokenizer": (write("tokenizer.json", "{"), "the tokenizer cannot be read"),
    "other tokenizer": (write("tokenizer.json", {"version": "9"}), "the tokenizer cannot be read"),
    "broken processor": (write("preprocessor_config.json", "["), r"preprocessor_config\.json: not JSON"),
    "processor of another kind": (
        write("processor_config.json", {"image_processor": [1]}),
        "preprocessor_config.json is missing or empty",
    ),
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
