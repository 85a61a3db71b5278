"""Questions and images to the model's arrays, with transformers' tokenizer and PIL image processor; no torch."""

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps

from splitq_jax.errors import InputError
from splitq_jax.models.convert import read_config
from splitq_jax.models.families import model_of
from splitq_jax.models.weights import read_json

# what is copied beside converted or quantized parameters, so that the folder loads by itself
FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # of files; EPS, say, would start Ghostscript
MAX_PIXELS = 1 << 26
MAX_ASPECT = 200
Picture = str | Path | Image.Image | np.ndarray


def copy_processor(source: str | Path, target: str | Path) -> None:
    """Copy config, tokenizer and processor files from one model folder to another."""
    for name in FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


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


class Processor:
    """A folder's tokenizer and image processor.

    Attributes:
      config: the model's.
      tokenizer: transformers' fast tokenizer.
      image_processor: transformers' PIL image processor.
      image_token: the placeholder.
    """

    def __init__(self, config: Any, tokenizer: Any, image_processor: Any, image_token: str) -> None:
        self.config, self.tokenizer, self.image_processor, self.image_token = config, tokenizer, image_processor, image_token
        found = tokenizer.convert_tokens_to_ids(image_token)
        if found != config.image_token_id:
            raise InputError(f"tokenizer: {image_token!r} is token {found}; config.json says {config.image_token_id}")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Processor":
        """Read tokenizer, image processor and chat template of a model folder.

        Raises:
          InputError: a file that is missing; an image processor that is not supported.
        """
        from transformers import AutoTokenizer

        folder = Path(folder)
        config = model_of(read_config(folder)).config
        if not (folder / "tokenizer.json").is_file():
            raise InputError(f"{folder}: no tokenizer.json; copy the tokenizer's files into the folder")
        for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
            if (folder / name).is_file() and "auto_map" in read_json(folder / name):
                raise InputError(f"{folder / name}: auto_map asks to run the folder's own code, which is never run; remove it")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as e:  # tokenizers raises plain ones
            raise InputError(f"{folder}: the tokenizer cannot be read ({e})") from None
        processor = read_json(folder / "processor_config.json") if (folder / "processor_config.json").is_file() else {}
        if tokenizer.chat_template is None and (folder / "chat_template.json").is_file():
            tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
        return cls(config, tokenizer, _image_processor(folder, processor), processor.get("image_token", "<image>"))

    def pixels(self, images: Sequence[Picture]) -> Float[np.ndarray, "N C H W"]:
        """Resize, crop, rescale and normalise as the folder's image processor says.

        Raises:
          InputError: see `open_image`.
        """
        opened = [open_image(picture, f"image {i}") for i, picture in enumerate(images)]
        out: np.ndarray = self.image_processor(opened, return_tensors="np")["pixel_values"]
        return np.asarray(out, np.float32)

    def __call__(
        self, questions: Sequence[str], images: Sequence[Picture | Sequence[Picture] | None], length: int | None = None
    ) -> dict[str, np.ndarray]:
        """Put questions into the chat template, each after its images, ready for an answer.

        Args:
          questions: one a sample.
          images: one, several or none a sample.
          length: tokens a row; None for the longest.

        Returns:
          ``input_ids`` and ``attention_mask`` (B, L), padded on the left, and ``pixel_values`` (N, C, H, W) where there are images.

        Raises:
          InputError: other numbers of questions and images; a question that has the placeholder in it or is longer than ``length``.
        """
        if isinstance(questions, str):
            raise InputError(f"questions: the string {questions!r}; expected a list of them")
        if len(questions) != len(images) or not questions:
            raise InputError(f"{len(questions)} questions, {len(images)} entries of images; expected as many, and at least one")
        groups = [_as_list(entry) for entry in images]
        rows = [self.tokens(question, len(group)) for question, group in zip(questions, groups, strict=True)]
        width = max(map(len, rows)) if length is None else length
        if max(map(len, rows)) > width:
            raise InputError(f"a question takes {max(map(len, rows))} tokens with its images; the row has {width}")
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        batch = {
            "input_ids": np.array([[pad] * (width - len(r)) + r for r in rows], np.int32),
            "attention_mask": np.array([[False] * (width - len(r)) + [True] * len(r) for r in rows]),
        }
        if flat := [picture for group in groups for picture in group]:
            batch["pixel_values"] = self.pixels(flat)
        return batch

    def tokens(self, question: str, images: int) -> list[int]:
        """Return the tokens of one question behind ``images`` images, the placeholders repeated for each image feature."""
        if self.image_token in question:
            raise InputError(f"question {question!r}: {self.image_token} is put in for you; leave it out and give the images")
        if self.tokenizer.chat_template is None:
            raise InputError("tokenizer: no chat template; add chat_template.jinja to the model folder")
        content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as e:  # Jinja's, or the template's own
            raise InputError(f"chat template: {e}") from None
        if text.count(self.image_token) != images:
            raise InputError(f"chat template: {text.count(self.image_token)} placeholders for {images} images in {text!r}")
        text = text.replace(self.image_token, self.image_token * self.config.tokens_per_image)
        begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)  # by the template
        ids: list[int] = self.tokenizer(text, add_special_tokens=not begun)["input_ids"]
        if past := [i for i in ids if i >= self.config.text.vocab_size and i != self.config.image_token_id]:
            raise InputError(
                f"question {question!r}: token id {past[0]} is past the model's vocabulary of {self.config.text.vocab_size}"
            )
        if not ids:
            raise InputError(f"question {question!r}: no tokens; check the chat template")
        return ids


def _as_list(entry: Picture | Sequence[Picture] | None) -> list[Picture]:
    if entry is None:
        return []
    return list(entry) if isinstance(entry, list | tuple) else [entry]  # type: ignore[list-item]


def _image_processor(folder: Path, processor: dict[str, Any]) -> Any:
    """Build the PIL image processor; older folders describe it in a file of its own."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    own = folder / "preprocessor_config.json"
    settings = processor.get("image_processor") or (read_json(own) if own.is_file() else None)
    if not isinstance(settings, dict) or not settings:
        raise InputError(f"{folder}: no preprocessor_config.json; copy the image processor's file into the folder")
    kinds = {"CLIPImageProcessor": CLIPImageProcessorPil, "SiglipImageProcessor": SiglipImageProcessorPil}
    name = str(settings.get("image_processor_type", "CLIPImageProcessor")).removesuffix("Fast").removesuffix("Pil")
    if name not in kinds:
        raise InputError(f"{folder}: image processor {name!r}; supported are {', '.join(kinds)}")
    skip = {"image_processor_type", "processor_class", "feature_extractor_type", "_processor_class", "device", "return_tensors"}
    try:
        return kinds[name](**{k: v for k, v in settings.items() if k not in skip})
    except Exception as e:  # transformers checks some of the settings, with exceptions of many kinds
        raise InputError(f"{folder}: the image processor's settings cannot be used ({e})") from None
