"""The published models: their configs, as they lie on the hub, make as many parameters as their weights have."""

from math import prod
from typing import Any

import pytest

from splitq_jax.models.families import model_of
from splitq_jax.models.model import shapes
from splitq_jax.models.names import parameters


def text(layers: int, width: int, inner: int, heads: int, groups: int, vocabulary: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
    }


def qwen2(version: str, decoder: dict[str, Any], tied: bool = False, **vision: Any) -> dict[str, Any]:
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


def qwen3(decoder: dict[str, Any], tied: bool, large: bool) -> dict[str, Any]:
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
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen2-VL-2B": (qwen2("qwen2_vl", text(28, 1536, 8960, 12, 2, 151936), True), 2_208_985_600),
    "Qwen2-VL-7B": (qwen2("qwen2_vl", text(28, 3584, 18944, 28, 4, 152064)), 8_291_375_616),
    "Qwen2-VL-72B": (qwen2("qwen2_vl", text(80, 8192, 29568, 64, 8, 152064)), 73_405_560_320),
    "Qwen2.5-VL-3B": (qwen2("qwen2_5_vl", text(36, 2048, 11008, 16, 2, 151936), True), 3_754_622_976),
    "Qwen2.5-VL-7B": (qwen2("qwen2_5_vl", text(28, 3584, 18944, 28, 4, 152064)), 8_292_166_656),
    "Qwen2.5-VL-32B": (qwen2("qwen2_5_vl", text(64, 5120, 27648, 40, 8, 152064), intermediate_size=3456), 33_452_718_336),
    "Qwen2.5-VL-72B": (qwen2("qwen2_5_vl", text(80, 8192, 29568, 64, 8, 152064), intermediate_size=3456), 73_410_777_344),
    "Qwen3-VL-2B": (qwen3(text(28, 2048, 6144, 16, 8, 151936), True, False), 2_127_532_032),
    "Qwen3-VL-4B": (qwen3(text(36, 2560, 9728, 32, 8, 151936), True, False), 4_437_815_808),
    "Qwen3-VL-8B": (qwen3(text(36, 4096, 12288, 32, 8, 151936), False, True), 8_767_123_696),
    "Qwen3-VL-32B": (qwen3(text(64, 5120, 25600, 64, 8, 151936), False, True), 33_357_390_064),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_parameters(case: str) -> None:
    config, count = PUBLISHED[case]
    model = model_of(config)
    assert sum(map(prod, shapes(model).values())) == count
    assert parameters(model.table()) == count
