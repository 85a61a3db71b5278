"""Hugging Face folders to parameter trees and back.

A tree's leaf is one tensor or several fused: q, k, v side by side, gate beside up. Hugging Face's linear layers are (out, in), ours are
(in, out); a patch convolution (D, C, p, p) is a matrix (C p p, D).
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import save_file

from splitq_jax.checkpoint import restore
from splitq_jax.errors import InputError
from splitq_jax.manifest import MANIFEST
from splitq_jax.models.llava import Llava, LlavaConfig
from splitq_jax.models.weights import SINGLE, Weights, read_json

Params = dict[str, Any]
PARAMS = "params"  # the checkpoint inside a converted or quantized folder

# in transformers 5's memory, on its disk, and in older files: model.language_model.*, language_model.model.*, vision_tower.vision_model.*
SPELLINGS = (
    (re.compile(r"^model\.(?=(language_model|vision_tower|multi_modal_projector)\.)"), ""),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "language_model."),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
)
# in the files, and read by nothing up to the selected vision layer
UNUSED = re.compile(r"vision_tower\.(post_layernorm\.|head\.|embeddings\.position_ids)|.*\.rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Source:
    """Where a leaf comes from.

    Attributes:
      names: tensors, fused along the outputs.
      columns: outputs of each.
      kind: ``linear`` is transposed, ``patch`` is flattened and transposed, ``plain`` is taken as it is.
    """

    names: tuple[str, ...]
    columns: tuple[int, ...]
    kind: Literal["linear", "patch", "plain"]


def table(config: LlavaConfig) -> dict[str, Source]:
    """Return the source of every leaf, by its path, in one spelling of the names (`canonical`)."""
    vision, text = config.vision, config.text
    out: dict[str, Source] = {}

    def plain(path: str, name: str) -> None:
        out[path] = Source((name,), (0,), "plain")

    def linear(path: str, names: tuple[str, ...], columns: tuple[int, ...], bias: bool) -> None:
        out[f"{path}/kernel"] = Source(tuple(f"{n}.weight" for n in names), columns, "linear")
        if bias:
            out[f"{path}/bias"] = Source(tuple(f"{n}.bias" for n in names), columns, "plain")

    def norm(path: str, name: str, bias: bool) -> None:
        plain(f"{path}/scale", f"{name}.weight")
        if bias:
            plain(f"{path}/bias", f"{name}.bias")

    source = "vision_tower.embeddings"
    out["vision/patch"] = Source((f"{source}.patch_embedding.weight",), (vision.hidden_size,), "patch")
    plain("vision/position", f"{source}.position_embedding.weight")
    if vision.is_clip:
        plain("vision/class", f"{source}.class_embedding")
        norm("vision/norm_pre", "vision_tower.pre_layrnorm", True)  # Hugging Face's spelling
    else:
        plain("vision/patch_bias", f"{source}.patch_embedding.bias")
    width, inner = vision.hidden_size, vision.intermediate_size
    for i in range(max(config.feature_layers)):
        to, source = f"vision/blocks_{i}", f"vision_tower.encoder.layers.{i}"
        norm(f"{to}/norm_attn", f"{source}.layer_norm1", True)
        linear(f"{to}/qkv", tuple(f"{source}.self_attn.{n}_proj" for n in "qkv"), (width,) * 3, True)
        linear(f"{to}/o", (f"{source}.self_attn.out_proj",), (width,), True)
        norm(f"{to}/norm_mlp", f"{source}.layer_norm2", True)
        linear(f"{to}/fc1", (f"{source}.mlp.fc1",), (inner,), True)
        linear(f"{to}/fc2", (f"{source}.mlp.fc2",), (width,), True)
    for i in (1, 2):
        linear(f"projector/fc{i}", (f"multi_modal_projector.linear_{i}",), (text.hidden_size,), config.projector_bias)
    plain("decoder/embed/embedding", "language_model.embed_tokens.weight")
    for i in range(text.num_layers):
        to, source = f"decoder/blocks_{i}", f"language_model.layers.{i}"
        columns = text.layer_columns
        norm(f"{to}/norm_attn", f"{source}.input_layernorm", False)
        linear(f"{to}/qkv", tuple(f"{source}.self_attn.{n}_proj" for n in "qkv"), columns["qkv"], text.attention_bias)
        linear(f"{to}/o", (f"{source}.self_attn.o_proj",), columns["o"], text.attention_bias)
        norm(f"{to}/norm_mlp", f"{source}.post_attention_layernorm", False)
        linear(f"{to}/gate_up", (f"{source}.mlp.gate_proj", f"{source}.mlp.up_proj"), columns["gate_up"], text.mlp_bias)
        linear(f"{to}/down", (f"{source}.mlp.down_proj",), columns["down"], text.mlp_bias)
    norm("decoder/norm", "language_model.norm", False)
    if not config.tied:
        linear("decoder/head", ("lm_head",), (text.vocab_size,), False)
    return out


def canonical(name: str) -> str:
    """Return a tensor's name in the one spelling that `table` uses."""
    for pattern, replacement in SPELLINGS:
        name = pattern.sub(replacement, name)
    return name


def on_disk(name: str) -> str:
    """Return a tensor's name as transformers 5 writes it."""
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    return re.sub(r"^language_model\.(?!lm_head\.)", "language_model.model.", name)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read and check ``config.json``.

    Raises:
      InputError: no such file; code of its own (``auto_map``); a model type that is not supported.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(part, dict) and "auto_map" in part:
            raise InputError(
                f"{path}: auto_map asks to run the folder's own code, which is never run; use a model type that is supported"
            )
    if config.get("model_type") != "llava":
        raise InputError(f"{path}: model_type {config.get('model_type')!r}; supported is llava")
    return config


def load(folder: str | Path, *, dtype: Any = jnp.float32, follow_links: bool = False) -> tuple[Llava, Params]:
    """Load a model: a Hugging Face folder, or one that ``splitq convert`` or ``splitq quantize`` wrote.

    Args:
      folder: the folder.
      dtype: of the parameters; a converted or quantized folder keeps its own.
      follow_links: allow weights that link out of the folder, as in the hub's cache.

    Returns:
      The Flax model and its parameters: ``model.apply({"params": params}, **batch)`` gives logits.

    Raises:
      InputError: what `Weights` and `read_config` refuse; tensors that are missing, extra, of another shape or not finite.
    """
    folder = Path(folder)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"dtype {dtype}: expected float32, bfloat16 or float16; codes come from quantize")
    model = Llava(LlavaConfig.from_hf(read_config(folder)))
    if (folder / PARAMS / MANIFEST).is_file():
        return model, restore(folder / PARAMS)[0]
    return model, _from_tensors(model, Weights(folder, follow_links), dtype, folder)


def _from_tensors(model: Llava, weights: Weights, dtype: Any, folder: Path) -> Params:
    sources, shapes = table(model.config), _shapes(model)
    assert sources.keys() == shapes.keys()
    names: dict[str, str] = {}
    for name in weights.shapes:
        known = canonical(name)
        if known in names:
            raise InputError(f"{folder}: tensors {names[known]!r} and {name!r} are the same one, spelled twice")
        names[known] = name
    _check_names(model.config, names, {n for s in sources.values() for n in s.names}, weights, folder)
    for path, source in sources.items():  # before anything is read
        for name, wanted in zip(source.names, _tensor_shapes(source, shapes[path], model.config), strict=True):
            if weights.shapes[names[name]] != wanted:
                raise InputError(
                    f"{folder}: tensor {names[name]!r} has shape {weights.shapes[names[name]]}; config.json makes it {wanted}"
                )
    tree: Params = {}
    for path, source in sources.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        with np.errstate(over="ignore"):  # refused in the next line
            node[leaf] = jnp.asarray(_fuse([weights.read(names[n]) for n in source.names], source.kind), dtype)
        if not jnp.isfinite(node[leaf]).all():
            raise InputError(
                f"{folder}: {names[source.names[0]]!r} has entries past the range of {jnp.dtype(dtype)}; load it as float32"
            )
    return tree


def _check_names(config: LlavaConfig, names: Mapping[str, str], wanted: set[str], weights: Weights, folder: Path) -> None:
    if missing := sorted(wanted - names.keys()):
        raise InputError(f"{folder}: {len(missing)} tensors are missing, the first is {on_disk(missing[0])!r}; get the files again")
    extra = {n for n in names.keys() - wanted if not UNUSED.match(n) and not _past_the_selected_layer(config, n)}
    if config.tied and "lm_head.weight" in extra:
        extra.discard("lm_head.weight")
        head, embedding = (weights.read(names[n]) for n in ("lm_head.weight", "language_model.embed_tokens.weight"))
        if not np.array_equal(head, embedding):
            raise InputError(
                f"{folder}: {names['lm_head.weight']!r} differs from the embedding, but config.json ties them; set tie_word_embeddings to false"
            )
    if extra:
        first = names[min(extra)]
        raise InputError(
            f"{folder}: {len(extra)} tensors that config.json has no place for, the first is {first!r}; check config.json"
        )


def _past_the_selected_layer(config: LlavaConfig, name: str) -> bool:
    found = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name)
    return found is not None and max(config.feature_layers) <= int(found[1]) < config.vision.num_layers


def _shapes(model: Llava) -> dict[str, tuple[int, ...]]:
    """Return every leaf's shape without making any."""
    c = model.config
    ids = jax.ShapeDtypeStruct((1, c.tokens_per_image), jnp.int32)
    pixels = jax.ShapeDtypeStruct((1, c.vision.num_channels, c.vision.image_size, c.vision.image_size), jnp.float32)
    tree = jax.eval_shape(model.init, jax.random.key(0), ids, pixels)["params"]
    return {"/".join(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _tensor_shapes(source: Source, shape: tuple[int, ...], config: LlavaConfig) -> list[tuple[int, ...]]:
    if source.kind == "linear":
        return [(columns, shape[0]) for columns in source.columns]
    if source.kind == "patch":
        v = config.vision
        return [(v.hidden_size, v.num_channels, v.patch_size, v.patch_size)]
    return [shape] if len(source.names) == 1 else [(columns,) for columns in source.columns]


def _fuse(tensors: list[np.ndarray], kind: str) -> Float[np.ndarray, "..."]:
    if kind == "plain":
        return tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
    return np.ascontiguousarray(np.concatenate([t.reshape(t.shape[0], -1) for t in tensors]).T)


def export(out: str | Path, config: Mapping[str, Any], params: Params, files: Mapping[str, bytes]) -> Path:
    """Write float parameters as a Hugging Face folder, which transformers and `load` read alike; whole or not at all.

    Args:
      out: the folder; it must not exist.
      config: ``config.json``.
      params: the float tree of that config, float32 or bfloat16.
      files: further files by name: tokenizer, processor.

    Raises:
      InputError: the folder exists; the vision tower is cut after the selected layer, so that the rest is lost; parameters that are
        quantized, missing, extra, of another shape or not finite; a disk that cannot be written.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise InputError(f"{out}: exists; give another folder")
    if wrong := [n for n in files if Path(n).name != n or n in {"", "..", SINGLE, "config.json"}]:
        raise InputError(f"{out}: file {wrong[0]!r}; expected plain names beside {SINGLE} and config.json")
    c = LlavaConfig.from_hf(dict(config))
    if max(c.feature_layers) != c.vision.num_layers:
        raise InputError(
            f"vision tower: {max(c.feature_layers)} of {c.vision.num_layers} layers are kept; only a whole tower can be exported"
        )
    leaves = _float_leaves(params, _shapes(Llava(c)))
    tensors: dict[str, np.ndarray] = {}
    for path, source in table(c).items():
        value = leaves[path]
        if source.kind == "patch":
            v = c.vision
            tensors[source.names[0]] = value.T.reshape(v.hidden_size, v.num_channels, v.patch_size, v.patch_size)
            continue
        parts = [value] if len(source.names) == 1 else np.split(value, np.cumsum(source.columns)[:-1], axis=-1)
        tensors |= {n: p.T if source.kind == "linear" else p for n, p in zip(source.names, parts, strict=True)}
    width = c.vision.hidden_size  # transformers has the last norm, though LLaVA never reads it
    tensors |= {
        "vision_tower.post_layernorm.weight": np.ones(width, np.float32),
        "vision_tower.post_layernorm.bias": np.zeros(width, np.float32),
    }
    text = json.dumps(config, indent=2)
    draft = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        draft.mkdir(parents=True)
        save_file({on_disk(n): np.ascontiguousarray(t) for n, t in tensors.items()}, draft / SINGLE, {"format": "pt"})
        (draft / "config.json").write_text(text, encoding="utf-8")
        for name, content in files.items():
            (draft / name).write_bytes(content)
        draft.rename(out)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{out}: cannot be written: {e}; choose another folder") from e
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def _float_leaves(params: Params, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return the leaves by path; they are those that the config has, whole and finite."""
    leaves = flatten_dict(params, sep="/")
    if differ := sorted(leaves.keys() ^ shapes.keys()):
        raise InputError(
            f"params: {differ[0]} is {'missing' if differ[0] in shapes else 'nothing that the config has a place for'}"
        )
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(
                f"params: {path} is a {getattr(leaf, 'dtype', type(leaf).__name__)}; only float parameters can be exported"
            )
        if leaf.shape != shapes[path]:
            raise InputError(f"params: {path} has shape {leaf.shape}; the config makes it {shapes[path]}")
        if not jnp.isfinite(leaf).all():
            raise InputError(f"params: {path} has NaN or infinite entries")
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}
