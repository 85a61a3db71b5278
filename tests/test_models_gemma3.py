"""Gemma 3 against transformers' own, tiny and random, on torch's CPU."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from folders import change_tensors, copy, same
from PIL import Image
from safetensors.numpy import load_file
from transformers import Gemma3Config as HfConfig
from transformers import Gemma3ForConditionalGeneration as HfGemma3
from transformers import Gemma3TextConfig, SiglipVisionConfig
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from twins import assert_same_answers, assert_same_logits, load, logits, padded, randomize

from splitq_jax import models
from splitq_jax.errors import InputError
from splitq_jax.models.convert import export
from splitq_jax.models.decoder import causal_mask
from splitq_jax.models.gemma3 import Gemma3

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
    "all-sliding-vocabulary-without-image-token": {
        "image_token_index": 400,
        "text": {"layer_types": [SLIDING] * 2, "sliding_window": 4},
    },
}


def reference(image_size: int = 16, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **top: Any) -> Any:
    tower = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 56}
    depth = {"num_hidden_layers": 2, "query_pre_attn_scalar": 11, "vocab_size": VOCABULARY}
    config = HfConfig(
        vision_config=SiglipVisionConfig(
            **({"vision_use_head": False, "image_size": image_size} | tower | (vision or {}))
        ).to_dict(),
        text_config=Gemma3TextConfig(**(sizes | depth | (text or {}))).to_dict(),
        **({"image_token_index": IMAGE, "mm_tokens_per_image": 4} | top),
    )
    return randomize(HfGemma3(config))


def batch_of(model: Any, rows: list[list[int]], padding: list[int], side: str = "left") -> dict[str, np.ndarray]:
    """Rows as the processor makes them; a number is so much text, 0 an image."""
    rng, c = np.random.default_rng(0), model.config
    tokens = [
        [t for n in row for t in ([c.image_token_id] * c.tokens_per_image if n == 0 else rng.integers(3, IMAGE, n).tolist())]
        for row in rows
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
    if model.config.text.window in (5, 12):
        assert_same_answers(hf, model, params, batch)


def test_text_alone(tmp_path: Path) -> None:
    case = "three-to-one-odd-grid-untied-bias-linear"
    hf = reference(**CASES[case])
    model, params = load(hf, tmp_path / "model")
    batch = batch_of(model, [[23], [7]], [0, 0])
    assert_same_logits(hf, model, params, batch)
    bare = {name: value for name, value in batch.items() if name != "token_type_ids"}
    np.testing.assert_array_equal(logits(model, params, bare), logits(model, params, batch))


def test_token_types_may_be_left_out(tmp_path: Path) -> None:
    model, params = load(reference(), tmp_path / "model")
    batch = batch_of(model, [[2, 0, 3]], [0])
    bare = {name: value for name, value in batch.items() if name != "token_type_ids"}
    np.testing.assert_array_equal(logits(model, params, bare), logits(model, params, batch))
    with pytest.raises(InputError, match="token_type_ids: expected 1 where"):
        model.prepare(batch | {"token_type_ids": 0 * batch["token_type_ids"]})


def test_crops_are_further_images(tmp_path: Path) -> None:
    hf = reference(image_size=12)
    model, params = load(hf, tmp_path / "model")
    crop = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8, "pan_and_scan_max_num_crops": 4}
    processor = Gemma3ImageProcessorPil(size={"height": 12, "width": 12}, pan_and_scan_min_ratio_to_activate=1.2, **crop)
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8))
        for i, size in enumerate([(16, 40), (9, 9)])
    ]
    made = processor(images, return_tensors="np")
    assert made["num_crops"].tolist() == [3, 0]
    batch = batch_of(model, [[2, 0, 3, 0, 1, 0, 1, 0], [1, 0, 4]], [0, 0]) | {"pixel_values": np.asarray(made["pixel_values"])}
    assert_same_logits(hf, model, params, batch)
    assert "num_crops" not in model.prepare(batch | {"num_crops": made["num_crops"]})


def test_packed_rows_equal_separate_ones(tmp_path: Path) -> None:
    model, params = load(reference(text={"sliding_window": 64}), tmp_path / "model")
    first, second = (batch_of(model, [[2, 0, 3, *end]], [0]) for end in ([5], [4]))
    length = 5 + model.config.tokens_per_image
    ends = [batch["input_ids"][0, length:] for batch in (first, second)]
    packed = {
        "input_ids": np.concatenate([first["input_ids"][0, :length], *ends])[None],
        "segments": np.repeat([0, 1, 2], [length, 5, 4])[None],
        "pixel_values": first["pixel_values"],
    }
    both = logits(model, params, packed)[0]
    for batch, of_end in ((first, both[length : length + 5]), (second, both[length + 5 :])):
        single = {"input_ids": np.concatenate([first["input_ids"][0, :length], batch["input_ids"][0, length:]])[None]}
        alone = logits(model, params, single | {"pixel_values": first["pixel_values"]})[0]
        np.testing.assert_allclose(of_end, alone[length:], rtol=0, atol=1e-5 * np.abs(alone).max())


def test_images_see_both_ways_within_the_window() -> None:
    valid = jnp.asarray([[False, True, True, True, True, True]])
    full, near = causal_mask(valid, window=2, together=jnp.asarray([[-1, -1, 1, 1, 1, -1]]))[0].astype(int).tolist()
    assert full == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1],
    ]
    assert near == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize(
    "spelled",
    [
        lambda name: name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head"),
        lambda name: name.replace("vision_tower.", "model.vision_tower.vision_model."),
    ],
)
def test_other_spellings(spelled: Any, tmp_path: Path) -> None:
    source = tmp_path / "model"
    _, params = load(reference(tie_word_embeddings=False), source)
    other = copy(source, tmp_path / "other")

    def rename(tensors: dict[str, np.ndarray]) -> None:
        renamed = {spelled(name): value for name, value in tensors.items()}
        assert renamed.keys() != tensors.keys()
        tensors.clear()
        tensors.update(renamed)

    assert same(models.load(change_tensors(other, rename))[1], params)


def test_export_gives_back_the_files(tmp_path: Path) -> None:
    source = tmp_path / "model"
    _, params = load(reference(), source)
    export(tmp_path / "out", json.loads((source / "config.json").read_text()), params, {})
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "model"))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_refusals(tmp_path: Path) -> None:
    config = reference().config.to_dict()
    for change, message in (
        ({"text_config": config["text_config"] | {"use_bidirectional_attention": True}}, "use_bidirectional_attention"),
        ({"text_config": config["text_config"] | {"final_logit_softcapping": 30.0}}, "final_logit_softcapping"),
        ({"text_config": config["text_config"] | {"query_pre_attn_scalar": 0}}, "query_pre_attn_scalar=0"),
        ({"text_config": config["text_config"] | {"rms_norm_eps": -1.0}}, "rms_norm_eps=-1.0"),
        ({"text_config": config["text_config"] | {"num_hidden_layers": 1 << 40}}, "num_layers=1099511627776"),
        ({"text_config": {"model_type": "llama"}}, "gemma3_text"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "clip_vision_model"),
        ({"mm_tokens_per_image": 25}, "mm_tokens_per_image 25; the vision tower has 16 patches"),
        ({"mm_tokens_per_image": 0}, "mm_tokens_per_image=0"),
    ):
        with pytest.raises(InputError, match=message):
            Gemma3.from_hf(config | change)
    model = Gemma3.from_hf(config)
    batch = batch_of(model, [[2, 0], [2, 0]], [0, 0])
    for change, message in (
        ({"pixel_values": batch["pixel_values"][:1]}, "4, 4 image placeholders a sample with 1 images"),
        ({"pixel_values": batch["pixel_values"][:, :, 1:]}, "expected"),
        ({"pixel_values": None}, "with 0 images"),
        ({"pixel_values": batch["pixel_values"] * np.inf}, "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            model.prepare(batch | change)
    with pytest.raises(InputError, match="head"):
        Gemma3.from_hf(config | {"vision_config": config["vision_config"] | {"vision_use_head": True}}).unread()
