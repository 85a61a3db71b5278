"""The model types that are supported, each in a file of its own, imported when it is asked for."""

import textwrap
from copy import deepcopy
from importlib import import_module
from typing import Any

from splitq_jax.errors import InputError
from splitq_jax.models.layers import check_sizes, check_types
from splitq_jax.models.model import VisionLanguageModel

# model_type in config.json: module, class
FAMILIES = {
    "llava": ("llava", "Llava"),
    "gemma3": ("gemma3", "Gemma3"),
    "idefics3": ("idefics3", "Idefics3"),
    "internvl": ("internvl", "InternVL"),
    "llava_onevision": ("llava_onevision", "LlavaOnevision"),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen25VL"),
    "qwen2_vl": ("qwen2_vl", "Qwen2VL"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VL"),
    "smolvlm": ("idefics3", "Idefics3"),
}


def model_of(config: dict[str, Any]) -> VisionLanguageModel:
    """Return the model of a ``config.json``.

    Raises:
      InputError: a model type or a part that is not supported.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"config.json: model_type {kind!r}; supported are {', '.join(FAMILIES)}")
    module, name = FAMILIES[kind]
    family: type[VisionLanguageModel] = getattr(import_module(f"splitq_jax.models.{module}"), name)
    return family.from_hf(config)


def normalized(config: dict[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` with everything that it leaves out, as transformers' config class of that model type fills it in.

    Raises:
      InputError: parts that are no objects; fields of another type; absurd sizes; what transformers refuses.
    """
    from transformers import AutoConfig

    parts = {name: config[name] for name in ("text_config", "vision_config") if config.get(name) is not None}
    for name, part in ({"top level": config} | parts).items():
        check_types(name, part)
        # transformers makes lists as long as there are layers, and divides by the heads
        asked = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
        check_sizes(name, **{size: part[field] for size, field in asked.items() if field in part})
    silent = {name for name in ("text_config", "vision_config", "tie_word_embeddings") if config.get(name, 0) is None}
    # it writes into the parts that it is given
    fields = deepcopy({k: v for k, v in config.items() if k not in {"model_type", "transformers_version"} | silent})
    try:
        whole: dict[str, Any] = AutoConfig.for_model(config["model_type"], **fields).to_dict()
    except Exception as e:  # it checks with exceptions of many kinds
        raise InputError(f"config.json: {textwrap.shorten(str(e), 200, placeholder=' …')}") from None
    return whole
