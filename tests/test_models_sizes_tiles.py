"""Published sizes without weights: parameters counted by `jax.eval_shape` and by transformers on torch's meta device."""

from math import prod
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from splitq_jax.models.families import model_of, normalized
from splitq_jax.models.model import shapes

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


def qwen2(width: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        **more,
    }


def internvl(vision: dict[str, Any], *sizes: int, text: str = "qwen2") -> dict[str, Any]:
    vocabulary = 151674 if text == "qwen2" else 92553
    decoder = qwen2(*sizes, vocabulary, **DYNAMIC) | {"model_type": text}
    return {"model_type": "internvl", "vision_config": vision, "text_config": decoder, "tie_word_embeddings": False}


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
        ONEVISION | {"text_config": qwen2(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True)},
        893618208,
    ),
    "llava-onevision-qwen2-7b-ov": (ONEVISION | {"text_config": qwen2(3584, 18944, 28, 28, 4, 152064)}, 8030348832),
    "llava-onevision-qwen2-72b-ov": (ONEVISION | {"text_config": qwen2(8192, 29568, 80, 64, 8, 152064)}, 73180522016),
    "InternVL2_5-2B-MPO": (internvl(VIT_300M, 2048, 8192, 24, 16, 8, text="llama"), 2205754368),
    "InternVL2_5-4B-MPO": (internvl(VIT_300M, 2048, 11008, 36, 16, 2), 3712637952),
    "InternVL2_5-8B-MPO": (internvl(VIT_300M, 4096, 14336, 32, 32, 8, text="llama"), 8075365376),
    "InternVL2_5-26B-MPO": (internvl(VIT_6B, 6144, 16384, 48, 48, 8, text="llama"), 25514186112),
    "InternVL3-1B": (internvl(VIT_300M, 896, 4864, 24, 14, 2), 938193024),
    "InternVL3-2B": (internvl(VIT_300M, 1536, 8960, 28, 12, 2), 2088957440),
    "InternVL3-8B": (internvl(VIT_300M, 3584, 18944, 28, 28, 4), 7944373760),
    "InternVL3-14B": (internvl(VIT_300M, 5120, 13824, 48, 40, 8), 15117256704),
    "InternVL3-38B": (internvl(VIT_6B, 5120, 27648, 64, 40, 8), 38388164992),
    "InternVL3-78B": (internvl(VIT_6B, 8192, 29568, 80, 64, 8), 78408318336),
}


@pytest.mark.parametrize("case", list(CASES))
def test_published_sizes(case: str) -> None:
    config, count = CASES[case]
    model = model_of(config)
    whole = normalized(config)
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**whole))
    theirs = {model.spelling.canonical(name): tuple(p.shape) for name, p in hf.named_parameters()}  # tied ones once
    sources = model.table().values()
    read = {name: shape for source in sources for name, shape in zip(source.names, source.shapes, strict=True)}
    unread = {name: shape for name, shape in theirs.items() if model.is_unused(name)}
    assert read | unread == theirs and not read.keys() & unread.keys()
    # LLaVA-1.5 never runs its tower's last block
    assert (len(unread) > 2) == case.startswith(("llava-1.5", "bakllava"))
    assert sum(map(prod, shapes(model).values())) + sum(map(prod, unread.values())) == count
