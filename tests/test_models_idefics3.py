"""Idefics3 and SmolVLM against transformers' own, tiny and random, on torch's CPU."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import Idefics3Config as HfConfig
from transformers import Idefics3ForConditionalGeneration as HfIdefics3
from transformers import SmolVLMConfig as HfSmolConfig
from transformers import SmolVLMForConditionalGeneration as HfSmolVLM
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings
from twins import LLAMA3, assert_same_answers, assert_same_logits, load, logits, padded, randomize

from splitq_jax.errors import InputError
from splitq_jax.models.convert import export
from splitq_jax.models.idefics3 import Idefics3, patch_positions

VOCABULARY, IMAGE = 320, 300
# tile: its side in pixels, where it is not the tower's
CASES: dict[str, dict[str, Any]] = {
    "idefics3-three-to-one-llama3": {
        "kind": "idefics3",
        "image_size": 25,
        "text": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "rope_parameters": LLAMA3},
    },
    "smolvlm-seven-to-one-tied-bias": {
        "kind": "smolvlm",
        "image_size": 36,
        "scale_factor": 3,
        "tie_word_embeddings": True,
        "vision": {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
        "text": {
            "hidden_size": 42,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "attention_bias": True,
            "mlp_bias": True,
        },
    },
    "idefics3-small-tiles-on-an-odd-grid-mistral-window": {
        "kind": "idefics3",
        "image_size": 28,
        "tile": 17,
        "text": {"model_type": "mistral", "sliding_window": 6, "num_key_value_heads": 4},
    },
    "smolvlm-large-tiles-qwen2": {
        "kind": "smolvlm",
        "image_size": 12,
        "tile": 16,
        "scale_factor": 1,
        "text": {"model_type": "qwen2"},
    },
    "idefics3-qwen3": {"kind": "idefics3", "image_size": 16, "text": {"model_type": "qwen3", "head_dim": 10}},
}


def reference(kind: str, text: dict[str, Any], image_size: int, vision: dict[str, Any] | None = None, **top: Any) -> Any:
    top.pop("tile", None)
    tower = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 56}
    decoder = {"model_type": "llama", "vocab_size": VOCABULARY, "num_hidden_layers": 2, "pad_token_id": 0} | sizes | text
    config, model = {"idefics3": (HfConfig, HfIdefics3), "smolvlm": (HfSmolConfig, HfSmolVLM)}[kind]
    parts = {"vision_config": tower | {"image_size": image_size} | (vision or {}), "text_config": decoder}
    return randomize(model(config(**(parts | {"image_token_id": IMAGE} | top))))


def batch_of(model: Any, rows: list[list[int]], padding: list[int], side: str = "left", tile: int | None = None) -> dict[str, Any]:
    """Rows as the processor makes them: a number is so much text, 0 a tile, of which only a corner may be seen."""
    rng, c = np.random.default_rng(0), model.config
    size = tile or c.vision.image_size
    count = (size // c.vision.patch_size // c.scale_factor) ** 2
    tokens = [[t for n in row for t in ([IMAGE] * count if n == 0 else rng.integers(3, IMAGE, n).tolist())] for row in rows]
    batch = padded(tokens, padding, side)
    tiles = [row.count(0) for row in rows]
    pixels = np.zeros((len(rows), max(tiles), 3, size, size), np.float32)
    mask = np.zeros((len(rows), max(tiles), size, size), int)
    for i, number in enumerate(tiles):
        for j in range(number):
            height, width = (size, size) if j == 0 else rng.integers(1, size + 1, 2)
            pixels[i, j, :, :height, :width] = rng.standard_normal((3, height, width))
            mask[i, j, :height, :width] = 1
    return batch | {"pixel_values": pixels, "pixel_attention_mask": mask}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_answers(case: str, tmp_path: Path) -> None:
    hf = reference(**CASES[case])
    model, params = load(hf, tmp_path / "model")
    given = {"rows": [[9], [3, 0, 1], [2, 0, 0, 3, 0, 5]], "padding": [4, 0, 1], "tile": CASES[case].get("tile")}
    batch = batch_of(model, **given)
    assert_same_logits(hf, model, params, batch)
    assert_same_logits(hf, model, params, batch_of(model, **given, side="right"))
    assert_same_logits(hf, model, params, {name: value for name, value in batch.items() if name != "pixel_attention_mask"})
    if "to-one" in case or "window" in case:
        assert_same_answers(hf, model, params, batch)
    text = {name: value[:1] for name, value in batch.items() if not name.startswith("pixel")}
    assert_same_logits(hf, model, params, text)


def test_pictures_of_several_sizes(tmp_path: Path) -> None:
    hf = reference(**CASES["smolvlm-seven-to-one-tied-bias"])
    model, params = load(hf, tmp_path / "model")
    processor = Idefics3ImageProcessorPil(size={"longest_edge": 72}, max_image_size={"longest_edge": 36})
    sizes = [[(30, 40), (90, 20)], [(8, 9)]]
    rng = np.random.default_rng(0)
    images = [[Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in row] for row in sizes]
    made = processor(images, return_tensors="np", return_row_col_info=True)
    assert made["pixel_values"].shape == (2, 8, 3, 36, 36) and made["rows"] == [[2, 2], [2]] and made["cols"] == [[2, 1], [2]]
    batch = batch_of(model, [[2, *[0] * 5, 2, *[0] * 3], [1, *[0] * 5]], [0, 0])
    batch |= {name: np.asarray(made[name]) for name in ("pixel_values", "pixel_attention_mask")}
    assert_same_logits(hf, model, params, batch)


def test_a_tile_of_zeros_is_none_but_for_smolvlm_where_all_are(tmp_path: Path) -> None:
    for case, tiles in (("smolvlm-large-tiles-qwen2", 1), ("idefics3-qwen3", 0)):
        hf = reference(**CASES[case])
        model, params = load(hf, tmp_path / case)
        batch = batch_of(model, [[2, 0, 3]], [0])
        batch["pixel_values"] *= 0
        if tiles:
            assert_same_logits(hf, model, params, batch)
        else:
            with pytest.raises(InputError, match="sample 0 has 4 image placeholders; its tiles take 0"):
                model.prepare(batch)
            text = {"input_ids": batch["input_ids"][:, -3:]}
            no_image = text | {"pixel_values": batch["pixel_values"]}
            np.testing.assert_array_equal(logits(model, params, no_image), logits(model, params, text))


@pytest.mark.parametrize("grid", [1, 2, 19, 25, 26, 27, 32, 41, 64])
def test_positions_are_rounded_as_torch_does(grid: int) -> None:
    tower = Idefics3VisionEmbeddings(
        Idefics3VisionConfig(hidden_size=1, image_size=grid, patch_size=1, num_channels=1, num_attention_heads=1)
    )
    with torch.no_grad():
        tower.patch_embedding.weight.zero_()
        tower.patch_embedding.bias.zero_()
        tower.position_embedding.weight.copy_(torch.arange(grid**2.0)[:, None])
    rng = np.random.default_rng(grid)
    for rows, columns in ((grid, grid), (grid, 2 * grid + 1), (max(1, grid // 2), grid + 3)):
        valid = np.ones((9, rows, columns), bool)
        for mask in valid[1:]:
            mask[rng.integers(1, rows + 1) :] = False
            mask[:, rng.integers(1, columns + 1) :] = False
        theirs = tower(torch.zeros(9, 1, rows, columns), torch.tensor(valid))[..., 0].detach().numpy()
        np.testing.assert_array_equal(patch_positions(valid, grid).reshape(9, -1), theirs)


def test_older_configs() -> None:
    config = reference(**CASES["idefics3-qwen3"]).config.to_dict()
    named = config | {"vision_config": config["vision_config"] | {"model_type": "idefics3", "max_image_size": {"longest_edge": 16}}}
    assert Idefics3.from_hf(named).config == Idefics3.from_hf(config).config


def test_export_gives_back_the_files(tmp_path: Path) -> None:
    source = tmp_path / "model"
    _, params = load(reference(**CASES["smolvlm-seven-to-one-tied-bias"]), source)
    export(tmp_path / "out", json.loads((source / "config.json").read_text()), params, {})
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "model"))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_refusals() -> None:
    config = reference(**CASES["idefics3-qwen3"]).config.to_dict()
    for change, message in (
        ({"text_config": config["text_config"] | {"model_type": "gemma3_text"}}, "gemma3_text"),
        ({"scale_factor": 0}, "scale_factor=0"),
        ({"model_type": "idefics2"}, "idefics2"),
        ({"vision_config": {"num_attention_heads": 5, "hidden_size": 24}}, "5 heads"),
    ):
        with pytest.raises(InputError, match=message):
            Idefics3.from_hf(config | change)
    model = Idefics3.from_hf(config)
    batch = batch_of(model, [[2, 0], [2, 0, 0]], [0, 0])
    pixels, mask = batch["pixel_values"], batch["pixel_attention_mask"]
    for change, message in (
        ({"pixel_values": pixels[:1], "pixel_attention_mask": mask[:1]}, "pixel_values: shape"),
        ({"pixel_values": pixels[::-1], "pixel_attention_mask": mask[::-1]}, "sample 0 has 4 image placeholders; its tiles take 8"),
        ({"pixel_values": None}, "its tiles take 0"),
        ({"pixel_values": pixels[..., :12], "pixel_attention_mask": mask[..., :12]}, "tiles of 4 x 3 patches"),
        ({"pixel_values": pixels[..., :3, :]}, "tiles of 0 x 4 patches"),
        ({"pixel_attention_mask": mask[..., :12]}, "pixel_attention_mask: shape"),
        ({"pixel_attention_mask": 0 * mask}, "shows nothing"),
        ({"pixel_values": pixels * np.nan}, "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            model.prepare(batch | change)
