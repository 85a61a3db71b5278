"""Tiny Hugging Face folders, and ways to spoil them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, SiglipVisionConfig
from transformers import LlavaConfig as HfConfig
from transformers import LlavaForConditionalGeneration as HfLlava

SINGLE = "model.safetensors"
Q = "language_model.model.layers.0.self_attn.q_proj.weight"


def make(folder: Path, tower: str = "clip", shards: bool = False, layer: int = -1, **top: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = (CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(**sizes, image_size=8, patch_size=4)
    text = LlamaConfig(**sizes | {"num_hidden_layers": 1}, num_key_value_heads=1, vocab_size=64)
    config = HfConfig(vision_config=vision, text_config=text, image_token_index=60, vision_feature_layer=layer, **top)
    HfLlava(config).save_pretrained(folder, **({"max_shard_size": "10KB"} if shards else {}))
    return folder


def same(a: Any, b: Any) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(x.dtype == y.dtype and bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)
    return folder


def change_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))
