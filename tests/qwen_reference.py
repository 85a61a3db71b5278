"""Random Qwen-VLs of transformers, batches for them, and what ours must agree on with them."""

from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from twins import tensors

VOCABULARY, IMAGE, VIDEO = 320, 300, 301
KINDS: dict[str, tuple[Any, Any]] = {
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
PATCH = {"patch_size": 2, "temporal_patch_size": 2, "num_heads": 2}
VISION: dict[str, dict[str, Any]] = {
    # windows of 2 x 2 features
    "qwen2_5_vl": PATCH
    | {
        "hidden_size": 24,
        "intermediate_size": 20,
        "depth": 3,
        "window_size": 8,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 3,
    },
    "qwen2_vl": PATCH | {"embed_dim": 24, "mlp_ratio": 2, "depth": 2},
    "qwen3_vl": PATCH
    | {"hidden_size": 24, "intermediate_size": 20, "depth": 3, "num_position_embeddings": 17, "deepstack_visual_indexes": [2, 0]},
}


def reference(kind: str, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **top: Any) -> Any:
    """A random model; biases and norms are random too, which transformers starts at 0 and 1."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [1, 2, 1]}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 56, "num_hidden_layers": 2}
    decoder = {"vocab_size": VOCABULARY, "rope_parameters": rope} | sizes | (text or {})
    if kind == "qwen3_vl":
        decoder = {"head_dim": 8} | decoder
    out = {"hidden_size" if kind == "qwen2_vl" else "out_hidden_size": decoder["hidden_size"]}
    config, model = KINDS[kind]
    tower = VISION[kind] | out | (vision or {})
    hf = model(config(text_config=decoder, vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO, **top)).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    return hf


def batch_of(hf: Any, rows: list[list[Any]], pad: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of words (a number: so many) and pictures (height, width) or (frames, height, width), in features; padding on the left."""
    rng = np.random.default_rng(seed)
    c = hf.config.vision_config
    m, split = c.spatial_merge_size, hf.config.model_type == "qwen3_vl"
    ids, grids = [], {IMAGE: [], VIDEO: []}
    for parts in rows:
        row: list[int] = []
        for part in parts:
            if isinstance(part, int):
                row += rng.integers(3, IMAGE, part).tolist()
                continue
            token = IMAGE if len(part) == 2 else VIDEO
            t, h, w = part if len(part) == 3 else (1, *part)
            grids[token].append([t, h * m, w * m])
            for _ in range(t if split and token == VIDEO else 1):
                row += [*rng.integers(3, IMAGE, 2), *[token] * (h * w * (1 if split else t))]
        ids.append(row)
    width = pad + max(map(len, ids))
    empty = [width - len(r) for r in ids]
    batch: dict[str, np.ndarray] = {
        "input_ids": np.array([[0] * e + r for r, e in zip(ids, empty, strict=True)], np.int32),
        "attention_mask": np.array([[False] * e + [True] * len(r) for r, e in zip(ids, empty, strict=True)]),
    }
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE) + 2 * (batch["input_ids"] == VIDEO)
    inputs = c.in_channels * c.temporal_patch_size * c.patch_size**2
    for token, pixels, grid in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        if grids[token]:
            batch[grid] = np.array(grids[token])
            batch[pixels] = rng.standard_normal((int(batch[grid].prod(axis=1).sum()), inputs), np.float32)
    return batch


@partial(jax.jit, static_argnums=0)
def run(model: Any, params: Any, batch: Any) -> Any:
    return model.apply({"params": params}, **batch, mutable=["inputs"])


def logits(model: Any, params: Any, batch: dict[str, Any]) -> np.ndarray:
    return np.asarray(run(model, params, model.prepare(batch))[0])


def theirs_of(hf: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return hf(**tensors(batch)).logits.numpy()
