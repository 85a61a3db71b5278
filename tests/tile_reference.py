"""Random LLaVAs, LLaVA-OneVisions and InternVLs of transformers, and what ours must agree on with them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers import InternVLConfig as HfInternVLConfig
from transformers import LlavaConfig as HfLlavaConfig
from transformers import LlavaOnevisionConfig as HfOnevisionConfig

from splitq_jax import models

VOCABULARY, IMAGE, VIDEO = 320, 300, 301
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 56, "num_hidden_layers": 2}
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODERS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig, "mistral": MistralConfig}
TOWERS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig, "internvit": InternVLVisionConfig}
CLASSES = {
    "llava": (HfLlavaConfig, LlavaForConditionalGeneration),
    "llava_onevision": (HfOnevisionConfig, LlavaOnevisionForConditionalGeneration),
    "internvl": (HfInternVLConfig, InternVLForConditionalGeneration),
}


def reference(family: str, tower: str, decoder: str, vision: dict[str, Any], text: dict[str, Any], **top: Any) -> Any:
    """A random model; biases, norms and layer scales are random too, which transformers starts at constants."""
    torch.manual_seed(0)
    config, model = CLASSES[family]
    ids = {"image_token_id": IMAGE} if family == "internvl" else {"image_token_index": IMAGE}
    ids |= {"video_token_index": VIDEO} if family == "llava_onevision" else {}
    parts = {
        "vision_config": TOWERS[tower](**(TOWER | vision)),
        "text_config": DECODERS[decoder](vocab_size=VOCABULARY, **(SIZES | text)),
    }
    hf = model(config(**parts, **ids, **top)).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    return hf


def load(hf: Any, folder: Path) -> tuple[Any, Any]:
    hf.save_pretrained(folder)
    return models.load(folder)


def rows_of(pictures: list[list[tuple[int, int]]], pad: list[int]) -> dict[str, np.ndarray]:
    """Rows of text around ``pictures``, each a placeholder and how often it stands there, behind ``pad`` tokens of padding."""
    rng = np.random.default_rng(0)
    rows = []
    for row in pictures:
        ids = list(rng.integers(3, IMAGE, 3))
        for token, count in row:
            ids += [token] * count + list(rng.integers(3, IMAGE, 2))
        rows.append(ids + list(rng.integers(3, IMAGE, 5)))
    width = max(len(r) + p for r, p in zip(rows, pad, strict=True))
    return {
        "input_ids": np.array([[0] * (width - len(r)) + r for r in rows], np.int32),
        "attention_mask": np.array([[False] * (width - len(r)) + [True] * len(r) for r in rows]),
    }
