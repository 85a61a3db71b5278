"""InternVL, and LLaVA with other towers and decoders, against transformers' own, tiny and random, on torch's CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import change_json
from tile_reference import IMAGE, load, reference, rows_of
from twins import assert_same_answers, assert_same_logits

from splitq_jax import models
from splitq_jax.errors import InputError
from splitq_jax.models.families import model_of

MASKED = "llama-rms-qk-norm-last-norm-mask-token-tied-uneven"

INTERNVL: dict[str, dict[str, Any]] = {
    "qwen2-odd-grid-bias-seven-to-one": {
        "decoder": "qwen2",
        "vision": {"image_size": 12, "patch_size": 2, "attention_bias": True},
        "text": {"hidden_size": 42, "num_attention_heads": 7, "num_key_value_heads": 1},
        "tie_word_embeddings": False,
    },
    MASKED: {
        "decoder": "llama",
        "vision": {
            "image_size": 13,
            "patch_size": 3,
            "norm_type": "rms_norm",
            "use_qk_norm": True,
            "use_mean_pooling": False,
            "use_mask_token": True,
            "layer_norm_eps": 1e-2,
        },
        "text": {"hidden_size": 48, "num_attention_heads": 6, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    },
    "qwen3-inner-layer-no-positions-quarter": {
        "decoder": "qwen3",
        "vision": {"image_size": 16, "patch_size": 2, "use_absolute_position_embeddings": False, "use_mean_pooling": False},
        "text": {"head_dim": 12, "num_key_value_heads": 4},
        "vision_feature_layer": -2,
        "downsample_ratio": 0.25,
        "projector_hidden_act": "silu",
    },
    "whole-tower-without-its-norm-no-shuffle": {
        "decoder": "mistral",
        "vision": {"image_size": 6, "patch_size": 2, "use_mean_pooling": False, "hidden_act": "relu"},
        "text": {"sliding_window": 9, "head_dim": 10},
        "vision_feature_layer": 3,
        "downsample_ratio": 1.0,
        "tie_word_embeddings": False,
    },
}
LLAVA: dict[str, dict[str, Any]] = {
    "clip-mistral-window": {
        "tower": "clip",
        "decoder": "mistral",
        "vision": {"image_size": 14, "patch_size": 4},
        "text": {"sliding_window": 7, "head_dim": 10},
        "vision_feature_layer": [-2, -3, 3],
    },
    "siglip-qwen2-windows-of-some-layers": {
        "tower": "siglip",
        "decoder": "qwen2",
        "vision": {"image_size": 12, "patch_size": 4},
        "text": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "tie_word_embeddings": True},
        "vision_feature_layer": 2,
    },
    "clip-qwen3-full": {
        "tower": "clip",
        "decoder": "qwen3",
        "vision": {"image_size": 9, "patch_size": 3, "hidden_act": "gelu"},
        "text": {"head_dim": 6, "attention_bias": True},
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    },
}


def fixed_batch(hf: Any, tokens: int, counts: list[int], pad: list[int]) -> dict[str, np.ndarray]:
    """Samples with so many images of one size each."""
    batch = rows_of([[(IMAGE, tokens)] * count for count in counts], pad)
    size = np.max(hf.config.vision_config.image_size)
    pixels = np.random.default_rng(2).standard_normal((sum(counts), 3, size, size), np.float32)
    return batch | ({"pixel_values": pixels} if sum(counts) else {})


@pytest.mark.parametrize("case", [*INTERNVL, *LLAVA])
def test_logits_of_fixed_images(case: str, tmp_path: Path) -> None:
    family = "internvl" if case in INTERNVL else "llava"
    hf = reference(family, **({"tower": "internvit"} | (INTERNVL | LLAVA)[case]))
    model, params = load(hf, tmp_path / "model")
    batch = fixed_batch(hf, model.config.tokens_per_image, [1, 3, 0], [0, 0, 3])
    assert_same_logits(hf, model, params, batch)
    if case in (MASKED, "clip-mistral-window"):
        assert_same_answers(hf, model, params, batch)
    if case == MASKED:
        assert_same_logits(hf, model, params, fixed_batch(hf, model.config.tokens_per_image, [0, 0], [0, 4]))


def test_internvl_ties_as_the_text_does_where_the_top_is_silent(tmp_path: Path) -> None:
    case = INTERNVL["qwen2-odd-grid-bias-seven-to-one"]
    for tied in (False, True):
        text = case["text"] | {"tie_word_embeddings": tied}
        hf = reference("internvl", "internvit", **(case | {"text": text, "tie_word_embeddings": tied}))
        folder = tmp_path / str(tied)
        hf.save_pretrained(folder)
        change_json(folder / "config.json", lambda config: config.pop("tie_word_embeddings"))
        model, params = models.load(folder)
        assert model.config.tied == tied and ("head" in params["decoder"]) != tied


def test_internvl_refuses(tmp_path: Path) -> None:
    hf = reference("internvl", "internvit", **INTERNVL[MASKED])
    config = hf.config.to_dict()

    bad: dict[str, dict[str, Any]] = {
        r"vision image_size \[8, 16\]; only squares": {"vision_config": {"image_size": [8, 16]}},
        r"vision patch_size \[2, 4\]; only squares": {"vision_config": {"patch_size": [2, 4]}},
        "vision norm_type 'batch_norm'": {"vision_config": {"norm_type": "batch_norm"}},
        "vision hidden_size 24 is no multiple of its 5 heads": {"vision_config": {"num_attention_heads": 5}},
        "vision patch_size 14 is larger": {"vision_config": {"patch_size": 14}},
        "text model_type 'olmo2'": {"text_config": {"model_type": "olmo2"}},
        "max_position_embeddings": {"text_config": {"max_position_embeddings": 0}},
        "vision_feature_layer 4": {"vision_feature_layer": 4},
        r"vision_feature_layer \[1\]": {"vision_feature_layer": [1]},
        "vision_feature_select_strategy 'full'": {"vision_feature_select_strategy": "full"},
        "downsample_ratio 0.3": {"downsample_ratio": 0.3},
        "4 patches along a side are no multiple of 8": {"downsample_ratio": 0.125},
        "image_token_id -1": {"image_token_id": -1},
    }
    for message, change in bad.items():
        whole = {name: config[name] | value if isinstance(value, dict) else value for name, value in change.items()}
        with pytest.raises(InputError, match=message):
            model_of(config | whole)
    short = model_of(config | {"text_config": config["text_config"] | {"max_position_embeddings": 20}})
    batch = fixed_batch(hf, short.config.tokens_per_image, [0, 0], [4, 0])
    short.prepare({name: value[:, -20:] for name, value in batch.items()})
    with pytest.raises(InputError, match="21 tokens: the dynamic rotary embedding is supported up to max_position_embeddings, 20"):
        short.prepare({name: np.pad(value, ((0, 0), (21 - value.shape[1], 0))) for name, value in batch.items()})
