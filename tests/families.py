"""A tiny random model of transformers for each family, saved beside the family's processor."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from processors import VOCABULARY, add_processor, vocabulary

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCH = {"patch_size": 4, "temporal_patch_size": 2, "num_heads": 2, "depth": 2}
ROPE = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [1, 2, 1]}


def config(kind: str) -> Any:
    """The config that goes with the processor's sizes."""
    ids = vocabulary(kind)
    if kind == "llava":
        return hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**TOWER, image_size=16, patch_size=8),
            text_config=hf.LlamaConfig(**TEXT),
            image_token_index=ids["<image>"],
            vision_feature_layer=-1,
        )
    if kind in {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}:
        text, out = TEXT | {"rope_parameters": ROPE}, {"out_hidden_size": 32}
        if kind == "qwen2_vl":
            made, vision = hf.Qwen2VLConfig, {"embed_dim": 16, "mlp_ratio": 2, "hidden_size": 32}
        elif kind == "qwen2_5_vl":
            sizes = {"hidden_size": 16, "intermediate_size": 20, "window_size": 16, "fullatt_block_indexes": [1]}
            made, vision = hf.Qwen2_5_VLConfig, sizes | out
        else:  # heads that together are wider than the tokens
            text |= {"head_dim": 12, "rope_parameters": ROPE | {"mrope_section": [2, 2, 2]}}
            sizes = {"hidden_size": 16, "intermediate_size": 20, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
            made, vision = hf.Qwen3VLConfig, sizes | out
        tokens = {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"]}
        tokens |= {"vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"]}
        return made(text_config=text, vision_config=PATCH | vision, **tokens)
    if kind == "llava_onevision":
        return hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**TOWER, image_size=12, patch_size=4, vision_use_head=False),
            text_config=hf.Qwen2Config(**TEXT),
            image_token_index=ids["<image>"],
            video_token_index=ids["<video>"],
            image_grid_pinpoints=[[12, 12], [12, 24], [24, 12], [24, 24], [12, 36]],
        )
    if kind == "internvl":
        vision = TOWER | {"image_size": [16, 16], "patch_size": [4, 4]}
        return hf.InternVLConfig(
            vision_config=vision,
            text_config={"model_type": "qwen2", **TEXT},
            image_token_id=ids["<IMG_CONTEXT>"],
            image_seq_length=4,
        )
    if kind in {"idefics3", "smolvlm"}:
        made = hf.Idefics3Config if kind == "idefics3" else hf.SmolVLMConfig
        vision = TOWER | {"image_size": 16, "patch_size": 4}
        text = {"model_type": "llama", **TEXT, "pad_token_id": 3}
        return made(vision_config=vision, text_config=text, image_token_id=ids["<image>"], scale_factor=2)
    vision = TOWER | {"image_size": 16, "patch_size": 4, "vision_use_head": False}
    return hf.Gemma3Config(
        vision_config=vision,
        text_config=TEXT | {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 8, "sliding_window_pattern": 2},
        image_token_index=ids["<image_soft_token>"],
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        mm_tokens_per_image=4,
    )


def build(folder: Path, kind: str) -> Path:
    """Save a model, all of whose parameters are random, and its processor."""
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    model.save_pretrained(folder)
    return add_processor(folder, kind)
