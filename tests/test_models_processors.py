"""Every family's tokens and arrays against transformers' own processor, and what no family's processor may do.

transformers' processors of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA-OneVision, InternVL and SmolVLM want a video processor, which needs
torchvision: there the reference is transformers' class with its PIL image processor, with nothing in the video processor's place.
LLaVA's, Idefics3's and Gemma 3's are the reference as they are.
"""

import inspect
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processors import FAMILY, add_processor, picture, placeholders, processor_of, vocabulary
from transformers import PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from splitq_jax.errors import InputError
from splitq_jax.models import Processor
from splitq_jax.models.processors import IMAGE_MODULES, PROCESSORS, open_processor

KINDS = list(FAMILY)
LIBRARY = "transformers.models"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {kind: add_processor(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def ours(folders: dict[str, Path]) -> dict[str, Processor]:
    return {kind: processor_of(folder, kind) for kind, folder in folders.items()}


def reference(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' processor, set up by its own constructor."""
    module = import_module(f"{LIBRARY}.{kind}.processing_{kind}")
    made = getattr(module, PROCESSORS[kind][0])
    if kind == "smolvlm":
        monkeypatch.setattr(module, "num2words", str)  # only called for videos
    if "video_processor" in inspect.signature(made.__init__).parameters:
        made = type(made.__name__, (made,), {"get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])})
    name = FAMILY[kind]["images"]["image_processor_type"].removesuffix("Fast")
    where = IMAGE_MODULES[name]
    images = getattr(import_module(f"{LIBRARY}.{where}.image_processing_pil_{where}"), f"{name}Pil").from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    settings = json.loads((folder / "processor_config.json").read_text())
    needed = {"video_processor": None} if kind == "smolvlm" else {}
    return made(image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template, **settings, **needed)


SIZES = [(23, 19), (40, 9), (8, 30), (16, 16)]
CHATS = [
    # an image after a text and two turns; no image; two images with a text between them; one image
    [
        {"role": "user", "content": ["what is this?", 0]},
        {"role": "assistant", "content": ["red"]},
        {"role": "user", "content": ["and that?"]},
    ],
    [{"role": "user", "content": ["no"]}],
    [{"role": "user", "content": [1, "and", 2, "what is that?"]}],
    [{"role": "user", "content": [3, "what?"]}],
]


def chats(show: bool) -> list[list[dict[str, Any]]]:
    def part(p: Any) -> dict[str, Any]:
        if isinstance(p, str):
            return {"type": "text", "text": p}
        return {"type": "image"} | ({"image": picture(*SIZES[p], p)} if show else {})

    return [[m | {"content": [part(p) for p in m["content"]]} for m in c] for c in CHATS]


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1, 2], [1], [3]], ids=["mixed", "text first", "text", "one"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(
    kind: str, rows: list[int], folders: dict[str, Path], ours: dict[str, Processor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chats of several turns, with none, one and several images of several sizes, between texts."""
    whole = reference(folders[kind], kind, monkeypatch)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "np"}
    given = [chats(show=True)[row] for row in rows]
    theirs = ProcessorMixin.apply_chat_template(whole, given, processor_kwargs={"padding": True}, **options)
    images = [[picture(*SIZES[i], i) for m in CHATS[row] for i in m["content"] if isinstance(i, int)] for row in rows]
    found = ours[kind].chats([chats(show=False)[row] for row in rows], images)
    assert found.keys() == set(theirs) - ({"token_type_ids"} if kind != "gemma3" else set())
    for name, value in found.items():
        np.testing.assert_array_equal(value, np.asarray(theirs[name]), err_msg=name)
    assert {v.dtype.name for v in found.values()} <= {"int32", "bool", "float32"}
    assert np.isin(found["input_ids"], placeholders(kind)).any(axis=1).tolist() == [bool(group) for group in images]


def test_without_torch(folders: dict[str, Path], ours: dict[str, Processor]) -> None:
    """In a process that cannot import torch, torchvision and num2words, the same arrays."""
    script = """
import json, sys
for name in ("torch", "torchvision", "num2words"):
    sys.modules[name] = None  # what cannot be imported
from pathlib import Path
from processors import processor_of
DIGEST
print(json.dumps({kind: digest(processor_of(Path(folder), kind)) for kind, folder in json.loads(sys.argv[1]).items()}))
"""
    code = script.replace("DIGEST", inspect.getsource(digest).replace(": Processor", ""))
    paths = json.dumps({kind: str(folder) for kind, folder in folders.items()})
    environment = {"PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path]), "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code, paths], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {kind: digest(processor) for kind, processor in ours.items()}


def digest(processor: Processor) -> str:
    import hashlib

    from processors import picture

    batch = processor(["what is this?", "no"], [[picture(), picture(40, 9, 1)], None])
    return hashlib.sha256(b"".join(name.encode() + batch[name].tobytes() for name in sorted(batch))).hexdigest()


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 3), (3, 40), (200, 1), (1, 200)])
@pytest.mark.parametrize("kind", KINDS)
def test_small_pictures_are_read_as_rows_and_columns(kind: str, size: tuple[int, int], ours: dict[str, Processor]) -> None:
    """A height of 1 or 3 looks like the channels: a picture of one colour would come out in others."""
    colour = np.array([250, 120, 10])
    batch = ours[kind].inputs("what?", Image.new("RGB", size, tuple(colour)))
    p = ours[kind].image_processor
    mean, std = np.array(p.image_mean), np.array(p.image_std)
    pixels = batch["pixel_values"]
    by_channel = np.moveaxis(
        pixels.reshape(-1, 3, pixels.shape[-1] // 3) if pixels.ndim == 2 else pixels, -3 + (pixels.ndim == 2), 0
    )
    # padding is black, or zero once everything is normalised
    for values, shown, black in zip(by_channel.reshape(3, -1), (colour / 255 - mean) / std, -mean / std, strict=True):
        distance = np.abs(values[:, None] - [shown, black, 0])
        assert (distance.min(axis=1) < 0.02).all() and (distance[:, 0] < 0.02).any()


def test_patches_by_hand(ours: dict[str, Processor]) -> None:
    """Qwen's documented arithmetic: sides are multiples of 8 within the bounds, so nothing is resized; a patch is C, t, 4, 4."""
    array = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    batch = ours["qwen3_vl"].inputs("what?", array)
    assert batch["image_grid_thw"].tolist() == [[1, 2, 4]] and batch["pixel_values"].shape == (8, 96)
    assert np.isin(batch["input_ids"], placeholders("qwen3_vl")).sum() == 2
    scaled = ((array / 255 - 0.5) / 0.5).transpose(2, 0, 1)
    corners = [(y, x) for left in (0, 8) for y in (0, 4) for x in (left, left + 4)]  # 2 x 2 patches of a feature together
    for row, (y, x) in zip(batch["pixel_values"], corners, strict=True):
        patch = scaled[:, y : y + 4, x : x + 4]
        np.testing.assert_allclose(row.reshape(3, 2, 4, 4), np.stack([patch, patch], axis=1), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exchange_is_the_processors_question_and_ends(kind: str, ours: dict[str, Processor]) -> None:
    processor = ours[kind]
    for i, size in enumerate([*SIZES, SIZES[0]]):
        asked, told = processor.exchange("what is this?", picture(*size, i), "red")
        assert list(asked) == processor.inputs("what is this?", picture(*size, i))["input_ids"][0].tolist()
        tail = told[len(asked) :]
        ends = [j for j, token in enumerate(tail) if token in processor.stop_ids]
        assert told[: len(asked)] == asked and ends == [1] and tail[0] == vocabulary(kind)["red"]
        assert processor.decode(tail) == "red"
        vision = processor.vision([picture(*size, i)])
        whole = processor.inputs("what is this?", picture(*size, i))
        assert vision.keys() == {name for name in whole if name.startswith(("pixel", "image", "batch"))}
        assert all(np.array_equal(vision[name], whole[name]) for name in vision)


def test_the_pictures_of_a_batch_are_padded_to_each_other(ours: dict[str, Processor]) -> None:
    pictures = [picture(*size) for size in SIZES]
    shapes = {kind: ours[kind].vision(pictures)["pixel_values"].shape for kind in KINDS}
    assert shapes["llava"] == shapes["gemma3"] == (4, 3, 16, 16)
    assert shapes["llava_onevision"] == (4, 5, 3, 12, 12)  # 2 x 2 tiles and the whole
    assert shapes["idefics3"] == shapes["smolvlm"] == (4, 5, 3, 16, 16)
    assert shapes["qwen2_vl"][1] == 96 and shapes["internvl"][1:] == (3, 16, 16)


def test_stops_are_the_chats_and_the_tokenizers(folders: dict[str, Path], ours: dict[str, Processor], tmp_path: Path) -> None:
    words = vocabulary("gemma3")
    assert ours["gemma3"].stop_ids == (words["</s>"], words["<end_of_turn>"])
    assert ours["qwen2_vl"].stop_ids == (vocabulary("qwen2_vl")["<|im_end|>"],)


@pytest.mark.parametrize("kind", KINDS)
def test_placeholders_in_a_question_are_refused(kind: str, ours: dict[str, Processor]) -> None:
    whole = ours[kind].whole
    for token in {whole.image_token, *FAMILY[kind]["placeholders"]}:
        with pytest.raises(InputError, match="is put in for you"):
            ours[kind].inputs(f"what is {token}?", picture())
        with pytest.raises(InputError, match="is put in for you"):
            ours[kind].chats([[{"role": "user", "content": f"{token}"}]], [[picture()]])
    with pytest.raises(InputError, match="1 conversations, 2 entries of images"):
        ours[kind].chats([[{"role": "user", "content": "what?"}]], [[], []])
    with pytest.raises(InputError, match="image 1: 4 x 0 pixels"):
        ours[kind](["what?", "no"], [picture(), np.zeros((0, 4, 3), np.uint8)])
    with pytest.raises(InputError, match="a URL"):
        ours[kind].inputs("what?", "https://example.org/a.png")


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_folders_of_another_family_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model_type 'blip' has no processor"):
        open_processor(folders["llava"], "blip")
    with pytest.raises(InputError, match="image processor 'CLIPImageProcessor'; supported are Qwen2VLImageProcessor"):
        open_processor(folders["llava"], "qwen2_vl")
    broken = add_processor(tmp_path / "internvl", "internvl")
    tokenizer = json.loads((broken / "tokenizer_config.json").read_text())
    gone = {k: v for k, v in tokenizer.items() if k not in {"start_image_token", "model_specific_special_tokens"}}
    (broken / "tokenizer_config.json").write_text(json.dumps(gone))
    with pytest.raises(InputError, match="InternVLProcessor cannot be made of the folder's files"):
        open_processor(broken, "internvl")


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    folder = add_processor(tmp_path / "qwen", "qwen2_vl")
    change(folder / "preprocessor_config.json", patch_size=0)
    with pytest.raises(InputError, match="Qwen2VLProcessor"):
        processor_of(folder, "qwen2_vl").inputs("what?", picture())
    folder = add_processor(tmp_path / "llava", "llava")
    change(folder / "preprocessor_config.json", do_center_crop=False)
    with pytest.raises(InputError, match="pixel_values: the images come out in different sizes"):
        processor_of(folder, "llava")(["what?"] * 2, [picture(), picture(40, 9)])


def test_the_processors_template_comes_first(folders: dict[str, Path], tmp_path: Path) -> None:
    """As in transformers: processor_config.json, chat_template.json, chat_template.jinja, the tokenizer's."""
    folder = add_processor(tmp_path / "model", "llava")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert processor_of(folder, "llava").tokenizer.chat_template == "json"
    change(folder / "processor_config.json", chat_template="config")
    assert processor_of(folder, "llava").tokenizer.chat_template == "config"
