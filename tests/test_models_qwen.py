"""Logits and greedy answers against transformers' own Qwen-VLs, tiny and random, on torch's CPU."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from folders import same
from qwen_reference import (
    IMAGE,
    KINDS,
    VIDEO,
    VOCABULARY,
    batch_of,
    logits,
    reference,
    run,
    theirs_of,
)
from safetensors.numpy import save_file
from twins import assert_close, tensors

from splitq_jax import models
from splitq_jax.errors import InputError
from splitq_jax.models.families import model_of
from splitq_jax.models.mrope import Visuals, mrope_positions


@cache
def loaded(case: str) -> tuple[Any, Any, Any]:
    kind, changes = CASES[case]
    hf = reference(kind, **changes)
    with TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        return hf, *models.load(folder)


# several pictures a row, of odd sizes, past and within a window; videos among images; a row of text
PICTURES: list[list[Any]] = [[3, (3, 5), 2, (1, 1), 4], [2, (2, 3, 2), 3, (4, 2), 2, (1, 2, 2), 5], [6], [1, (1, 7), 9]]
SEVEN = {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}
MHA = {"num_key_value_heads": 4}
THREE = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "mrope_section": [2, 1, 1],
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "2.5-gqa": ("qwen2_5_vl", {}),
    "2.5-seven-to-one-tied-sliding": ("qwen2_5_vl", {"text": SEVEN | SLIDING, "tie_word_embeddings": True}),
    "2.5-mha-windows-of-three-merge-three": (
        "qwen2_5_vl",
        {
            "text": MHA | {"rms_norm_eps": 1e-3, "hidden_act": "gelu"},
            "vision": {
                "spatial_merge_size": 3,
                "window_size": 19,
                "in_channels": 1,
                "hidden_act": "gelu",
                "num_heads": 3,
                "hidden_size": 36,
                "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
                "fullatt_block_indexes": [],
            },
        },
    ),
    "2.5-whole-frames": (
        "qwen2_5_vl",
        {"vision": {"fullatt_block_indexes": [0, 1, 2, 7], "spatial_merge_size": 1, "window_size": 2}},
    ),
    "2-gqa": ("qwen2_vl", {}),
    "2-three-to-one-tied-llama3": (
        "qwen2_vl",
        {
            "text": THREE | {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
            "vision": {"temporal_patch_size": 1, "patch_size": 3, "hidden_act": "gelu_pytorch_tanh"},
        },
    ),
    "3-gqa-deepstack": ("qwen3_vl", {}),
    "3-seven-to-one-head-dim-tied-bias": (
        "qwen3_vl",
        {
            "text": SEVEN
            | {"head_dim": 12, "attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 9e3}},
            "vision": {"deepstack_visual_indexes": [], "num_position_embeddings": 9, "spatial_merge_size": 1},
            "tie_word_embeddings": True,
        },
    ),
    "3-mha-more-deepstack-than-layers": (
        "qwen3_vl",
        {"text": MHA | {"num_hidden_layers": 2}, "vision": {"deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 1}},
    ),
}


PLAIN = ["2.5-gqa", "2-gqa", "3-gqa-deepstack"]


def model_inputs(hf: Any, rows: list[list[Any]] = PICTURES, pad: int = 2) -> dict[str, np.ndarray]:
    batch = batch_of(hf, rows, pad)
    if hf.config.model_type == "qwen2_5_vl" and "video_grid_thw" in batch:
        batch["second_per_grid_ts"] = np.array([1.5, 0.4, 2.0], np.float32)[: len(batch["video_grid_thw"])]
    return batch


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str) -> None:
    hf, model, params = loaded(case)
    batch = model_inputs(hf)
    mask = batch["attention_mask"]
    assert not mask.all()
    assert_close(logits(model, params, batch)[mask], theirs_of(hf, batch)[mask])


@pytest.mark.parametrize("case", ["2.5-seven-to-one-tied-sliding", "2-gqa", "3-gqa-deepstack"])
def test_greedy_answers(case: str) -> None:
    hf, model, params = loaded(case)
    # the time of the last row's video goes on past the text behind it; another row ends with an image
    batch = model_inputs(hf, [*PICTURES[:2], [1, (2, 3)], [3, (9, 1, 2), 2]])
    positions = model.prepare(batch)["positions"]
    assert hf.config.model_type == "qwen3_vl" or positions[3].max() > positions[3, -1].max()
    assert len(set(positions[2, -1])) > 1
    theirs = hf.generate(**tensors(batch), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs = theirs.numpy()[:, batch["input_ids"].shape[1] :]
    assert len(np.unique(theirs)) > 8
    np.testing.assert_array_equal(np.stack(models.generate(model, params, batch, 32)), theirs)


@pytest.mark.parametrize("case", PLAIN)
def test_text_alone_and_one_image_without_a_mask(case: str) -> None:
    hf, model, params = loaded(case)
    text = batch_of(hf, [[9], [5]])
    del text["mm_token_type_ids"]
    mask, theirs = text["attention_mask"], theirs_of(hf, text)
    ours = logits(model, params, text)
    assert_close(ours[mask], theirs[mask])
    none = {
        "pixel_values": np.zeros((0, 24), np.float32),
        "image_grid_thw": np.zeros((0, 3), np.int64),
        "pixel_values_videos": None,
    }
    np.testing.assert_array_equal(logits(model, params, text | none), ours)
    image = {k: v for k, v in batch_of(hf, [[4, (3, 2), 5]], 0).items() if k != "attention_mask"}
    theirs = theirs_of(hf, image | {"attention_mask": np.ones_like(image["input_ids"])})
    assert_close(logits(model, params, {k: v for k, v in image.items() if k != "mm_token_type_ids"}), theirs)
    lists = {name: value.tolist() if value.dtype != np.float32 else value for name, value in image.items()}
    assert_close(logits(model, params, lists), theirs)


@pytest.mark.parametrize("case", PLAIN)
def test_names_of_the_memory_load_as_those_of_the_disk(case: str, tmp_path: Path) -> None:
    hf, _, params = loaded(case)
    save_file({name: tensor.numpy() for name, tensor in hf.state_dict().items()}, tmp_path / "model.safetensors")
    hf.config.save_pretrained(tmp_path)
    assert same(params, models.load(tmp_path)[1])
    assert set(model_of(hf.config.to_dict()).table()) == set(flatten_dict(params, sep="/"))


@pytest.mark.parametrize("case", PLAIN)
def test_packed_rows_equal_separate_ones(case: str) -> None:
    hf, model, params = loaded(case)
    prefix: list[Any] = [2, (2, 3, 2), 1, (3, 3), 1]
    ends = [4, 1, 6]
    whole = batch_of(hf, [[*prefix, sum(ends)]], 0)
    start = whole["input_ids"].shape[1] - sum(ends)
    number = np.repeat(np.arange(len(ends) + 1), [start, *ends])[None]
    packed = {k: v for k, v in whole.items() if k != "mm_token_type_ids"} | {"segments": number}
    ours = logits(model, params, packed)[0]
    for i, end in enumerate(ends, start=1):
        keep = np.isin(number[0], (0, i))
        alone = whole | {k: whole[k][:, keep] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
        assert alone["input_ids"].shape[1] == start + end
        assert_close(ours[keep], theirs_of(hf, alone)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_positions_equal_those_of_transformers(kind: str) -> None:
    hf = reference(kind)
    model = model_of(hf.config.to_dict())
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows: list[list[Any]] = []
        for _ in range(rng.integers(1, 4)):
            parts: list[Any] = [int(rng.integers(0, 3))]
            for _ in range(rng.integers(0, 4)):
                size = rng.integers(1, 6, rng.integers(2, 4)).tolist()
                parts += [tuple(size), int(rng.integers(0, 4))]
            rows.append([*parts, 1])
        batch = batch_of(hf, rows, int(rng.integers(0, 3)), seed)
        grids = {k: torch.tensor(batch[k]) for k in ("image_grid_thw", "video_grid_thw") if k in batch}
        if kind == "qwen2_5_vl" and "video_grid_thw" in batch:
            batch["second_per_grid_ts"] = rng.uniform(0.1, 3, len(batch["video_grid_thw"])).astype(np.float32)
            grids["second_per_grid_ts"] = torch.tensor(batch["second_per_grid_ts"])
        given = tensors({k: batch[k] for k in ("input_ids", "attention_mask", "mm_token_type_ids")})
        theirs, _ = hf.model.get_rope_index(**given, **grids)
        prepared = model.prepare(batch)
        np.testing.assert_array_equal(prepared["positions"].transpose(2, 0, 1), theirs.numpy())


def test_positions_by_hand() -> None:
    #          a  b | 1 x 2 x 2 |  c |  d | e   with d and e two answers to the same question
    image = Visuals("image", np.array([2, 3, 4, 5]), np.array([[1, 2, 2]]), np.ones(1))
    segments = np.array([[0, 0, 0, 0, 0, 0, 0, 1, 2]])
    positions = mrope_positions([image], np.ones((1, 9), bool), segments)[0].T
    np.testing.assert_array_equal(positions[0], [0, 1, 2, 2, 2, 2, 4, 5, 5])
    np.testing.assert_array_equal(positions[1], [0, 1, 2, 2, 3, 3, 4, 5, 5])
    np.testing.assert_array_equal(positions[2], [0, 1, 2, 3, 2, 3, 4, 5, 5])


def test_pictures_of_many_sizes_share_shapes() -> None:
    hf = reference("qwen2_5_vl")
    model = model_of(hf.config.to_dict())
    shapes = set()
    for height in range(33, 49):
        batch = {k: v for k, v in batch_of(hf, [[1, (height, 40)]], 0).items() if k != "attention_mask"}
        prepared = model.prepare(batch)
        shapes.add(prepared["patches"].shape)
        assert prepared["real"].sum() == batch["pixel_values"].shape[0]
        assert prepared["patches"].size <= 1.25 * batch["pixel_values"].size + 4 * 24
    assert len(shapes) <= 5


@pytest.mark.parametrize("case", PLAIN)
def test_padding_counts_for_nothing_where_inputs_are_collected(case: str) -> None:
    hf, model, params = loaded(case)
    batch = model.prepare(model_inputs(hf))
    sites = flatten_dict(run(model, params, batch)[1]["inputs"]["vision"])
    assert len(sites) == 4 * model.config.vision.num_layers and not batch["real"].all()
    for value in sites.values():
        np.testing.assert_array_equal(np.abs(np.asarray(value[0])).max(axis=-1) > 0, batch["real"])


WRONG_CONFIGS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "type": ("qwen2_vl", lambda c: c["vision_config"].update(hidden_act=3), "hidden_act"),
    "activation": ("qwen3_vl", lambda c: c["vision_config"].update(hidden_act="tanhshrink"), "activation"),
    "head": ("qwen2_vl", lambda c: c["vision_config"].update(num_heads=12), "multiple of 4"),
    "width": ("qwen2_5_vl", lambda c: c["vision_config"].update(out_hidden_size=40), "width 40"),
    "window": ("qwen2_5_vl", lambda c: c["vision_config"].update(window_size=3), "window_size 3"),
    "patch": ("qwen2_5_vl", lambda c: c["vision_config"].update(patch_size=0), "patch_size"),
    "patch-list": ("qwen2_5_vl", lambda c: c["vision_config"].update(patch_size=[2, 2]), "patch_size"),
    "rope": ("qwen3_vl", lambda c: c["vision_config"].update(rope_parameters={"rope_type": "linear", "factor": 2.0}), "axial"),
    "deepstack": ("qwen3_vl", lambda c: c["vision_config"].update(deepstack_visual_indexes=[0, 3]), "distinct blocks of 3"),
    "deepstack-twice": ("qwen3_vl", lambda c: c["vision_config"].update(deepstack_visual_indexes=[1, 1]), "distinct blocks"),
    "positions": ("qwen3_vl", lambda c: c["vision_config"].update(num_position_embeddings=0), "num_position_embeddings"),
    "tokens": ("qwen2_vl", lambda c: c.update(image_token_id=VIDEO), "two tokens"),
    "sections": ("qwen2_vl", lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[1, 1, 1]), "half a head"),
    "yarn": ("qwen2_5_vl", lambda c: c["text_config"].update(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "yarn"),
    "decoder": ("qwen2_5_vl", lambda c: c["text_config"].update(num_key_value_heads=3), "key/value"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_configs_that_are_refused(case: str) -> None:
    kind, change, match = WRONG_CONFIGS[case]
    config = reference(kind).config.to_dict()
    model_of(config)
    change(config)
    with pytest.raises(InputError, match=match):
        model_of(config)


WRONG_BATCHES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "grid-missing": (lambda b: b.pop("image_grid_thw"), "one is missing"),
    "pixels-missing": (lambda b: b.pop("pixel_values_videos"), "one is missing"),
    "no-images": (lambda b: (b.pop("pixel_values"), b.pop("image_grid_thw")), "14 image placeholders"),
    "patch": (lambda b: b.update(pixel_values=b["pixel_values"][:, :-1]), "pixel_values: shape"),
    "fewer-patches": (lambda b: b.update(pixel_values=b["pixel_values"][:-4]), "patches in all"),
    "nan": (lambda b: b["pixel_values"].fill(np.nan), "not finite"),
    "integers": (lambda b: b.update(pixel_values=b["pixel_values"].astype(np.int32)), "expected the floats"),
    "grid-shape": (lambda b: b.update(image_grid_thw=b["image_grid_thw"][:, :2]), "image_grid_thw"),
    "grid-odd": (lambda b: b.update(image_grid_thw=b["image_grid_thw"] // [1, 1, 2] * [1, 2, 1]), "multiples of 2"),
    "grid-order": (lambda b: b.update(image_grid_thw=b["image_grid_thw"][::-1]), "do not stand together"),
    "placeholder": (lambda b: b["input_ids"].__setitem__((0, 0), IMAGE), "15 image placeholders"),
    "padded": (lambda b: b["attention_mask"].__setitem__((slice(None), slice(0, 8)), False), "marked as padding"),
    "types": (lambda b: b["mm_token_type_ids"].fill(0), "mm_token_type_ids"),
    "types-shape": (lambda b: b.update(mm_token_type_ids=b["mm_token_type_ids"][:, 1:]), "mm_token_type_ids"),
    "positions": (lambda b: b.update(positions=np.zeros(b["input_ids"].shape, np.int32)), "positions"),
    "segments": (
        lambda b: b.update(segments=np.arange(b["input_ids"].size).reshape(b["input_ids"].shape)),
        "do not stand together",
    ),
    "seconds": (lambda b: b.update(second_per_grid_ts=np.array([1.0])), "second_per_grid_ts"),
    "seconds-nan": (lambda b: b.update(second_per_grid_ts=[1.0, float("nan")]), "second_per_grid_ts"),
    "unknown": (lambda b: b.update(pixels=b["pixel_values"]), "pixels: not known"),
    "token": (lambda b: b["input_ids"].__setitem__((0, 0), VOCABULARY), "token id 320"),
}


@pytest.mark.parametrize("case", WRONG_BATCHES)
def test_batches_that_are_refused(case: str) -> None:
    hf = reference("qwen2_5_vl")
    model = model_of(hf.config.to_dict())
    change, match = WRONG_BATCHES[case]
    batch = batch_of(hf, [[2, (2, 3), 1, (2, 2, 1), 1], [2, (4, 2), 1, (1, 2, 2), 5]], 0)
    model.check(batch)
    change(batch)
    with pytest.raises(InputError, match=match):
        model.check(batch)
