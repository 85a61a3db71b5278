"""Greedy generation: a prefill and one compiled step, with a KV cache of fixed size; for float and quantized parameters alike."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.errors import InputError
from splitq_jax.models.decoder import Context, KVCache, step_mask

Params = dict[str, Any]


def generate(
    model: Any, params: Params, batch: Mapping[str, np.ndarray], max_new_tokens: int, stop_ids: Sequence[int] = ()
) -> list[Int[np.ndarray, " n"]]:
    """Continue each row with its most likely tokens.

    Args:
      model: the Flax model.
      params: float or quantized parameters.
      batch: the model's input, padded on the left (see `Processor`).
      max_new_tokens: a bound on the answer.
      stop_ids: tokens that end a row.

    Returns:
      The new tokens of each row, without the one that ended it.

    Raises:
      InputError: no token asked for; padding on the right; packed rows; what `Llava.check` refuses.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens}: expected at least 1")
    batch = model.prepare(batch)
    model.check_length(batch["input_ids"].shape[1] + max_new_tokens - 1)  # the last one is not read
    if batch.get("segments") is not None:
        raise InputError("segments: packed rows cannot be continued; give one question a row")
    mask = batch.get("attention_mask")
    if mask is not None and not np.asarray(mask)[:, -1].all():
        raise InputError("attention_mask: padding at the end of a row; generation needs it at the start")
    token, state = prefill(model, params, batch, max_new_tokens)
    ended = np.zeros(token.shape, bool)
    columns = []
    for i in range(max_new_tokens):
        host = np.asarray(token)
        ended = ended | np.isin(host, list(stop_ids))
        columns.append(np.where(ended, -1, host))
        if ended.all() or i + 1 == max_new_tokens:
            break
        token, state = step(model, params, token, state)
    rows = np.stack(columns, axis=1)
    return [row[row >= 0] for row in rows]


State = tuple[
    list[KVCache], Bool[Array, "B S"], Int[Array, ""], Int[Array, "B A"]
]  # caches, keys in use, where to write, positions


@partial(jax.jit, static_argnums=(0, 3))
def prefill(model: Any, params: Params, batch: Params, room: int) -> tuple[Int[Array, " B"], State]:
    """Run the prompt and return the first new token; the caches have ``room`` places more."""
    hidden = model.apply({"params": params}, **batch, method="embed")
    x, context = hidden.x, hidden.context
    length = x.shape[1]
    context = context.replace(mask=jnp.pad(context.mask, ((0, 0), (0, 0), (0, 0), (0, room))))
    text = model.config.text
    empty = jnp.zeros((x.shape[0], length + room, text.num_kv_heads, text.head_dim), x.dtype)
    caches = [KVCache(empty, empty) for _ in range(model.config.num_layers)]
    x, caches = _blocks(model, params, x, context, caches, jnp.zeros((), jnp.int32))
    used = jnp.pad(context.valid, ((0, 0), (0, room)))
    return _likeliest(model, params, x), (caches, used, jnp.int32(length), context.positions[:, -1] + 1)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def step(model: Any, params: Params, token: Int[Array, " B"], state: State) -> tuple[Int[Array, " B"], State]:
    """Append one token to every row and return the next."""
    caches, used, at, positions = state
    used = used.at[:, at].set(True)
    everywhere = jnp.ones((token.shape[0], 1), bool)
    context = Context(positions[:, None], step_mask(used, at, model.config.text.window), everywhere, everywhere)
    x = model.apply({"params": params}, token[:, None], method="embed_text")
    x, caches = _blocks(model, params, x, context, caches, at)
    return _likeliest(model, params, x), (caches, used, at + 1, positions + 1)


def _blocks(
    model: Any, params: Params, x: Float[Array, "B L D"], context: Context, caches: list[KVCache], at: Int[Array, ""]
) -> tuple[Float[Array, "B L D"], list[KVCache]]:
    out = []
    for i, cache in enumerate(caches):
        x, new = model.block(i).apply({"params": params["decoder"][f"blocks_{i}"]}, x, context, cache, at)
        x = context.add_deepstack(i, x)
        out.append(new)
    return x, out


def _likeliest(model: Any, params: Params, x: Float[Array, "B L D"]) -> Int[Array, " B"]:
    return jnp.argmax(model.apply({"params": params}, x[:, -1], method="unembed"), axis=-1).astype(jnp.int32)
