"""What each quantized site loses on its own: its float input through the float and the quantized weight."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from splitq_jax.calib.blocks import Batch, Hidden, Params, after, block_name, block_params, embed
from splitq_jax.linear import linear
from splitq_jax.numerics import in_float32
from splitq_jax.quantization import kernels


@in_float32
def site_errors(model: Any, params: Params, quantized: Params, batches: Iterable[Batch]) -> dict[str, float]:
    """Return ``sum |X W - Y|^2 / sum |X W|^2`` of every decoder site, over the tokens that are not padding.

    Args:
      model: the Flax model.
      params: its float parameters; they give each site its input.
      quantized: the tree to judge.
      batches: the model's input.

    Raises:
      InputError: an empty set.
    """
    hiddens = list(embed(model, params, batches))
    errors: dict[str, float] = {}
    for i in range(model.config.num_layers):
        p, q = jax.device_put((block_params(params, i), block_params(quantized, i)))
        outs, parts = [], []
        for hidden in hiddens:
            y, sums = _sums(model.block(i))(p, q, hidden.x, hidden.context)
            outs.append(after(i, Hidden(np.asarray(y), hidden.context)))
            parts.append({name: np.asarray(s, np.float64) for name, s in sums.items()})
        total: Mapping[str, np.ndarray] = {name: sum(part[name] for part in parts) for name in parts[0]}  # type: ignore[misc]
        errors |= {f"{block_name(i)}/{name}": float(s[0] / s[1]) for name, s in total.items()}
        hiddens = outs
    return errors


@cache
def _sums(block: Any) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Return a function that gives a block's output and, a site, the squared error of its codes and its squared output."""

    @jax.jit
    def run(p: Params, q: Params, x: jax.Array, context: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        y, state = block.apply({"params": p}, x, context, mutable=["inputs"])
        weights, codes = kernels(p), kernels(q)
        sums = {}
        for name, w in weights.items():
            (site_input,) = state["inputs"][name]["kernel"]
            exact = jnp.where(context.valid[..., None], linear(site_input, w), 0)
            found = jnp.where(context.valid[..., None], linear(site_input, codes[name], context.is_text), 0)
            sums[name] = jnp.stack([jnp.sum((exact - found) ** 2), jnp.sum(exact**2)])
        return y, sums

    return run
