"""The model types that are supported, each in a file of its own, imported when it is asked for."""

from copy import deepcopy
from importlib import import_module
from typing import Any

from splitq_jax.errors import InputError
from splitq_jax.models.model import VisionLanguageModel

# model_type in config.json: module, class
FAMILIES = {
    "llava": ("llava", "Llava"),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen25VL"),
    "qwen2_vl": ("qwen2_vl", "Qwen2VL"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VL"),
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
      InputError: what transformers refuses.
    """
    from transformers import AutoConfig

    # transformers writes into the parts that it is given
    fields = {k: deepcopy(v) for k, v in config.items() if k not in {"model_type", "transformers_version"}}
    try:
        whole: dict[str, Any] = AutoConfig.for_model(config["model_type"], **fields).to_dict()
    except Exception as e:  # it checks with exceptions of many kinds
        raise InputError(f"config.json: {e}") from None
    return whole
