"""LLaVA-OneVision against transformers' own, tiny and random, on torch's CPU."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from folders import change_tensors, same
from safetensors.numpy import load_file
from test_models_fixed_images import INTERNVL, MASKED
from tile_reference import IMAGE, VIDEO, load, reference, rows_of
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches
from twins import assert_same_answers, assert_same_logits, tensors

from splitq_jax import models
from splitq_jax.errors import InputError

ODD = "odd-grid-tied-seven-to-one-no-projector-bias"
PINPOINTS = [[8, 8], [8, 16], [8, 24], [16, 8], [16, 16], [24, 8], [24, 24]]


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
    ODD: {
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


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Any:
    hf = reference("llava_onevision", **ONEVISION["qwen2-shrunk"])
    return hf, *load(hf, tmp_path_factory.mktemp("onevision") / "model")


SAMPLES: list[list[tuple[int, int]]] = [[(20, 33)], [], [(31, 9), (8, 8)], [(7, 90)], [(50, 11)]]


@pytest.mark.parametrize("case", list(ONEVISION))
def test_onevision_logits(case: str, tmp_path: Path) -> None:
    hf = reference("llava_onevision", **ONEVISION[case])
    model, params = load(hf, tmp_path / "model")
    batch = onevision_batch(hf, SAMPLES, [0, 1, 0, 0, 1], [0, 3, 0, 1, 0], frames=3)
    assert not batch["attention_mask"].all()
    assert_same_logits(hf, model, params, batch)


def test_text_is_what_is_no_placeholder_and_no_padding(onevision: Any) -> None:
    hf, model, params = onevision
    batch = onevision_batch(hf, SAMPLES, [0, 1, 0, 0, 1], [0, 3, 0, 1, 0])
    embed = jax.jit(lambda p, b: model.apply({"params": p}, **b, method="embed").context.is_text)
    text = batch["attention_mask"] & (batch["input_ids"] < IMAGE)
    assert 0 < text.sum() < batch["attention_mask"].sum() < text.size
    np.testing.assert_array_equal(embed(params, model.prepare(batch)), text)


def test_spellings_and_export(onevision: Any, tmp_path: Path) -> None:
    def other(name: str) -> str:
        return name.replace("vision_tower.", "vision_tower.vision_model.") if "encoder.layers.0" in name else f"model.{name}"

    for family, tower, case in (("llava_onevision", "siglip", ONEVISION[ODD]), ("internvl", "internvit", INTERNVL[MASKED])):
        hf = reference(family, tower, **{k: v for k, v in case.items() if k != "tower"})
        folder = tmp_path / family
        model, params = load(hf, folder)
        models.export(tmp_path / f"{family}-out", json.loads((folder / "config.json").read_text()), params, {})
        ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / f"{family}-out", folder))
        assert ours.keys() == theirs.keys()
        assert all((ours[name] == theirs[name]).all() for name in ours if not model.is_unused(name))
        change_tensors(folder, lambda t: [t.update({other(name): t.pop(name)}) for name in sorted(t) if "language" not in name])
        assert "image_newline" not in load_file(folder / "model.safetensors")
        assert same(models.load(folder)[1], params)


def test_onevision_text_and_answers(onevision: Any) -> None:
    hf, model, params = onevision
    assert_same_logits(hf, model, params, onevision_batch(hf, [[], []], [0, 0], [0, 4]))
    assert_same_answers(hf, model, params, onevision_batch(hf, [[(20, 33)], [(31, 9), (8, 8)]], [0, 1], [4, 0]))


def test_tiles_lie_where_transformers_puts_them(onevision: Any) -> None:
    hf = deepcopy(onevision[0].model)
    rng = np.random.default_rng(0)
    shrunk = 0
    for _ in range(12):
        side, most = int(rng.integers(2, 12)), int(rng.integers(1, 6))
        resolutions = (2 * side * rng.integers(1, 6, (6, 2))).tolist()
        hf.config.image_grid_pinpoints, hf.config.vision_config.image_size = resolutions, 2 * side
        config = onevision[1].from_hf(hf.config.to_dict() | {"vision_aspect_ratio": f"anyres_max_{most}"}).config
        for height, width in np.exp(rng.uniform(1, 7, (8, 2))).astype(int).tolist():
            count = image_size_to_num_patches((height, width), resolutions, 2 * side)
            features, newline = torch.randn(count, side**2, 6), torch.randn(6)
            given = [features], torch.tensor([[height, width]]), newline, f"anyres_max_{most}"
            if max(height / width, width / height) > 6:  # nothing may be left of a picture
                try:
                    config.image(height, width)
                except InputError:
                    with pytest.raises(RuntimeError, match="greater than 0"):
                        hf.pack_image_features(*given)
                    continue
            (theirs,), _ = hf.pack_image_features(*given)
            taps, tiles = config.image(height, width)
            assert tiles == count
            rows = np.concatenate([features.reshape(-1, 6).numpy(), newline.numpy()[None]])
            np.testing.assert_allclose((rows[taps.rows] * taps.weights[..., None]).sum(axis=1), theirs.numpy(), atol=2e-6)
            shrunk += bool((taps.weights[:, 1] > 0).any())
        frames = torch.randn(2, side**2, 6)
        taps, _ = config.video(2)
        rows = np.concatenate([frames.reshape(-1, 6).numpy(), np.ones((1, 6), np.float32)])
        ours = (rows[taps.rows] * taps.weights[..., None]).sum(axis=1)
        np.testing.assert_allclose(ours[:-1], hf.apply_pooling(frames).reshape(-1, 6).numpy(), atol=2e-6)
        np.testing.assert_array_equal(ours[-1], 1)
    assert 20 < shrunk < 76


def test_onevision_takes_flat_tiles(onevision: Any) -> None:
    hf, model, _ = onevision
    batch = onevision_batch(hf, SAMPLES, [0] * 5, [0] * 5)
    counts = [model.config.image(*size, alone=len(row) == 1)[1] for row in SAMPLES for size in row]
    tiles = np.concatenate([image[:n] for image, n in zip(batch["pixel_values"], counts, strict=True)])
    assert len(tiles) < batch["pixel_values"].shape[0] * batch["pixel_values"].shape[1]
    prepared, flat = model.prepare(batch), model.prepare(batch | {"pixel_values": tiles})
    assert prepared.keys() == flat.keys() == {"input_ids", "attention_mask", "pixel_values", "rows", "weights"}
    assert all((prepared[name] == flat[name]).all() for name in flat)
    alone = onevision_batch(hf, [[(20, 33)], [(5, 6)]], [0, 0], [0, 0])
    prepared, silent = model.prepare(alone), model.prepare({k: v for k, v in alone.items() if k != "batch_num_images"})
    assert all((prepared[name] == silent[name]).all() for name in prepared)


def test_onevision_refuses_pictures(onevision: Any, tmp_path: Path) -> None:
    hf, model, _ = onevision
    batch = onevision_batch(hf, SAMPLES, [0, 1, 0, 0, 0], [0] * 5)
    model.check(batch)
    ids = batch["input_ids"].copy()
    first = np.flatnonzero(ids == IMAGE)[0]
    moved = ids.copy()
    moved[np.arange(5) == 0, np.flatnonzero(ids[0] == IMAGE)[-1]] = 5
    moved[1, 1] = IMAGE
    bad = {
        "image placeholders a sample; the images take": {
            "input_ids": np.where(np.arange(ids.size).reshape(ids.shape) == first, 5, ids)
        },
        "image placeholders a sample": {"input_ids": moved},
        "video placeholders a sample; the videos take none": {"pixel_values_videos": None},
        "the images take none": {"pixel_values": None},
        r"image_sizes: \[\[20, 33\]": {"batch_num_images": np.array([1, 2, 1])},
        r"image_sizes: \[\[0, 33\]": {"image_sizes": np.where(batch["image_sizes"] == 20, 0, batch["image_sizes"])},
        r"image_sizes: \[\]": {"image_sizes": None},
        "by image_sizes the images have": {"pixel_values": batch["pixel_values"][:, :1]},
        "not finite": {"pixel_values": batch["pixel_values"] * np.nan},
        r"pixel_values_videos: shape \(2, 3, 8, 8\); expected \(videos, frames": {
            "pixel_values_videos": batch["pixel_values_videos"][0]
        },
        r"pixel_values: shape \(5, 10, 3, 8, 4\); expected \(images, tiles, 3, 8, 8\)": {
            "pixel_values": batch["pixel_values"][..., :4]
        },
    }
    for message, change in bad.items():
        with pytest.raises(InputError, match=message):
            model.prepare(batch | change)
    long = {"image_sizes": np.array([[1, 130], *batch["image_sizes"][1:]])}
    thin = model.from_hf(hf.config.to_dict() | {"vision_aspect_ratio": "anyres_max_1", "image_grid_pinpoints": [[8, 800]]})
    with pytest.raises(InputError, match="1 x 130 pixels is too long"):
        thin.prepare(batch | long)


def test_onevision_refuses_configs(onevision: Any) -> None:
    hf, model, _ = onevision
    config = hf.config.to_dict()
    bad: dict[str, dict[str, Any]] = {
        "vision_aspect_ratio 'anyres'": {"vision_aspect_ratio": "anyres"},
        "vision_aspect_ratio 'anyres_max_0'": {"vision_aspect_ratio": "anyres_max_0"},
        r"image_grid_pinpoints \[\[8, 8, 8\]\]": {"image_grid_pinpoints": [[8, 8, 8]]},
        "video_token_id 300": {"video_token_index": IMAGE},
        "vision_feature_layer 4": {"vision_feature_layer": 4},
    }
    for message, change in bad.items():
        with pytest.raises(InputError, match=message):
            model.from_hf(config | change)
    picture = onevision_batch(hf, [[(20, 33)]], [0], [0])
    for message, change in {
        r"no multiple of the vision tower's 8 pixels": {"image_grid_pinpoints": [[12, 8]]},
        "'default' leaves 15 features of a tile; tiles and frames need 4 x 4": {"vision_feature_select_strategy": "default"},
        "1048592 features of an image": {"image_grid_pinpoints": [[8 * 256, 8 * 256]]},
    }.items():
        with pytest.raises(InputError, match=message):
            model.from_hf(config | change).prepare(picture)
