"""Published configs of Gemma 3, Idefics3 and SmolVLM give the published numbers of parameters, without making any."""

from math import prod
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from splitq_jax.models.families import model_of
from splitq_jax.models.model import shapes
from splitq_jax.models.names import parameters

SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}
BASE = {"hidden_size": 768, "image_size": 512, "model_type": "idefics3", "num_attention_heads": 12, "patch_size": 16}


def gemma3(**text: Any) -> dict[str, Any]:
    common = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    vision = SO400M | {"image_size": 896, "model_type": "siglip_vision_model", "vision_use_head": False}
    return {"model_type": "gemma3", "mm_tokens_per_image": 256, "text_config": common | text, "vision_config": vision}


def idefics3(scale_factor: int, vision: dict[str, Any], kind: str = "idefics3", **text: Any) -> dict[str, Any]:
    llama = {"model_type": "llama", "architectures": ["VLlama3ForCausalLM"], "rms_norm_eps": 1e-5}
    return {"model_type": kind, "scale_factor": scale_factor, "vision_config": vision, "text_config": llama | text}


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "gemma-3-4b": (gemma3(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34), 4_300_079_472),
    "gemma-3-12b": (
        gemma3(
            hidden_size=3840,
            intermediate_size=15360,
            num_hidden_layers=48,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=256,
        ),
        12_187_325_040,
    ),
    "gemma-3-27b": (
        gemma3(
            hidden_size=5376,
            intermediate_size=21504,
            num_hidden_layers=62,
            num_attention_heads=32,
            num_key_value_heads=16,
            head_dim=128,
            query_pre_attn_scalar=168,
        ),
        27_432_406_640,
    ),
    "Idefics3-8B-Llama3": (
        idefics3(
            2,
            SO400M | {"image_size": 364, "model_type": "idefics3"},
            vocab_size=128259,
            hidden_size=4096,
            intermediate_size=14336,
            num_key_value_heads=8,
            rope_theta=500000.0,
        ),
        8_462_086_384,
    ),
    "SmolVLM-256M": (
        idefics3(
            4,
            BASE,
            vocab_size=49280,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            rope_theta=100000.0,
        ),
        256_484_928,
    ),
    "SmolVLM-500M": (
        idefics3(
            4,
            BASE,
            vocab_size=49280,
            hidden_size=960,
            intermediate_size=2560,
            num_attention_heads=15,
            num_key_value_heads=5,
            rope_theta=100000.0,
        ),
        507_482_304,
    ),
    "SmolVLM-2.2B": (
        idefics3(
            3,
            SO400M | {"image_size": 384, "model_type": "idefics3"},
            vocab_size=49155,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            rope_theta=130000.0,
        ),
        2_246_272_880,
    ),
    "SmolVLM2-2.2B": (
        idefics3(
            3,
            SO400M | {"image_size": 384, "model_type": "smolvlm_vision"},
            "smolvlm",
            vocab_size=49280,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            rope_theta=130000.0,
        ),
        2_246_784_880,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_published_sizes(case: str) -> None:
    config, count = CASES[case]
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    assert sum(p.numel() for p in hf.parameters()) == count
    model = model_of(config)
    assert parameters(model.table()) == count
    assert sum(map(prod, shapes(model).values())) == count
