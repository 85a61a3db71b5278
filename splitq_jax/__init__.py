"""Post-training quantization of vision-language models in JAX: SplitQ (arXiv 2605.19929) and its baselines."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitq_jax import recipe as recipes
    from splitq_jax.checkpoint import restore, save
    from splitq_jax.errors import InputError
    from splitq_jax.linear import SplitWeight
    from splitq_jax.quantization import freeze, prepare, quantize
    from splitq_jax.recipe import Recipe
    from splitq_jax.summary import effective_bits, summarize

_HOMES = {
    "InputError": "errors",
    "Recipe": "recipe",
    "SplitWeight": "linear",
    "effective_bits": "summary",
    "freeze": "quantization",
    "prepare": "quantization",
    "quantize": "quantization",
    "restore": "checkpoint",
    "save": "checkpoint",
    "summarize": "summary",
}
__all__ = [
    "InputError",
    "Recipe",
    "SplitWeight",
    "effective_bits",
    "freeze",
    "prepare",
    "quantize",
    "recipes",
    "restore",
    "save",
    "summarize",
]


def __getattr__(name: str) -> Any:  # jax is imported on first use: `splitq --help` answers at once
    from importlib import import_module

    if name == "recipes":
        return import_module("splitq_jax.recipe")
    if name in _HOMES:
        return getattr(import_module(f"splitq_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'splitq_jax' has no attribute {name!r}")
