"""Gemma 3 against transformers' own, tiny and random, on torch's CPU."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import Gemma3Config as HfConfig
from transformers import Gemma3ForConditionalGeneration as HfGemma3
from transformers import Gemma3TextConfig, SiglipVisionConfig
from twins import assert_same_answers, assert_same_logits, load, logits, padded, randomize

from splitq_jax import models
from splitq_jax.errors import InputError
from splitq_jax.models.decoder import causal_mask

VOCABULARY, IMAGE = 320, 300
FULL, SLIDING = "full_attention", "sliding_attention"
CASES: dict[str, dict[str, Any]] = {
    # 7 x 7 patches, of which 6 x 6 become 3 x 3 tokens; the window is smaller than an image
    "three-to-one-odd-grid-untied-bias-linear": {
        "image_size": 30,
        "mm_tokens_per_image": 9,
        "tie_word_embeddings": False,
        "text": {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "query_pre_attn_scalar": 20,
            "sliding_window": 5,
            "attention_bias": True,
            "sliding_window_pattern": 3,
            "num_hidden_layers": 4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_local_base_freq": 100.0,
            "rope_theta": 5000.0,
        },
    },
    # 4 x 4 tokens are asked for and do not fit into 5 x 5 patches, so that there are 25
    "seven-to-one-tied-head-on-tower": {
        "image_size": 20,
        "mm_tokens_per_image": 16,
        "vision": {"vision_use_head": True, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
        "text": {
            "hidden_size": 42,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "hidden_activation": "silu",
            "rms_norm_eps": 1e-3,
            "layer_types": [SLIDING, FULL, SLIDING],
            "sliding_window": 12,
            "num_hidden_layers": 3,
        },
    },
    "one-to-one-all-full": {"text": {"num_key_value_heads": 4, "layer_types": [FULL, FULL]}},
    "all-sliding-vocabulary-without-image-token": {"image_token_index": 400, "text": {"layer_types": [SLIDING] * 2, "sliding_window": 4}},
}


def reference(
    image_size: int = 16, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **top: Any
) -> Any:
    tower = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 56}
    depth = {"num_hidden_layers": 2, "query_pre_attn_scalar": 11, "vocab_size": VOCABULARY}
    config = HfConfig(
        vision_config=SiglipVisionConfig(**({"vision_use_head": False, "image_size": image_size} | tower | (vision or {}))).to_dict(),
        text_config=Gemma3TextConfig(**(sizes | depth | (text or {}))).to_dict(),
        **({"image_token_index": IMAGE, "mm_tokens_per_image": 4} | top),
    )
    return randomize(HfGemma3(config))


def batch_of(model: Any, rows: list[list[int]], padding: list[int], side: str = "left") -> dict[str, np.ndarray]:
    """Rows as the processor makes them; a number is so much text, 0 an image."""
    rng, c = np.random.default_rng(0), model.config
    tokens = [
        [t for n in row for t in ([c.image_token_id] * c.tokens_per_image if n == 0 else rng.integers(3, IMAGE, n).tolist())] for row in rows
    ]
    batch = padded(tokens, padding, side)
    batch["token_type_ids"] = (batch["input_ids"] == c.image_token_id).astype(int)
    if images := sum(row.count(0) for row in rows):
        shape = (images, 3, c.vision.image_size, c.vision.image_size)
        batch["pixel_values"] = rng.standard_normal(shape, np.float32)
    return batch


@pytest.mark.parametrize("case", CASES)
def test_logits_and_answers(case: str, tmp_path: Path) -> None:
    hf = reference(**CASES[case])
    model, params = load(hf, tmp_path / "model")
    # text only; an image at the end; two images, the second right after the first; images around text, more of it than a window
    rows = [[9], [3, 0, 1], [2, 0, 0, 2], [0, 15, 0, 4]]
    batch = batch_of(model, rows, [4, 0, 1, 0])
    assert_same_logits(hf, model, params, batch)
    assert_same_logits(hf, model, params, batch_of(model, rows, [4, 0, 1, 0], "right"))
    assert_same_answers(hf, model, params, batch)
