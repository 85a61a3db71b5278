"""The published models: their configs, as they lie on the hub, ask for transformers' tensors, by name and shape, and the published number
of parameters. Nothing is made: transformers builds on torch's meta device.
"""

from math import prod
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from splitq_jax.models.families import model_of, normalized
from splitq_jax.models.names import parameters

VICUNA = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
LLAVA = {"model_type": "llava", "vision_config": CLIP, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "patch_size": 14,
    "vision_use_head": False,
}
ONEVISION = {"model_type": "llava_onevision", "vision_config": SIGLIP}
VIT_300M = {"model_type": "internvl_vision", "attention_bias": True}
VIT_6B = {
    "model_type": "internvl_vision",
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "norm_type": "rms_norm",
    "use_qk_norm": True,
}
DYNAMIC = {"rope_theta": 1e6, "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}}


def text(layers: int, width: int, inner: int, heads: int, groups: int, vocabulary: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
    }


def qwen2_text(width: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {"model_type": "qwen2", **text(layers, width, inner, heads, groups, vocabulary), **more}


def internvl(vision: dict[str, Any], *sizes: int, kind: str = "qwen2") -> dict[str, Any]:
    vocabulary = 151674 if kind == "qwen2" else 92553
    decoder = qwen2_text(*sizes, vocabulary, **DYNAMIC) | {"model_type": kind}
    return {"model_type": "internvl", "vision_config": vision, "text_config": decoder, "tie_word_embeddings": False}


SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}
BASE = {"hidden_size": 768, "image_size": 512, "model_type": "idefics3", "num_attention_heads": 12, "patch_size": 16}


def gemma3(**text: Any) -> dict[str, Any]:
    common = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    vision = SO400M | {"image_size": 896, "model_type": "siglip_vision_model", "vision_use_head": False}
    return {"model_type": "gemma3", "mm_tokens_per_image": 256, "text_config": common | text, "vision_config": vision}


def idefics3(scale_factor: int, vision: dict[str, Any], kind: str = "idefics3", **text: Any) -> dict[str, Any]:
    llama = {"model_type": "llama", "architectures": ["VLlama3ForCausalLM"], "rms_norm_eps": 1e-5}
    return {"model_type": kind, "scale_factor": scale_factor, "vision_config": vision, "text_config": llama | text}


def qwen2_vl(version: str, decoder: dict[str, Any], tied: bool = False, **vision: Any) -> dict[str, Any]:
    """Qwen2-VL and Qwen2.5-VL; the decoder's config lies flat in the file."""
    tower = {"model_type": version, "depth": 32, "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2}
    if version == "qwen2_vl":
        tower |= {"embed_dim": 1280, "mlp_ratio": 4, "hidden_size": decoder["hidden_size"]}
    else:
        tower |= {"hidden_size": 1280, "hidden_act": "silu", "out_hidden_size": decoder["hidden_size"], "window_size": 112}
        tower |= {"fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "intermediate_size": 3420}
    return decoder | {
        "model_type": version,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "image_token_id": 151655,
        "video_token_id": 151656,
        "tie_word_embeddings": tied,
        "vision_config": tower | vision,
    }


def qwen3_vl(decoder: dict[str, Any], tied: bool, large: bool) -> dict[str, Any]:
    """Qwen3-VL, with one of its two towers."""
    rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]}
    tower = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    if large:
        tower = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    head = {"model_type": "qwen3_vl_text", "head_dim": 128, "rope_theta": 5000000, "rope_scaling": rope}
    return {
        "model_type": "qwen3_vl",
        "text_config": decoder | head,
        "vision_config": tower | {"model_type": "qwen3_vl", "num_heads": 16, "out_hidden_size": decoder["hidden_size"]},
        "image_token_id": 151655,
        "video_token_id": 151656,
        "tie_word_embeddings": tied,
    }


# by model: config.json, parameters
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "llava-1.5-7b": (LLAVA | {"text_config": VICUNA}, 7063427072),
    "llava-1.5-13b": (
        LLAVA
        | {
            "text_config": VICUNA
            | {
                "hidden_size": 5120,
                "intermediate_size": 13824,
                "num_attention_heads": 40,
                "num_hidden_layers": 40,
                "num_key_value_heads": 40,
            }
        },
        13351494656,
    ),
    "bakllava-v1": (LLAVA | {"text_config": {"model_type": "mistral", "rms_norm_eps": 1e-5, "vocab_size": 32064}}, 7566743552),
    "llava-onevision-qwen2-0.5b-ov": (
        ONEVISION | {"text_config": qwen2_text(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True)},
        893618208,
    ),
    "llava-onevision-qwen2-7b-ov": (ONEVISION | {"text_config": qwen2_text(3584, 18944, 28, 28, 4, 152064)}, 8030348832),
    "llava-onevision-qwen2-72b-ov": (ONEVISION | {"text_config": qwen2_text(8192, 29568, 80, 64, 8, 152064)}, 73180522016),
    "InternVL2_5-2B-MPO": (internvl(VIT_300M, 2048, 8192, 24, 16, 8, kind="llama"), 2205754368),
    "InternVL2_5-4B-MPO": (internvl(VIT_300M, 2048, 11008, 36, 16, 2), 3712637952),
    "InternVL2_5-8B-MPO": (internvl(VIT_300M, 4096, 14336, 32, 32, 8, kind="llama"), 8075365376),
    "InternVL2_5-26B-MPO": (internvl(VIT_6B, 6144, 16384, 48, 48, 8, kind="llama"), 25514186112),
    "InternVL3-1B": (internvl(VIT_300M, 896, 4864, 24, 14, 2), 938193024),
    "InternVL3-2B": (internvl(VIT_300M, 1536, 8960, 28, 12, 2), 2088957440),
    "InternVL3-8B": (internvl(VIT_300M, 3584, 18944, 28, 28, 4), 7944373760),
    "InternVL3-14B": (internvl(VIT_300M, 5120, 13824, 48, 40, 8), 15117256704),
    "InternVL3-38B": (internvl(VIT_6B, 5120, 27648, 64, 40, 8), 38388164992),
    "InternVL3-78B": (internvl(VIT_6B, 8192, 29568, 80, 64, 8), 78408318336),
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
    "Qwen2-VL-2B": (qwen2_vl("qwen2_vl", text(28, 1536, 8960, 12, 2, 151936), True), 2_208_985_600),
    "Qwen2-VL-7B": (qwen2_vl("qwen2_vl", text(28, 3584, 18944, 28, 4, 152064)), 8_291_375_616),
    "Qwen2-VL-72B": (qwen2_vl("qwen2_vl", text(80, 8192, 29568, 64, 8, 152064)), 73_405_560_320),
    "Qwen2.5-VL-3B": (qwen2_vl("qwen2_5_vl", text(36, 2048, 11008, 16, 2, 151936), True), 3_754_622_976),
    "Qwen2.5-VL-7B": (qwen2_vl("qwen2_5_vl", text(28, 3584, 18944, 28, 4, 152064)), 8_292_166_656),
    "Qwen2.5-VL-32B": (qwen2_vl("qwen2_5_vl", text(64, 5120, 27648, 40, 8, 152064), intermediate_size=3456), 33_452_718_336),
    "Qwen2.5-VL-72B": (qwen2_vl("qwen2_5_vl", text(80, 8192, 29568, 64, 8, 152064), intermediate_size=3456), 73_410_777_344),
    "Qwen3-VL-2B": (qwen3_vl(text(28, 2048, 6144, 16, 8, 151936), True, False), 2_127_532_032),
    "Qwen3-VL-4B": (qwen3_vl(text(36, 2560, 9728, 32, 8, 151936), True, False), 4_437_815_808),
    "Qwen3-VL-8B": (qwen3_vl(text(36, 4096, 12288, 32, 8, 151936), False, True), 8_767_123_696),
    "Qwen3-VL-32B": (qwen3_vl(text(64, 5120, 25600, 64, 8, 151936), False, True), 33_357_390_064),
}


@pytest.mark.parametrize("case", CASES)
def test_published_sizes(case: str) -> None:
    config, count = CASES[case]
    model = model_of(config)
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**normalized(config)))
    theirs = {model.spelling.canonical(name): tuple(p.shape) for name, p in hf.named_parameters()}  # tied ones once
    table = model.table()
    read = {name: shape for source in table.values() for name, shape in zip(source.names, source.shapes, strict=True)}
    unread = {name: shape for name, shape in theirs.items() if model.is_unused(name)}
    assert read | unread == theirs and not read.keys() & unread.keys()
    # LLaVA-1.5 never runs its tower's last block
    assert (len(unread) > 2) == case.startswith(("llava-1.5", "bakllava"))
    assert parameters(table) + sum(map(prod, unread.values())) == count
