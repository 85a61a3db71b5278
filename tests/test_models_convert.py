"""Hugging Face folders in and out, and every folder that must be refused."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, SiglipVisionConfig
from transformers import LlavaConfig as HfConfig
from transformers import LlavaForConditionalGeneration as HfLlava

from splitq_jax import models
from splitq_jax.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q, EMBEDDING = "language_model.model.layers.0.self_attn.q_proj.weight", "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


def make(folder: Path, tower: str = "clip", shards: bool = False, layer: int = -1, **top: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = (CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(**sizes, image_size=8, patch_size=4)
    text = LlamaConfig(**sizes | {"num_hidden_layers": 1}, num_key_value_heads=1, vocab_size=64)
    config = HfConfig(vision_config=vision, text_config=text, image_token_index=60, vision_feature_layer=layer, **top)
    HfLlava(config).save_pretrained(folder, **({"max_shard_size": "10KB"} if shards else {}))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("sharded") / "model", shards=True)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def same(a: Any, b: Any) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(x.dtype == y.dtype and bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)
    return folder


def change_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def header(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write_header(file: Path, text: str, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data)


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


def test_shards_load_alike(whole: Path, sharded: Path) -> None:
    assert same(models.load(whole)[1], models.load(sharded)[1])


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


def test_links_out_of_the_folder_are_opt_in(whole: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    shutil.copyfile(whole / "config.json", hub / "config.json")
    (hub / SINGLE).symlink_to(whole / SINGLE)
    with pytest.raises(InputError, match=rf"{SINGLE}: links to .*--follow-links"):
        models.load(hub)
    assert same(models.load(hub, follow_links=True)[1], models.load(whole)[1])


# --- what is refused: tensors


def nan(tensors: dict[str, np.ndarray]) -> None:
    tensors[Q][1, 2] = np.nan


def infinite(tensors: dict[str, np.ndarray]) -> None:
    tensors[Q][0, 0] = -np.inf


TENSORS: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "nan": (nan, rf"{SINGLE}: tensor '{Q}' has NaN or infinite"),
    "infinite": (infinite, rf"{SINGLE}: tensor '{Q}' has NaN or infinite"),
    "missing": (lambda t: t.pop(Q), rf"1 tensors are missing, the first is '{Q}'"),
    "missing vision": (lambda t: t.pop("vision_tower.embeddings.class_embedding"), "'vision_tower.embeddings.class_embedding'"),
    "empty": (lambda t: t.clear(), "tensors are missing"),
    "extra": (lambda t: t.update(surprise=np.zeros(3, np.float32)), "1 tensors that config.json has no place for.*'surprise'"),
    "extra bias": (lambda t: t.update({Q.replace("weight", "bias"): np.zeros(16, np.float32)}), r"no place for.*q_proj\.bias"),
    "shape": (lambda t: t.update({Q: np.zeros((16, 24), np.float32)}), rf"tensor '{Q}' has shape \(16, 24\).*\(16, 16\)"),
    "scalar": (lambda t: t.update({Q: np.asarray(1, np.float32)}), rf"tensor '{Q}' has shape \(\)"),
    "no entries": (lambda t: t.update({Q: np.zeros((0, 16), np.float32)}), rf"tensor '{Q}' has shape \(0, 16\)"),
    "integers": (lambda t: t.update({Q: np.zeros((16, 16), np.int8)}), rf"{SINGLE}: tensor '{Q}' is I8; expected F32, BF16, F16"),
    "doubles": (lambda t: t.update({Q: np.zeros((16, 16))}), rf"tensor '{Q}' is F64"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_are_refused(kind: str, whole: Path, tmp_path: Path) -> None:
    change, message = TENSORS[kind]
    folder = change_tensors(copy(whole, tmp_path / "m"), change)
    with pytest.raises(InputError, match=message) as refused:
        models.load(folder)
    assert str(folder) in str(refused.value)


# --- what is refused: files


def truncated(folder: Path) -> None:
    raw = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(raw[:-100])


def longer(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes() + b"0")


def twice(folder: Path) -> None:
    entries, data = header(folder / SINGLE)
    text = json.dumps(entries)
    write_header(folder / SINGLE, text[:-1] + f", {json.dumps(Q)}: {json.dumps(entries[Q])}}}", data)


def escaped_twice(folder: Path) -> None:
    """The same name, spelled with an escape."""
    entries, data = header(folder / SINGLE)
    text = json.dumps(entries)
    name = json.dumps(Q).replace("q_proj", "\\u0071_proj")
    write_header(folder / SINGLE, text[:-1] + f", {name}: {json.dumps(entries[Q])}}}", data)


def lower_dtype(folder: Path) -> None:
    entries, data = header(folder / SINGLE)
    entries[Q]["dtype"] = "f32"
    write_header(folder / SINGLE, json.dumps(entries), data)


def overlapping(folder: Path) -> None:
    entries, data = header(folder / SINGLE)
    entries[Q]["data_offsets"] = [0, 1024]
    write_header(folder / SINGLE, json.dumps(entries), data)


def pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def both(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {Q: SINGLE}}))


def directory(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncated, rf"{SINGLE}: not a whole safetensors file"),
    "longer": (longer, rf"{SINGLE}: not a whole safetensors file"),
    "empty": (lambda f: (f / SINGLE).write_bytes(b""), rf"{SINGLE}: not a whole safetensors file"),
    "no header": (lambda f: (f / SINGLE).write_bytes(b"\xff" * 64), rf"{SINGLE}: not a whole safetensors file"),
    "pointer": (lambda f: (f / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\n"), "not a whole safetensors file"),
    "twice": (twice, rf"{SINGLE}: tensor '{Q}' stands twice"),
    "escaped twice": (escaped_twice, rf"{SINGLE}: tensor '{Q}' stands twice"),
    "lower-case dtype": (lower_dtype, rf"{SINGLE}: not a whole safetensors file"),
    "overlapping": (overlapping, rf"{SINGLE}: not a whole safetensors file"),
    "pickled": (pickled, r"neither model.safetensors nor .*pytorch_model\.bin is pickled"),
    "nothing": (lambda f: (f / SINGLE).unlink(), f"neither {SINGLE} nor {INDEX}$"),
    "both": (both, f"both {SINGLE} and {INDEX}"),
    "directory": (directory, f"neither {SINGLE} nor {INDEX}"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_are_refused(kind: str, whole: Path, tmp_path: Path) -> None:
    change, message = FILES[kind]
    folder = copy(whole, tmp_path / "m")
    change(folder)
    with pytest.raises(InputError, match=message) as refused:
        models.load(folder)
    assert str(folder) in str(refused.value)


NAMES = [
    "../m/model-00001-of-00002.safetensors",
    "/etc/x.safetensors",
    "..",
    "a\\b.safetensors",
    "x.safetensors\0",
    "x.bin",
    "",
    3,
    None,
]
NAMES += [["x.safetensors"], "\ud800.safetensors", ".safetensors", "x\n.safetensors"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_shard_names_are_refused(name: Any, sharded: Path, tmp_path: Path) -> None:
    folder = copy(sharded, tmp_path / "m")
    change_json(folder / INDEX, lambda v: v["weight_map"].update({Q: name}))
    with pytest.raises(InputError) as refused:
        models.load(folder)
    assert INDEX in str(refused.value) and Q in str(refused.value)


def shard_of(folder: Path) -> Path:
    shard: str = json.loads((folder / INDEX).read_text())["weight_map"][Q]
    return folder / shard


def missing_shard(folder: Path) -> str:
    shard_of(folder).unlink()
    return shard_of(folder).name


def circle(folder: Path) -> str:
    shard = shard_of(folder)
    shard.unlink()
    shard.symlink_to(shard.name)
    return shard.name


def outside(folder: Path) -> str:
    shard = shard_of(folder)
    shard.rename(folder.parent / "elsewhere.safetensors")
    shard.symlink_to("../elsewhere.safetensors")
    return f"{shard.name}: links to "


def absent(folder: Path) -> str:
    tensors = load_file(shard_of(folder))
    save_file({k: v for k, v in tensors.items() if k != Q}, shard_of(folder))
    return f"{shard_of(folder).name}: tensor '{Q}' is missing"


def in_two_shards(folder: Path) -> str:
    other = next(f for f in sorted(folder.glob("*.safetensors")) if f != shard_of(folder))
    save_file(load_file(other) | {Q: load_file(shard_of(folder))[Q]}, other)
    return f"tensor '{Q}' stands in "


def no_map(folder: Path) -> str:
    (folder / INDEX).write_text("{}")
    return f"{INDEX}: no weight_map"


def repeated_key(folder: Path) -> str:
    (folder / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    return f"{INDEX}: the key 'a' stands twice"


@pytest.mark.parametrize("change", [missing_shard, circle, outside, absent, in_two_shards, no_map, repeated_key])
def test_shards_are_refused(change: Callable[[Path], str], sharded: Path, tmp_path: Path) -> None:
    folder = copy(sharded, tmp_path / "m")
    message = change(folder)
    with pytest.raises(InputError) as refused:
        models.load(folder)
    assert message in str(refused.value)


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
    (("model_type",), "llava_next", "'llava_next'; supported is llava"),
    (("text_config", "model_type"), "qwen2", "'qwen2'; supported is llama"),
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
    (("text_config", "rope_parameters"), {"rope_type": "linear"}, "rope_theta, factor"),
    (("text_config", "rope_parameters"), {"rope_type": "linear", "factor": 0}, "rope_theta, factor"),
    (("text_config", "rope_parameters"), {"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (("vision_config", "image_size"), 1 << 20, "an image takes 68719476736 tokens"),
    (("vision_config", "patch_size"), 9, "patch_size 9 is larger"),
    (("vision_config", "num_attention_heads"), 3, "no multiple of its 3 heads"),
    (("vision_feature_layer",), 3, "vision_feature_layer 3; the vision tower has layers 0 to 2"),
    (("vision_feature_layer",), -4, "vision_feature_layer -4"),
    (("vision_feature_layer",), [], r"vision_feature_layer \[\]"),
    (("vision_feature_layer",), None, "vision_feature_layer None"),
    (("vision_feature_select_strategy",), "cls", "'cls'; expected default or full"),
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
