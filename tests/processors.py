"""Tiny processor folders, one a family, and pictures for them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from splitq_jax.models import Processor
from splitq_jax.models.families import FAMILIES
from splitq_jax.models.processors import open_processor

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
    """A LLaVA's folder without weights."""
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


# --- all families

VOCABULARY = 96
SPOKEN = [
    "\n",
    "\n\n",
    ":",
    "?",
    ".",
    "<",
    ">",
    "user",
    "assistant",
    "model",
    "what",
    "is",
    "this",
    "and",
    "that",
    "red",
    "blue",
    "no",
]
SPOKEN += [
    "User",
    "Assistant",
    "Here",
    "the",
    "original",
    "image",
    "here",
    "are",
    "some",
    "crops",
    "to",
    "help",
    "you",
    "see",
    "better",
]
CHATML = ["<|im_start|>", "<|im_end|>"]
TILES = [f"<row_{i}_col_{j}>" for i in (1, 2, 3) for j in (1, 2, 3)]


def chat(image: str, turn: str, end: str, roles: tuple[str, str] = ("user", "assistant"), start: str = "") -> str:
    """A chat template in a family's manner."""
    who = f"{{{{ '{roles[0]}' if m['role'] == 'user' else '{roles[1]}' }}}}"
    said = f"{{% for c in m['content'] %}}{{% if c['type'] == 'image' %}}{image}{{% else %}}{{{{ c['text'] }}}}{{% endif %}}{{% endfor %}}"
    ask = f"{{% if add_generation_prompt %}}{turn % roles[1]}{{% endif %}}"
    return f"{start}{{% for m in messages %}}{turn % who}{said}{end}{{% endfor %}}{ask}"


QWEN = {
    "template": chat("<|vision_start|><|image_pad|><|vision_end|>", "<|im_start|>%s\n", "<|im_end|>\n"),
    "special": [*CHATML, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "placeholders": ("<|image_pad|>", "<|video_pad|>"),
    "eos": "<|im_end|>",
    # 8 x 8 pixels a token, 1 to 6 tokens an image
    "images": {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 4, "min_pixels": 64, "max_pixels": 384},
}
IDEFICS = {
    "template": chat("<image>", "%s:", "<end_of_utterance>\n", ("User", "Assistant"), "<|im_start|>"),
    "special": [*CHATML, "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *TILES],
    "placeholders": ("<image>",),
    "eos": "<end_of_utterance>",
    # up to 2 x 2 tiles of 16 x 16 pixels and the whole image, 4 tokens each
    "images": {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 32},
        "max_image_size": {"longest_edge": 16},
        "resample": 1,
    },
    "processor": {"image_seq_len": 4},
}
FAMILY: dict[str, dict[str, Any]] = {
    "llava": {
        "template": chat("<image>\n", "%s: ", " ", ("USER", "ASSISTANT")),  # says no end, as llava-1.5's
        "special": ["<image>"],
        "placeholders": ("<image>",),
        "bos": True,
        "images": PIXELS | {"resample": 3},
        "processor": {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    },
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN | {"images": QWEN["images"] | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}},
    "llava_onevision": {
        "template": chat("<image>\n", "<|im_start|>%s ", "<|im_end|>"),
        "special": [*CHATML, "<image>", "<video>"],
        "placeholders": ("<image>", "<video>"),
        "eos": "<|im_end|>",
        "images": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": 12, "width": 12},
            "image_grid_pinpoints": [[12, 12], [12, 24], [24, 12], [24, 24], [12, 36]],
        },
        "processor": {"num_image_tokens": 9, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"},
    },
    "internvl": {
        "template": chat("<IMG_CONTEXT>\n", "<|im_start|>%s\n", "<|im_end|>\n"),
        "special": [*CHATML, "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        "named": {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        "placeholders": ("<IMG_CONTEXT>",),
        "eos": "<|im_end|>",
        "images": {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "size": {"height": 16, "width": 16},
            "max_patches": 4,
            "crop_to_patches": False,  # the processor asks for it
        },
        "processor": {"image_seq_length": 4},
    },
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS | {"images": IDEFICS["images"] | {"image_processor_type": "SmolVLMImageProcessor"}},
    "gemma3": {
        "template": chat("<start_of_image>", "<start_of_turn>%s\n", "<end_of_turn>\n", ("user", "model"), "{{ bos_token }}"),
        "special": ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"],
        "named": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        "placeholders": ("<image_soft_token>",),
        "bos": True,
        "stop": ["</s>", "<end_of_turn>"],
        "images": {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 16, "width": 16}},
        "processor": {"image_seq_length": 4},
    },
}


def vocabulary(kind: str) -> dict[str, int]:
    words = dict.fromkeys(["<unk>", "<s>", "</s>", "<pad>", *FAMILY[kind]["special"], "USER", "ASSISTANT", *SPOKEN])
    return {w: i for i, w in enumerate(words)}


def add_processor(folder: Path, kind: str) -> Path:
    """Write a family's tokenizer, template and processor files into a folder."""
    family = FAMILY[kind]
    folder.mkdir(exist_ok=True)
    base = Tokenizer(WordLevel(vocabulary(kind), unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|\w+|[^\w\s]"), "removed", invert=True)
    if family.get("bos"):
        base.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    named = {"unk_token": "<unk>", "eos_token": family.get("eos", "</s>"), "pad_token": "<pad>"}
    named |= {"bos_token": "<s>"} if family.get("bos") else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, **named, **family.get("named", {}))
    tokenizer.add_special_tokens({"additional_special_tokens": family["special"]})
    tokenizer.chat_template = family["template"]
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(family["images"]))
    (folder / "processor_config.json").write_text(json.dumps(family.get("processor", {})))
    stops = [vocabulary(kind)[w] for w in family.get("stop", [named["eos_token"]])]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return folder


def placeholders(kind: str) -> tuple[int, ...]:
    return tuple(vocabulary(kind)[w] for w in FAMILY[kind]["placeholders"])


def processor_of(folder: Path, kind: str) -> Processor:
    """What a folder's own `Processor` is, for a folder without a model."""
    config = SimpleNamespace(placeholders=placeholders(kind), text=SimpleNamespace(vocab_size=VOCABULARY))
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return Processor(config, open_processor(folder, kind), stops)


def registered(kind: str) -> bool:
    return kind in FAMILIES


def picture(width: int = 23, height: int = 19, seed: int = 0, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
