"""The Llama decoder: blocks with the four sites ``qkv``, ``o``, ``gate_up``, ``down``, and the context that they share."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.lax import dynamic_update_slice
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.errors import InputError
from splitq_jax.models.layers import LARGEST_NUMBER, Linear, RMSNorm, activation, attend, check_sizes, rotate

# the numbers that each type of rotary embedding needs besides rope_theta
ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder, from ``text_config`` in ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    rope: tuple[tuple[str, Any], ...]  # sorted items of rope_parameters
    attention_bias: bool
    mlp_bias: bool

    def __post_init__(self) -> None:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        check_sizes("text_config", **{name: getattr(self, name) for name in names})
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"config.json: {self.num_heads} attention heads are no multiple of {self.num_kv_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise InputError(f"config.json: head_dim {self.head_dim} is odd; the rotary embedding needs pairs")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "DecoderConfig":
        """Read Hugging Face's ``text_config``, with Llama's defaults.

        Raises:
          InputError: a decoder or a rotary embedding that is not supported.
        """
        kind = config.get("model_type", "llama")
        if kind != "llama":
            raise InputError(f"config.json: text model_type {kind!r}; supported is llama")
        heads, width = config.get("num_attention_heads", 32), config.get("hidden_size", 4096)
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
        if rope["rope_type"] not in list(ROPE):
            raise InputError(f"config.json: rope_type {rope['rope_type']!r}; supported are {', '.join(ROPE)}")
        wanted = ("rope_theta", *ROPE[rope["rope_type"]])
        if rope.keys() - {"rope_type"} != set(wanted) or not all(
            type(rope[n]) in {int, float} and 0 < rope[n] < LARGEST_NUMBER for n in wanted
        ):
            raise InputError(
                f"config.json: rope_parameters {rope}; a {rope['rope_type']} one has positive numbers {', '.join(wanted)}"
            )
        return cls(
            vocab_size=config.get("vocab_size", 32000),
            hidden_size=width,
            intermediate_size=config.get("intermediate_size", 11008),
            num_layers=config.get("num_hidden_layers", 32),
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or width // max(heads, 1),
            hidden_act=config.get("hidden_act", "silu"),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=tuple(sorted(rope.items())),
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
        )

    @property
    def layer_columns(self) -> dict[str, tuple[int, ...]]:
        """Output sizes of the layers that each site fuses."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "qkv": (q, kv, kv),
            "o": (self.hidden_size,),
            "gate_up": (self.intermediate_size, self.intermediate_size),
            "down": (self.hidden_size,),
        }

    @property
    def frequencies(self) -> Float[np.ndarray, " d_2"]:
        """Rotary frequencies, radians a position, scaled as ``rope_type`` says."""
        rope = dict(self.rope)
        inverse = 1.0 / rope["rope_theta"] ** (np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)
        if rope["rope_type"] == "linear":
            inverse = inverse / rope["factor"]
        if rope["rope_type"] == "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            turns = rope["original_max_position_embeddings"] * inverse / (2 * math.pi)
            smooth = np.clip((turns - low) / (high - low), 0, 1)
            inverse = (1 - smooth) * inverse / rope["factor"] + smooth * inverse
        return np.asarray(inverse, np.float32)


@struct.dataclass
class Context:
    """What every block reads besides the tokens.

    Attributes:
      positions: of the rotary embedding.
      mask: which keys a query may see.
      is_text: tokens that are neither image placeholders nor padding.
      valid: tokens that are not padding.
    """

    positions: Int[Array, "B L"]
    mask: Bool[Array, "B 1 L S"]
    is_text: Bool[Array, "B L"]
    valid: Bool[Array, "B L"]


@struct.dataclass
class KVCache:
    """Keys and values of one block, preallocated for S tokens."""

    k: Float[Array, "B S G d"]
    v: Float[Array, "B S G d"]


class Block(nn.Module):
    """A pre-norm decoder block."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context,
        cache: KVCache | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> Any:
        """Map the tokens; with a cache, L new tokens are written at ``start`` and (output, cache) is returned."""
        c, text = self.config, context.is_text
        h = RMSNorm(c.rms_norm_eps, name="norm_attn")(x)
        q_width, kv_width = c.layer_columns["qkv"][:2]
        qkv = Linear(q_width + 2 * kv_width, use_bias=c.attention_bias, name="qkv")(h, text)
        q, k, v = (a.reshape(*a.shape[:2], -1, c.head_dim) for a in jnp.split(qkv, [q_width, q_width + kv_width], axis=-1))
        frequencies = jnp.asarray(c.frequencies)
        q, k = (rotate(a, context.positions, frequencies, 1.0) for a in (q, k))
        if cache is not None:
            zero = jnp.zeros((), jnp.int32)
            at = (zero, jnp.asarray(start, jnp.int32), zero, zero)
            cache = KVCache(
                dynamic_update_slice(cache.k, k.astype(cache.k.dtype), at),
                dynamic_update_slice(cache.v, v.astype(cache.v.dtype), at),
            )
            k, v = cache.k, cache.v
        x = x + Linear(c.hidden_size, use_bias=c.attention_bias, name="o")(attend(q, k, v, context.mask), text)
        h = RMSNorm(c.rms_norm_eps, name="norm_mlp")(x)
        gate, up = jnp.split(Linear(2 * c.intermediate_size, use_bias=c.mlp_bias, name="gate_up")(h, text), 2, axis=-1)
        x = x + Linear(c.hidden_size, use_bias=c.mlp_bias, name="down")(activation(c.hidden_act)(gate) * up, text)
        return x if cache is None else (x, cache)


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head."""

    config: DecoderConfig
    tied: bool

    def setup(self) -> None:
        """Create the parts; their names are the parameter tree's."""
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.hidden_size)
        self.blocks = [Block(c) for _ in range(c.num_layers)]
        self.norm = RMSNorm(c.rms_norm_eps)
        if not self.tied:
            self.head = Linear(c.vocab_size)

    def unembed(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Return logits, float32."""
        h = self.norm(x)
        logits = self.embed.attend(h) if self.tied else self.head(h)
        return logits.astype(jnp.float32)

    def __call__(self, x: Float[Array, "B L D"], context: Context) -> Float[Array, "B L V"]:
        """Run the blocks on embedded tokens and return logits."""
        for block in self.blocks:
            x = block(x, context)
        return self.unembed(x)


def causal_mask(valid: Bool[Array, "B L"], segments: Int[Array, "B L"] | None = None) -> Bool[Array, "B 1 L L"]:
    """Return the mask of keys that come no later, are not padding and, with segments, lie in segment 0 or the query's own.

    Padding attends to itself, so that its softmax is defined.
    """
    length = valid.shape[1]
    order = jnp.arange(length)
    mask = (order[:, None] >= order[None, :])[None] & valid[:, None, :]
    if segments is not None:
        mask = mask & ((segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None]))
    return (mask | jnp.eye(length, dtype=bool)[None])[:, None]
