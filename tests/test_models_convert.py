"""Hugging Face folders in and out, and every config and tree that must be refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from folders import SINGLE, Q, change_json, change_tensors, copy, make, same
from transformers import LlavaForConditionalGeneration as HfLlava

import splitq_jax as sq
from splitq_jax import models
from splitq_jax.errors import InputError

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("whole") / "model")


# --- what loads


def test_three_spellings_load_alike(whole: Path, tmp_path: Path) -> None:
    model, params = models.load(whole)
    in_memory = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    older = {"vision_tower.": "vision_tower.vision_model."}
    for number, spelling in enumerate((in_memory, older)):

        def rename(tensors: dict[str, np.ndarray], spelling: dict[str, str] = spelling) -> None:
            for name in list(tensors):
                for old, new in spelling.items():
                    if name.startswith(old):
                        tensors[new + name.removeprefix(old)] = tensors.pop(name)
            if spelling is in_memory:
                for name in [n for n in tensors if n.startswith(("vision_tower.", "multi_modal_projector."))]:
                    tensors[f"model.{name}"] = tensors.pop(name)
            else:  # older files hold what is computed
                tensors["vision_tower.vision_model.embeddings.position_ids"] = np.arange(5)[None]
                tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

        folder = change_tensors(copy(whole, tmp_path / str(number)), rename)
        again, tree = models.load(folder)
        assert again == model and same(tree, params)


def test_one_tensor_in_two_spellings_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = change_tensors(copy(whole, tmp_path / "m"), lambda t: t.update({"lm_head.weight": t[HEAD]}))
    with pytest.raises(InputError, match=r"lm_head\.weight.* spelled twice"):
        models.load(folder)


def test_bfloat16_and_float16_files(whole: Path, tmp_path: Path) -> None:
    _, params = models.load(whole)
    for dtype in (jnp.bfloat16, jnp.float16):
        folder = copy(whole, tmp_path / jnp.dtype(dtype).name)
        change_tensors(folder, lambda t, dtype=dtype: t.update({k: v.astype(dtype) for k, v in t.items()}))
        rounded = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        assert same(models.load(folder, dtype=dtype)[1], rounded)
        assert same(models.load(folder)[1], jax.tree.map(lambda x: x.astype(jnp.float32), rounded))


def test_types_that_would_lose_the_weights_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dtype .*int8"):
        models.load(whole, dtype=jnp.int8)
    folder = change_tensors(copy(whole, tmp_path / "m"), lambda t: t[Q].__setitem__((0, 0), 1e5))
    with pytest.raises(InputError, match=rf"'{Q}' has entries past the range of float16"):
        models.load(folder, dtype=jnp.float16)
    models.load(folder, dtype=jnp.bfloat16)


def test_a_tied_head_may_be_stored(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", tie_word_embeddings=True)
    _, params = models.load(folder)
    assert "head" not in params["decoder"]
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING].copy()}))
    assert same(models.load(folder)[1], params)
    change_tensors(folder, lambda t: t["lm_head.weight"].__setitem__((3, 3), 7))
    with pytest.raises(InputError, match=r"'lm_head\.weight' differs from the embedding"):
        models.load(folder)


def test_layers_past_the_selected_one_are_left_out(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", layer=1)
    model, params = models.load(folder)
    assert model.config.feature_layers == (1,) and "blocks_1" not in params["vision"]
    change_tensors(folder, lambda t: t.update({"vision_tower.encoder.layers.2.mlp.fc1.bias": np.zeros(24, np.float32)}))
    with pytest.raises(InputError, match=r"1 tensors .* no place for.*layers\.2\.mlp\.fc1\.bias"):
        models.load(folder)


# --- what is refused: config.json


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for part in path[:-1]:
            config = config[part]
        config[path[-1]] = value

    return change


CONFIGS: list[tuple[tuple[str, ...], Any, str]] = [
    (("auto_map",), {"AutoModel": "modeling.Model"}, "auto_map"),
    (("text_config", "auto_map"), {"AutoModel": "modeling.Model"}, "auto_map"),
    (("model_type",), "llava_next", "'llava_next'; supported are llava"),
    (("text_config", "model_type"), "phi3", "'phi3'; supported are gemma3_text, llama"),
    (("vision_config", "model_type"), "pixtral", "'pixtral'; supported are"),
    (("text_config",), [1], "text_config is a list"),
    (("text_config",), {}, "are missing"),
    (("vision_config",), "clip", "vision_config is a str"),
    (("text_config", "num_hidden_layers"), 1 << 23, "num_layers=8388608"),
    (("text_config", "hidden_size"), 1 << 40, "hidden_size=1099511627776"),
    (("text_config", "hidden_size"), 16.0, "hidden_size=16.0"),
    (("text_config", "intermediate_size"), -24, "intermediate_size=-24"),
    (("text_config", "vocab_size"), 1 << 23, r"has shape \(64, 16\)"),
    (("text_config", "num_attention_heads"), 0, "num_heads=0"),
    (("text_config", "num_attention_heads"), "2", "num_attention_heads='2'"),
    (("text_config", "num_key_value_heads"), None, r"k_proj.weight' has shape \(8, 16\)"),
    (("text_config", "num_key_value_heads"), 3, "2 attention heads are no multiple of 3"),
    (("text_config", "rms_norm_eps"), float("nan"), "rms_norm_eps=nan"),
    (("text_config", "attention_bias"), "false", "attention_bias='false'"),
    (("text_config", "hidden_act"), "mish", "activation 'mish'"),
    (("text_config", "rope_parameters"), {"rope_type": "yarn", "factor": 2.0}, "rope_type 'yarn'"),
    (("text_config", "rope_parameters"), {"rope_type": "linear"}, "'linear': {'factor'}"),
    (("text_config", "rope_parameters"), {"rope_type": "linear", "factor": 0}, "rope_theta, factor"),
    (("text_config", "rope_parameters"), {"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (("vision_config", "image_size"), 1 << 20, "an image takes 68719476736 tokens"),
    (("vision_config", "patch_size"), 9, "patch_size 9 is larger"),
    (("vision_config", "num_attention_heads"), 3, r"hidden size \(16\) is not a multiple of the number of attention heads \(3\)"),
    (("vision_feature_layer",), 3, "vision_feature_layer 3; the vision tower has layers 0 to 2"),
    (("vision_feature_layer",), -4, "vision_feature_layer -4"),
    (("vision_feature_layer",), [], r"vision_feature_layer \[\]"),
    (("vision_feature_layer",), None, "vision_feature_layer"),
    (("vision_feature_select_strategy",), "cls", "vision_feature_select_strategy' expected one of .'default', 'full'., got cls"),
    (("image_token_index",), -1, "image_token_id -1"),
    (("image_token_index",), 60.0, "image_token_index=60.0"),
    (("tie_word_embeddings",), "false", "tie_word_embeddings='false'"),
]


@pytest.mark.parametrize(("path", "value", "message"), CONFIGS, ids=lambda v: str(v)[:40])
def test_configs_are_refused(path: tuple[str, ...], value: Any, message: str, whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path / "m")
    change_json(folder / "config.json", put(*path, value=value))
    with pytest.raises(InputError, match=message) as refused:
        models.load(folder)
    assert "config.json" in str(refused.value) or str(folder) in str(refused.value)


BROKEN = {
    "nothing": b"",
    "list": b"[1]",
    "half": b'{"model_type"',
    "latin": b'{"a": "\xff"}',
    "deep": b"[" * 100_000,
    "twice": b'{"a":1,"a":2}',
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_json_is_refused(kind: str, whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path / "m")
    (folder / "config.json").write_bytes(BROKEN[kind])
    with pytest.raises(InputError, match=r"m/config\.json: "):
        models.load(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/config\.json: No such file"):
        models.load(tmp_path / "nowhere")


# --- export


def test_a_model_may_stay_in_host_memory(whole: Path, tmp_path: Path) -> None:
    _, params = models.load(whole)
    sq.save(tmp_path / "params", params)
    shutil.copy(whole / "config.json", tmp_path)
    for folder in (whole, tmp_path):
        _, held = models.load(folder, on_host=True)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(held)) and same(held, params)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_export_is_what_transformers_reads(tower: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", tower)
    config = json.loads((folder / "config.json").read_text())
    _, params = models.load(folder)
    out = models.export(tmp_path / "deep" / "out", config, params, {"note.txt": b"kept"})
    assert (out / "note.txt").read_bytes() == b"kept" and [f.name for f in out.parent.iterdir()] == ["out"]
    assert same(models.load(out)[1], params)
    hf, report = HfLlava.from_pretrained(out, output_loading_info=True)
    assert not report["unexpected_keys"] and all(".head." in k for k in report["missing_keys"])  # SigLIP's pooling: never run
    tokens = models.load(folder)[0].config.tokens_per_image
    batch = {
        "input_ids": torch.tensor([[5] + [60] * tokens + [7, 8]]),
        "pixel_values": torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8),
    }
    with torch.no_grad():
        ours, theirs = hf(**batch).logits, HfLlava.from_pretrained(folder)(**batch).logits
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_export_of_bfloat16(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text())
    _, params = models.load(folder, dtype=jnp.bfloat16)
    out = models.export(tmp_path / "out", config, params, {})
    assert same(models.load(out, dtype=jnp.bfloat16)[1], params)


def edited(params: Any, path: str, value: Any) -> Any:
    *parents, leaf = path.split("/")
    tree = jax.tree.map(lambda x: x, params)
    node = tree
    for parent in parents:
        node = node[parent]
    if value is None:
        del node[leaf]
    else:
        node[leaf] = value
    return tree


LEAF = "decoder/blocks_0/o/kernel"
LEAVES = [
    (LEAF, None, "is missing"),
    ("decoder/surprise", np.zeros(3, np.float32), "decoder/surprise is nothing that"),
    (LEAF, np.zeros((16, 8), np.float32), r"o/kernel has shape \(16, 8\)"),
    (LEAF, np.zeros((16, 16), np.int8), "o/kernel is a int8; only float"),
    (LEAF, object(), "o/kernel is a object; only float"),
    (LEAF, np.full((16, 16), np.nan, np.float32), "o/kernel has NaN"),
]


@pytest.mark.parametrize(("path", "value", "message"), LEAVES, ids=lambda v: str(v)[:16])
def test_export_refuses_parameters(path: str, value: Any, message: str, whole: Path, tmp_path: Path) -> None:
    config, (_, params) = json.loads((whole / "config.json").read_text()), models.load(whole)
    with pytest.raises(InputError, match=message):
        models.export(tmp_path / "deep" / "out", config, edited(params, path, value), {})
    assert not list(tmp_path.iterdir())


def test_export_leaves_nothing_behind(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, (_, params) = json.loads((whole / "config.json").read_text()), models.load(whole)
    for name in ("../x", "a/b", "config.json", SINGLE, "", ".."):
        with pytest.raises(InputError, match="expected plain names"):
            models.export(tmp_path / "out", config, params, {name: b""})
    with pytest.raises(InputError, match="1 of 2 layers are kept"):
        models.export(tmp_path / "out", config | {"vision_feature_layer": -2}, params, {})
    with pytest.raises(InputError, match="model_type"):
        models.export(tmp_path / "out", config | {"model_type": "x"}, params, {})
    with pytest.raises(TypeError):
        models.export(tmp_path / "out", config | {"note": object()}, params, {})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("splitq_jax.models.convert.save_file", full)
        with pytest.raises(InputError, match=r"out: cannot be written: .*No space left"):
            models.export(tmp_path / "out", config, params, {})
    assert not list(tmp_path.iterdir())
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("mine")
    for taken in ("link", "file"):
        with pytest.raises(InputError, match=f"{taken}: exists"):
            models.export(tmp_path / taken, config, params, {})
    with pytest.raises(InputError, match="cannot be written"):
        models.export(tmp_path / "file" / "out", config, params, {})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "link"] and (tmp_path / "file").read_text() == "mine"
