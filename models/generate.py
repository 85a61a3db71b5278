"""Generation: a prefill and a compiled loop of steps on preallocated caches; for float and quantized parameters alike."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.errors import InputError
from splitq_jax.kernels.layout import native
from splitq_jax.models.cache import KV_BITS, Cache, empty
from splitq_jax.models.decoder import Context, step_mask
from splitq_jax.models.sampling import Sampling
from splitq_jax.sharding import on_mesh_of

Params = dict[str, Any]
MOST_TOKENS = 1 << 20  # of an answer
NONE = -1  # no token: what stands behind the end of a row
PER_TOKEN = ("attention_mask", "positions", "mm_token_type_ids", "token_type_ids")  # a processor's arrays (B, L) besides the tokens


def generate(
    model: Any,
    params: Params,
    batch: Mapping[str, np.ndarray],
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    kv_bits: int = 16,
    on_token: Callable[[Int[np.ndarray, " B"]], Any] | None = None,
) -> list[Int[np.ndarray, " n"]]:
    """Continue each row until it ends.

    Lengths are rounded up, so that prompts and answers of about the same length share what was compiled; without ``on_token`` the
    device makes all tokens before the host reads any.

    Args:
      model: the Flax model.
      params: float or quantized parameters.
      batch: the model's input, padded on the left (see `Processor`).
      max_new_tokens: a bound on the answer.
      stop_ids: tokens that end a row.
      temperature: 0 takes the likeliest token; else the logits are divided by it and a token is drawn.
      top_p: draw from the likeliest tokens whose probabilities reach this together.
      top_k: draw from the k likeliest tokens.
      seed: of the draws.
      kv_bits: 8 keeps keys and values as int8 codes with a scale per token and head; 16 as they are.
      on_token: called after each step with the row's new tokens, one a row, -1 for rows that have ended.

    Returns:
      The new tokens of each row, without the one that ended it.

    Raises:
      InputError: no token asked for; padding on the right; packed rows; numbers out of range; what the model's ``prepare`` refuses.
    """
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int | np.integer)
        or not 1 <= max_new_tokens <= MOST_TOKENS
    ):
        raise InputError(f"max_new_tokens {max_new_tokens}: expected 1 to {MOST_TOKENS:,}")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 32:
        raise InputError(f"seed {seed}: expected 0 to 2^32 - 1")
    if kv_bits not in KV_BITS:
        raise InputError(f"kv_bits {kv_bits}: supported are 8 (codes) and 16 (the model's floats)")
    sampling, stops = Sampling.of(temperature, top_p, top_k), _stops(stop_ids)
    model.check(batch)
    if batch.get("segments") is not None:
        raise InputError("segments: packed rows cannot be continued; give one question a row")
    mask = batch.get("attention_mask")
    if mask is not None and not np.asarray(mask)[:, -1].all():
        raise InputError("attention_mask: padding at the end of a row; generation needs it at the start")
    model.check_length(np.shape(batch["input_ids"])[1] + int(max_new_tokens) - 1)  # the last one is not read
    length = _round_up(np.shape(batch["input_ids"])[1])
    prepared = model.prepare(_pad_left(batch, length, model.config.placeholders))
    room = _round_up(length + int(max_new_tokens))
    with on_mesh_of(params):
        params = native(params)
        state = prefill(model, params, prepared, sampling, stops, jax.random.key(seed), room, kv_bits)
        end = length + int(max_new_tokens)
        if on_token is None:
            state = advance(model, params, state, sampling, stops, end)
        else:
            on_token(_column(state, length))
            for until in range(length + 2, end + 1):
                if np.asarray(state.ended).all():
                    break
                state = advance(model, params, state, sampling, stops, until)
                on_token(_column(state, until - 1))
    rows = np.asarray(state.tokens)[:, length : int(state.at) + 1]
    return [row[row != NONE] for row in rows]


@struct.dataclass
class State:
    """Between two steps: place ``at`` of ``tokens`` holds each row's last token, whose key and value are not in the caches yet.

    Attributes:
      caches: one a block.
      used: the caches' places that hold a token.
      tokens: what was generated, at the places of the caches; -1 behind a row's end.
      at: the last token's place.
      turns: the last token's positions in the rotary embedding.
      ended: rows that have met a stop token.
      key: of the draws to come.
    """

    caches: list[Cache]
    used: Bool[Array, "B S"]
    tokens: Int[Array, "B S"]
    at: Int[Array, ""]
    turns: Int[Array, "B A"]
    ended: Bool[Array, " B"]
    key: Any


@partial(jax.jit, static_argnums=(0, 6, 7))
def prefill(
    model: Any, params: Params, batch: Params, sampling: Sampling, stops: Int[Array, " E"], key: Any, room: int, kv_bits: int
) -> State:
    """Run the prompt and draw the first new token; caches have ``room`` places, the prompt's included."""
    hidden = model.apply({"params": params}, **batch, method="embed")
    context, (rows, length) = hidden.context, hidden.x.shape[:2]
    text = model.config.text
    shape = (rows, room, text.num_kv_heads, text.head_dim)
    caches: list[Cache] = [empty(shape, hidden.x.dtype, kv_bits) for _ in range(model.config.num_layers)]
    x, caches = _blocks(model, params, hidden.x, context, caches, None)
    state = State(
        caches,
        used=jnp.pad(context.valid, ((0, 0), (0, room - length))),
        tokens=jnp.full((rows, room), NONE, jnp.int32),
        at=jnp.int32(length - 1),
        turns=context.positions[:, -1],
        ended=jnp.zeros(rows, bool),
        key=key,
    )
    return _append(model, params, x, state, sampling, stops)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(
    model: Any, params: Params, state: State, sampling: Sampling, stops: Int[Array, " E"], until: Int[Array, ""] | int
) -> State:
    """Append tokens until place ``until`` - 1 holds one or all rows have ended, without a word to the host."""
    text = model.config.text

    def step(state: State) -> State:
        at = state.at
        last = jnp.maximum(jax.lax.dynamic_slice_in_dim(state.tokens, at, 1, axis=1), 0)
        used = jax.lax.dynamic_update_slice_in_dim(state.used, jnp.ones_like(last, bool), at, axis=1)
        everywhere = jnp.ones_like(last, bool)
        context = Context(state.turns[:, None], step_mask(used, at, text.window), everywhere, everywhere)
        x = model.apply({"params": params}, last, method="embed_text")
        x, caches = _blocks(model, params, x, context, state.caches, at)
        return _append(model, params, x, replace(state, caches=caches, used=used), sampling, stops)

    return jax.lax.while_loop(lambda s: (s.at + 1 < until) & ~s.ended.all(), step, state)


def _append(
    model: Any, params: Params, x: Float[Array, "B L D"], state: State, sampling: Sampling, stops: Int[Array, " E"]
) -> State:
    """Draw each row's next token from the last hidden state."""
    logits = model.apply({"params": params}, x[:, -1], method="unembed")
    key, now = jax.random.split(state.key)
    token = sampling.draw(now, logits)
    ended = state.ended | jnp.isin(token, stops)
    column = jnp.where(ended, NONE, token)[:, None]
    tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, column, state.at + 1, axis=1)
    return replace(state, tokens=tokens, at=state.at + 1, turns=state.turns + 1, ended=ended, key=key)


def _blocks(
    model: Any, params: Params, x: Float[Array, "B L D"], context: Context, caches: list[Cache], at: Int[Array, ""] | None
) -> tuple[Float[Array, "B L D"], list[Cache]]:
    out = []
    for i, cache in enumerate(caches):
        x, new = model.block(i).apply({"params": params["decoder"][f"blocks_{i}"]}, x, context, cache, at)
        x = context.add_deepstack(i, x)
        out.append(new)
    return x, out


def _column(state: State, at: int) -> Int[np.ndarray, " B"]:
    return np.asarray(jax.lax.dynamic_index_in_dim(state.tokens, at, 1, keepdims=False))


def _round_up(length: int) -> int:
    """Round to a multiple of 32 or, beyond 256, of an eighth to a quarter of the length."""
    step = max(32, (1 << length.bit_length()) // 8)
    return -(-length // step) * step


def _pad_left(batch: Mapping[str, Any], length: int, placeholders: Collection[int]) -> dict[str, Any]:
    """Return the batch with rows of ``length`` tokens, those in front masked."""
    ids = np.asarray(batch["input_ids"])
    gap = length - ids.shape[1]
    filler = next(i for i in range(len(placeholders) + 1) if i not in placeholders)  # masked, but it must not ask for a feature
    mask = batch.get("attention_mask")
    out = {"attention_mask": np.ones(ids.shape, bool) if mask is None else np.asarray(mask).astype(bool)}
    out |= {k: np.asarray(batch[k]) for k in PER_TOKEN[1:] if batch.get(k) is not None}
    padded = {k: np.pad(v, ((0, 0), (gap, 0), *((0, 0),) * (v.ndim - 2))) for k, v in out.items()}
    return {**batch, **padded, "input_ids": np.pad(ids, ((0, 0), (gap, 0)), constant_values=filler)}


def _stops(ids: Collection[int]) -> Int[np.ndarray, " E"]:
    """Return the ids in an array whose size hardly ever changes."""
    if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in ids):
        raise InputError(f"stop_ids {ids!r}: expected token ids")
    found = sorted(int(i) for i in ids)
    return np.array(found + [NONE] * (8 if not found else -len(found) % 8), np.int32)
