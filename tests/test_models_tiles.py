"""LLaVA-OneVision, InternVL, and LLaVA with other towers and decoders, against transformers' own, tiny and random, on torch's CPU."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
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
from splitq_jax.errors import InputError

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
PINPOINTS = [[8, 8], [8, 16], [8, 24], [16, 8], [16, 16], [24, 8], [24, 24]]


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


def tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {k: torch.tensor(v) if v.dtype == np.float32 else torch.tensor(v).long() for k, v in batch.items()}


def logits(model: Any, params: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, b: model.apply({"params": p}, **b))(params, model.prepare(batch)))


def assert_equal(hf: Any, model: Any, params: Any, batch: dict[str, np.ndarray]) -> None:
    mask = batch["attention_mask"]
    with torch.no_grad():
        theirs = hf(**tensors(batch)).logits.numpy()[mask]
    ours = logits(model, params, batch)[mask]
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 0.5
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def assert_answers_equal(hf: Any, model: Any, params: Any, batch: dict[str, np.ndarray], tokens: int = 32) -> None:
    theirs = hf.generate(**tensors(batch), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs = theirs.numpy()[:, batch["input_ids"].shape[1] :]
    assert len(np.unique(theirs)) > 3
    np.testing.assert_array_equal(np.stack(models.generate(model, params, batch, tokens)), theirs)


def onevision_batch(hf: Any, sizes: list[list[tuple[int, int]]], videos: list[int], pad: list[int], frames: int = 2) -> Any:
    """A batch of samples with images of ``sizes`` and so many ``videos`` each; transformers says how many features they have."""
    rng = np.random.default_rng(1)
    side, flat = hf.config.vision_config.image_size, [size for row in sizes for size in row]
    pictures: dict[str, np.ndarray] = {}
    counts, video = [], 0
    if flat:
        best = max(a * b // side**2 for a, b in hf.config.image_grid_pinpoints)
        pictures["pixel_values"] = rng.standard_normal((len(flat), 1 + best, 3, side, side), np.float32)
        pictures["image_sizes"] = np.array(flat)
        pictures["batch_num_images"] = np.array([len(row) for row in sizes if row])
        with torch.no_grad():
            counts = [len(rows) for rows in hf.model.get_image_features(**tensors(pictures)).pooler_output]
    if sum(videos):
        pictures["pixel_values_videos"] = rng.standard_normal((sum(videos), frames, 3, side, side), np.float32)
        with torch.no_grad():
            video = hf.model.get_video_features(tensors(pictures)["pixel_values_videos"]).pooler_output.shape[1]
    left = iter(counts)
    rows = [[(IMAGE, next(left)) for _ in row] + [(VIDEO, video)] * n for row, n in zip(sizes, videos, strict=True)]
    rows = [row[::-1] for row in rows]  # videos first, so that the order of the placeholders is not that of the features
    return rows_of(rows, pad) | pictures


ONEVISION: dict[str, dict[str, Any]] = {
    "qwen2-shrunk": {
        "tower": "siglip",
        "decoder": "qwen2",
        "vision": {"image_size": 8, "patch_size": 2},
        "text": {"hidden_size": 48, "num_attention_heads": 6},
        "image_grid_pinpoints": PINPOINTS,
        "vision_aspect_ratio": "anyres_max_2",
    },
    "odd-grid-tied-seven-to-one-no-projector-bias": {
        "tower": "siglip",
        "decoder": "qwen2",
        "vision": {"image_size": 8, "patch_size": 3, "vision_use_head": False},
        "text": {"hidden_size": 42, "num_attention_heads": 7, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "image_grid_pinpoints": PINPOINTS,
        "multimodal_projector_bias": False,
        "vision_feature_layer": [-1, 1],
    },
    "clip-llama-tied-at-the-top": {
        "tower": "clip",
        "decoder": "llama",
        "vision": {"image_size": 8, "patch_size": 4},
        "text": {"num_key_value_heads": 4},
        "image_grid_pinpoints": PINPOINTS,
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -2,
        "vision_aspect_ratio": "anyres_max_1",
        "tie_word_embeddings": True,
        "projector_hidden_act": "relu",
    },
}


@pytest.fixture(scope="module", params=list(ONEVISION))
def onevision(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    hf = reference("llava_onevision", **ONEVISION[request.param])
    return hf, *load(hf, tmp_path_factory.mktemp("onevision") / "model")


def test_onevision_logits(onevision: Any) -> None:
    hf, model, params = onevision
    sizes = [[(20, 33)], [], [(31, 9), (8, 8)], [(7, 90)], [(50, 11)]]
    batch = onevision_batch(hf, sizes, [0, 1, 0, 0, 1], [0, 3, 0, 1, 0], frames=3)
    assert not batch["attention_mask"].all()
    assert_equal(hf, model, params, batch)
    assert_equal(hf, model, params, onevision_batch(hf, [[], []], [0, 0], [0, 4]))


def test_onevision_answers(onevision: Any) -> None:
    hf, model, params = onevision
    assert_answers_equal(hf, model, params, onevision_batch(hf, [[(20, 33)], [(31, 9), (8, 8)]], [0, 1], [4, 0]))
