"""transformers' own processors, put together from a model folder without torch: their tokenizer and their PIL image processor.

A processor class asks for a video processor where its family has one, and that needs torchvision; the classes here leave it out.
"""

import inspect
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from splitq_jax.errors import InputError
from splitq_jax.models.weights import read_json

# model_type in config.json: the processor class, and the image processors that it works with, the usual one first
PROCESSORS = {
    "llava": ("LlavaProcessor", ("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor")),
    "qwen2_vl": ("Qwen2VLProcessor", ("Qwen2VLImageProcessor",)),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", ("Qwen2VLImageProcessor",)),
    "qwen3_vl": ("Qwen3VLProcessor", ("Qwen2VLImageProcessor",)),
    "llava_onevision": ("LlavaOnevisionProcessor", ("LlavaOnevisionImageProcessor",)),
    "internvl": ("InternVLProcessor", ("GotOcr2ImageProcessor",)),
    "idefics3": ("Idefics3Processor", ("Idefics3ImageProcessor", "SmolVLMImageProcessor")),
    "smolvlm": ("SmolVLMProcessor", ("SmolVLMImageProcessor", "Idefics3ImageProcessor")),
    "gemma3": ("Gemma3Processor", ("Gemma3ImageProcessor",)),
}
IMAGE_MODULES = {
    "CLIPImageProcessor": "clip",
    "SiglipImageProcessor": "siglip",
    "LlavaImageProcessor": "llava",
    "Qwen2VLImageProcessor": "qwen2_vl",
    "LlavaOnevisionImageProcessor": "llava_onevision",
    "GotOcr2ImageProcessor": "got_ocr2",
    "Idefics3ImageProcessor": "idefics3",
    "SmolVLMImageProcessor": "smolvlm",
    "Gemma3ImageProcessor": "gemma3",
}
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


def copy_processor(source: str | Path, target: str | Path) -> None:
    """Copy config, tokenizer and processor files from one model folder to another."""
    for name in FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def open_processor(folder: str | Path, kind: str, **fixed: Any) -> Any:
    """Put together transformers' processor of a model folder.

    Args:
      folder: a Hugging Face folder.
      kind: the ``model_type`` of its ``config.json``.
      fixed: what the model's config settles, whatever the processor's file says.

    Raises:
      InputError: another model type; a file that is missing, cannot be read or asks to run code.
    """
    folder = Path(folder)
    if kind not in PROCESSORS:
        raise InputError(f"config.json: model_type {kind!r} has no processor; supported are {', '.join(PROCESSORS)}")
    for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file() and "auto_map" in read_json(folder / name):
            raise InputError(f"{folder / name}: auto_map asks to run the folder's own code, which is never run; remove it")
    tokenizer = _tokenizer(folder)
    settings = read_json(folder / "processor_config.json") if (folder / "processor_config.json").is_file() else {}
    images = _image_processor(folder, settings, PROCESSORS[kind][1])
    made = _class(kind)
    taken = inspect.signature(made.__init__).parameters.keys() - {
        "self",
        "image_processor",
        "tokenizer",
        "video_processor",
        "kwargs",
    }
    chosen = {k: v for k, v in {**settings, **fixed}.items() if k in taken}
    tokenizer.chat_template = chosen["chat_template"] = _chat_template(folder, settings) or tokenizer.chat_template
    try:
        return made(image_processor=images, tokenizer=tokenizer, **chosen)
    except Exception as e:  # it looks for the family's special tokens, among others
        raise InputError(f"{folder}: {made.__name__} cannot be made of the folder's files ({e})") from None


def _class(kind: str) -> Any:
    """Return the processor class of a family, without video."""
    name = PROCESSORS[kind][0]
    base: Any = getattr(import_module(f"transformers.models.{kind}.processing_{kind}"), name)
    members: dict[str, Any] = {"get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])}
    if kind == "smolvlm":
        members["__init__"] = _without_num2words
    return type(name, (base,), members)


def _without_num2words(
    self: Any, image_processor: Any, tokenizer: Any, image_seq_len: int = 169, chat_template: Any = None
) -> None:
    """Set up SmolVLM's processor; its own constructor asks for a package that spells out how many frames a video has."""
    from transformers.processing_utils import ProcessorMixin

    names = {"fake_image": "fake_token_around_image", "image": "image", "video": "video", "end_of_utterance": "end_of_utterance"}
    for name, token in (names | {"global_image": "global-img"}).items():
        setattr(self, f"{name}_token", getattr(tokenizer, f"{name}_token", f"<{token}>"))
    self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
    self.image_seq_len = image_seq_len
    ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: no tokenizer.json; copy the tokenizer's files into the folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # tokenizers raises plain ones
        raise InputError(f"{folder}: the tokenizer cannot be read ({e})") from None


def _chat_template(folder: Path, settings: dict[str, Any]) -> Any:
    """Return the processor's template, which comes before the tokenizer's; None where there is none."""
    if settings.get("chat_template") is not None:
        return settings["chat_template"]
    if (folder / "chat_template.json").is_file():
        return read_json(folder / "chat_template.json").get("chat_template")
    own = folder / "chat_template.jinja"
    return own.read_text(encoding="utf-8") if own.is_file() else None


def _image_processor(folder: Path, processor: dict[str, Any], supported: tuple[str, ...]) -> Any:
    """Build the PIL image processor; older folders describe it in a file of its own."""
    own = folder / "preprocessor_config.json"
    settings = processor.get("image_processor") or (read_json(own) if own.is_file() else None)
    if not isinstance(settings, dict) or not settings:
        raise InputError(f"{folder}: preprocessor_config.json is missing or empty; copy the image processor's file into the folder")
    std = settings.get("image_std", 1.0)
    if not all(isinstance(s, int | float) and s > 0 for s in (std if isinstance(std, list) else [std])):
        raise InputError(f"{folder}: the image processor's image_std is {std}; expected positive numbers")
    name = str(settings.get("image_processor_type", supported[0])).removesuffix("Fast").removesuffix("Pil")
    if name not in supported:
        raise InputError(f"{folder}: image processor {name!r}; supported are {', '.join(supported)}")
    module = import_module(f"transformers.models.{IMAGE_MODULES[name]}.image_processing_pil_{IMAGE_MODULES[name]}")
    skip = {"image_processor_type", "processor_class", "feature_extractor_type", "_processor_class", "device", "return_tensors"}
    try:
        return getattr(module, f"{name}Pil")(**{k: v for k, v in settings.items() if k not in skip})
    except Exception as e:  # transformers checks some of the settings, with exceptions of many kinds
        raise InputError(f"{folder}: the image processor's settings cannot be used ({e})") from None
