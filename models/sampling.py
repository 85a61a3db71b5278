"""How the next token is drawn: the likeliest, or by temperature, top-k and top-p (nucleus sampling, arXiv 1904.09751)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.errors import InputError

SHORT = 1024  # candidates that are looked at first: the best few cost a hundredth of sorting a large vocabulary
COLDEST, HOTTEST = 1e-5, 1e5  # temperatures whose quotients stay finite


@struct.dataclass
class Sampling:
    """The numbers are traced, so that other numbers compile nothing anew; what is None costs nothing.

    Attributes:
      temperature: divides the logits; None takes the likeliest token.
      top_k: only the k likeliest tokens are drawn (more where some tie with the last).
      top_p: of these, only the likeliest whose probabilities reach p together, at least one.
    """

    temperature: Float[Array, ""] | None = None
    top_k: Int[Array, ""] | None = None
    top_p: Float[Array, ""] | None = None

    @classmethod
    def of(cls, temperature: float = 0.0, top_p: float = 1.0, top_k: int | None = None) -> "Sampling":
        """Check and take a user's numbers; temperature 0 is greedy, and nothing else then matters.

        Raises:
          InputError: a temperature that is neither 0 nor between 1e-5 and 1e5; top_p outside (0, 1]; top_k below 1.
        """
        if not _is_number(temperature) or not (temperature == 0 or COLDEST <= temperature <= HOTTEST):
            raise InputError(f"temperature {temperature}: expected 0 (greedy) or a number from {COLDEST:g} to {HOTTEST:g}")
        if not _is_number(top_p) or not 0 < top_p <= 1:
            raise InputError(f"top_p {top_p}: expected more than 0 and at most 1")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 < top_k < 1 << 31):
            raise InputError(f"top_k {top_k}: expected at least 1")
        if temperature == 0:
            return cls()
        return cls(
            jnp.float32(temperature),
            None if top_k is None else jnp.int32(top_k),
            None if top_p == 1 else jnp.float32(top_p),
        )

    def draw(self, key: Any, logits: Float[Array, "B V"]) -> Int[Array, " B"]:
        """Return one token a row."""
        if self.temperature is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        scaled = logits / self.temperature
        if self.top_k is None and self.top_p is None:
            return jax.random.categorical(key, scaled, axis=-1).astype(jnp.int32)

        def pick(kept: Float[Array, "B n"], tokens: Int[Array, "B n"]) -> Int[Array, " B"]:
            place = jax.random.categorical(key, kept, axis=-1)
            return jnp.take_along_axis(tokens, place[:, None], axis=-1)[:, 0].astype(jnp.int32)

        kept, tokens, whole = self.candidates(scaled, min(SHORT, scaled.shape[-1]))
        if kept.shape == scaled.shape:
            return pick(kept, tokens)
        return jax.lax.cond(whole, lambda: pick(kept, tokens), lambda: pick(*self.candidates(scaled, scaled.shape[-1])[:2]))

    def candidates(self, scaled: Float[Array, "B V"], count: int) -> tuple[Float[Array, "B n"], Int[Array, "B n"], Bool[Array, ""]]:
        """Return the n = ``count`` likeliest tokens, best first.

        Returns:
          Their logits, those that are filtered out at minus infinity; their ids; whether nothing past them would be kept.
        """
        values, tokens = jax.lax.top_k(scaled, count)
        keep, total = jnp.ones(values.shape, bool), jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
        if self.top_k is not None:
            last = jax.lax.dynamic_slice_in_dim(values, jnp.minimum(self.top_k, count) - 1, 1, axis=1)
            keep = values >= last
            total = jax.nn.logsumexp(jnp.where(keep, values, -jnp.inf), axis=-1, keepdims=True)
        whole = ~keep[:, -1].any()  # by top_k; without it, by top_p
        if self.top_p is not None:
            share = jnp.where(keep, jnp.exp(values - total), 0)
            better = jnp.cumsum(share, axis=-1) - share  # of all tokens before it
            keep = keep & (better < self.top_p).at[:, 0].set(True)
            whole = ~keep[:, -1].any() if self.top_k is None else whole
        return jnp.where(keep, values, -jnp.inf), tokens, whole


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
