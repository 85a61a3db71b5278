"""Logits against transformers' own LLaVA, tiny and random, on torch's CPU."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, SiglipVisionConfig
from transformers import LlavaConfig as HfConfig
from transformers import LlavaForConditionalGeneration as HfLlava
from twins import LLAMA3, assert_close, tensors

from splitq_jax import models

VOCABULARY, IMAGE = 320, 300


def reference(tower: str = "clip", size: int = 8, text: dict[str, Any] | None = None, seed: int = 0, **top: Any) -> Any:
    """A random model; biases and norms are random too, which transformers starts at 0 and 1."""
    torch.manual_seed(seed)
    kind = CLIPVisionConfig if tower == "clip" else SiglipVisionConfig
    vision = kind(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, image_size=size, patch_size=4)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 56, "num_hidden_layers": 2}
    decoder = LlamaConfig(vocab_size=VOCABULARY, **(sizes | (text or {})))
    model = HfLlava(HfConfig(vision_config=vision, text_config=decoder, image_token_index=IMAGE, **top)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    return model


def load(hf: Any, folder: Path) -> tuple[Any, Any]:
    hf.save_pretrained(folder)
    return models.load(folder)


def batch_of(model: Any, counts: list[int], pad: list[int], side: str = "left", length: int = 8) -> dict[str, np.ndarray]:
    """Rows with ``counts`` images each, text around them, and ``pad`` tokens of padding."""
    rng = np.random.default_rng(0)
    rows = []
    for count in counts:
        row = list(rng.integers(3, IMAGE, 3))
        for _ in range(count):
            row += [IMAGE] * model.config.tokens_per_image + list(rng.integers(3, IMAGE, 2))
        rows.append(row + list(rng.integers(3, IMAGE, length)))
    width = max(len(r) + p for r, p in zip(rows, pad, strict=True))
    empty = [width - len(r) for r in rows]
    put = (lambda r, e, fill: [fill] * e + r) if side == "left" else (lambda r, e, fill: r + [fill] * e)
    batch = {
        "input_ids": np.array([put(r, e, 0) for r, e in zip(rows, empty, strict=True)], np.int32),
        "attention_mask": np.array([put([True] * len(r), e, False) for r, e in zip(rows, empty, strict=True)]),
    }
    if sum(counts):
        size = model.config.vision.image_size
        batch["pixel_values"] = rng.standard_normal((sum(counts), 3, size, size), np.float32)
    return batch


def logits(model: Any, params: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, b: model.apply({"params": p}, **b))(params, batch))


CASES: dict[str, dict[str, Any]] = {
    "clip-gqa-uneven-image": {"size": 11, "text": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}},
    "clip-tied-mha-bias-full-linear": {
        "tie_word_embeddings": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text": {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
        },
    },
    "siglip-seven-to-one-head-dim-llama3": {
        "tower": "siglip",
        "vision_feature_select_strategy": "full",
        "text": {"hidden_size": 42, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 8, "rope_parameters": LLAMA3},
    },
    "siglip-tied-layers-uneven-no-projector-bias": {
        "tower": "siglip",
        "size": 14,
        "vision_feature_layer": [-1, 1, -2],
        "multimodal_projector_bias": False,
        "text": {"tie_word_embeddings": True, "hidden_act": "gelu", "rms_norm_eps": 1e-3},
    },
    "clip-positive-layers": {"vision_feature_layer": [0, 2], "projector_hidden_act": "relu"},
}


@pytest.mark.parametrize(("case", "side"), [*((case, "left") for case in CASES), ("clip-tied-mha-bias-full-linear", "right")])
def test_logits(case: str, side: str, tmp_path: Path) -> None:
    hf = reference(**CASES[case])
    model, params = load(hf, tmp_path / "model")
    batch = batch_of(model, [1, 2, 0], [0, 0, 3], side)
    model.check(batch)
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        theirs = hf(**tensors(batch)).logits.numpy()
    mask = batch["attention_mask"]
    assert_close(logits(model, params, batch)[mask], theirs[mask])


def test_logits_of_text_alone(tmp_path: Path) -> None:
    hf = reference()
    model, params = load(hf, tmp_path / "model")
    batch = batch_of(model, [0, 0], [0, 4])
    with torch.no_grad():
        theirs = hf(**tensors(batch)).logits.numpy()
    mask = batch["attention_mask"]
    ours = logits(model, params, batch)
    assert_close(ours[mask], theirs[mask])
    no_images = batch | {"pixel_values": np.zeros((0, 3, 8, 8), np.float32)}
    model.check(no_images)
    np.testing.assert_array_equal(logits(model, params, no_images), ours)


def test_packed_rows_equal_separate_ones(tmp_path: Path) -> None:
    hf = reference(**CASES["clip-gqa-uneven-image"])
    model, params = load(hf, tmp_path / "model")
    rng = np.random.default_rng(1)
    prefix = [5, 6] + [IMAGE] * model.config.tokens_per_image + [7]
    ends = [list(rng.integers(3, IMAGE, n)) for n in (4, 1, 6)]
    pixels = rng.standard_normal((1, 3, 11, 11), np.float32)
    zero = np.zeros(len(prefix), int)
    packed = {
        "input_ids": np.concatenate([prefix, *ends])[None].astype(np.int32),
        "segments": np.concatenate([zero, *(np.full(len(e), i + 1) for i, e in enumerate(ends))])[None].astype(np.int32),
        "positions": np.concatenate([np.arange(len(prefix)), *(len(prefix) + np.arange(len(e)) for e in ends)])[None].astype(
            np.int32
        ),
        "pixel_values": pixels,
    }
    ours = logits(model, params, packed)[0]
    start = len(prefix)
    for end in ends:
        with torch.no_grad():
            theirs = hf(input_ids=torch.tensor([prefix + end]), pixel_values=torch.tensor(pixels)).logits.numpy()[0]
        assert_close(np.concatenate([ours[: len(prefix)], ours[start : start + len(end)]]), theirs)
        start += len(end)
