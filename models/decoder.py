"""The decoder of the Llama, Qwen and Gemma families: blocks with the four sites ``qkv``, ``o``, ``gate_up``, ``down``, and their context."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.errors import InputError
from splitq_jax.models.cache import Cache
from splitq_jax.models.layers import Linear, RMSNorm, activation, attend, check_sizes
from splitq_jax.models.rope import Rope, rotate

QWEN2 = {"qwen2", "qwen2_vl_text", "qwen2_5_vl_text"}
QWEN3 = {"qwen3", "qwen3_vl_text"}
GEMMA3 = {"gemma3_text"}
KINDS = {"llama", "mistral"} | QWEN2 | QWEN3 | GEMMA3
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class DecoderConfig:
    """The decoder's sizes and what sets its family apart, from ``text_config`` in ``config.json``.

    Attributes:
      ropes: one rotary embedding for each kind of attention: full and, where there is a window, sliding.
      layer_kinds: each block's kind: 0 full, 1 sliding.
      window: tokens that a query of a sliding block sees, itself included; None where all blocks see everything.
      attention_bias: q, k and v have biases.
      output_bias: o has one.
      qk_norm: queries and keys are normalised a head (Qwen3, Gemma 3).
      gemma: norms around attention and MLP on both sides, scaled by ``1 + scale``; embeddings multiplied by the root of the width.
      query_scale: of the scores; None for ``head_dim^-1/2``.
      longest: tokens of the longest sequence, which a dynamic rotary embedding has; None for no bound.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    ropes: tuple[Rope, ...]
    layer_kinds: tuple[int, ...]
    window: int | None
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    gemma: bool
    query_scale: float | None
    longest: int | None = None

    def __post_init__(self) -> None:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        check_sizes("text_config", **{name: getattr(self, name) for name in names})
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"config.json: {self.num_heads} attention heads are no multiple of {self.num_kv_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise InputError(f"config.json: head_dim {self.head_dim} is odd; the rotary embedding needs pairs")
        if len(self.layer_kinds) != self.num_layers:
            raise InputError(f"config.json: layer_types names {len(self.layer_kinds)} layers; there are {self.num_layers}")
        if self.longest is not None:
            check_sizes("text_config", max_position_embeddings=self.longest)
        activation(self.hidden_act)
        for rope in self.ropes:
            rope.axis_of_pair(self.head_dim)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "DecoderConfig":
        """Read Hugging Face's ``text_config``, with Llama's defaults.

        Raises:
          InputError: a decoder, a rotary embedding, a kind of attention or an activation that is not supported.
        """
        kind = config.get("model_type", "llama")
        if kind not in KINDS:
            raise InputError(f"config.json: text model_type {kind!r}; supported are {', '.join(sorted(KINDS))}")
        heads, width = config.get("num_attention_heads", 32), config.get("hidden_size", 4096)
        layers, gemma = config.get("num_hidden_layers", 32), kind in GEMMA3
        check_sizes("text_config", num_layers=layers)
        window, kinds = _windows(config, layers)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = config.get("rope_theta", 10000.0)
        parts = (FULL, SLIDING)[: 1 if window is None else 2] if gemma else (None,) * (1 if window is None else 2)
        ropes = [Rope.from_hf(rope if part is None else rope.get(part) or {}, theta, kind == "qwen3_vl_text") for part in parts]
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.get(name) is not None:
                raise InputError(f"config.json: {name} {config[name]!r}; capped logits are not supported")
        bias = config.get("attention_bias", False)
        return cls(
            vocab_size=config.get("vocab_size", 32000),
            hidden_size=width,
            intermediate_size=config.get("intermediate_size", 11008),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or width // max(heads, 1),
            hidden_act=config.get("hidden_activation" if gemma else "hidden_act", "silu"),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            ropes=tuple(ropes),
            layer_kinds=kinds,
            window=window,
            attention_bias=True if kind in QWEN2 else bias,
            output_bias=False if kind in QWEN2 else bias,
            mlp_bias=config.get("mlp_bias", False),
            qk_norm=kind in QWEN3 | GEMMA3,
            gemma=gemma,
            query_scale=config["query_pre_attn_scalar"] ** -0.5 if gemma else None,
            longest=config.get("max_position_embeddings") if any(r.kind == "dynamic" for r in ropes) else None,
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


def _windows(config: dict[str, Any], layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Return the window and each block's kind of attention."""
    types = config.get("layer_types") or [FULL] * layers
    if not isinstance(types, list | tuple) or any(t not in (FULL, SLIDING) for t in types):
        raise InputError(f"config.json: layer_types {types!r}; expected {FULL} and {SLIDING}")
    if config.get("model_type") == "mistral" and config.get("sliding_window") is not None:
        types = [SLIDING] * layers
    if SLIDING not in types:
        return None, (0,) * len(types)
    window = config.get("sliding_window")
    if type(window) is not int or window < 1:
        raise InputError(f"config.json: sliding_window {window!r}; expected at least 1")
    return window, tuple(int(t == SLIDING) for t in types)


@struct.dataclass
class Context:
    """What every block reads besides the tokens.

    Attributes:
      positions: of the rotary embedding, A of them a token: 1, or 3 with M-RoPE.
      mask: which keys a query may see, for each of K kinds of attention: full and, where the decoder has a window, sliding.
      is_text: tokens that are neither image placeholders nor padding.
      valid: tokens that are not padding.
      deepstack: what is added to the tokens after each of the first S blocks (Qwen3-VL), or None.
    """

    positions: Int[Array, "B L A"]
    mask: Bool[Array, "B K L S"]
    is_text: Bool[Array, "B L"]
    valid: Bool[Array, "B L"]
    deepstack: Float[Array, "B L S D"] | None = None

    def add_deepstack(self, i: int, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Return what the next block reads, given block ``i``'s output."""
        return x if self.deepstack is None or i >= self.deepstack.shape[2] else x + self.deepstack[:, :, i]


class Block(nn.Module):
    """A pre-norm decoder block; ``kind`` 1 attends to a window."""

    config: DecoderConfig
    kind: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context,
        cache: Cache | None = None,
        start: Int[Array, ""] | None = None,
    ) -> Any:
        """Map the tokens; with a cache, they are written into it and (output, cache) is returned.

        Without ``start`` the cache is empty: the tokens come first and see each other. With it, they are written there and see all that
        the cache holds.
        """
        c, text = self.config, context.is_text

        def norm(name: str) -> RMSNorm:
            return RMSNorm(c.rms_norm_eps, c.gemma, name=name)

        h = norm("norm_attn")(x)
        q_width, kv_width = c.layer_columns["qkv"][:2]
        qkv = Linear(q_width + 2 * kv_width, use_bias=c.attention_bias, name="qkv")(h, text)
        q, k, v = (a.reshape(*a.shape[:2], -1, c.head_dim) for a in jnp.split(qkv, [q_width, q_width + kv_width], axis=-1))
        if c.qk_norm:
            q, k = norm("norm_q")(q), norm("norm_k")(k)
        angles = c.ropes[self.kind].angles(context.positions, c.head_dim)
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            cache = cache.write(k, v, 0 if start is None else start)
            k, v = (k, v) if start is None else cache.read()
        h = attend(q, k, v, context.mask[:, self.kind : self.kind + 1], c.query_scale)
        h = Linear(c.hidden_size, use_bias=c.output_bias, name="o")(h, text)
        x = x + (norm("norm_attn_out")(h) if c.gemma else h)
        h = norm("norm_mlp")(x)
        gate, up = jnp.split(Linear(2 * c.intermediate_size, use_bias=c.mlp_bias, name="gate_up")(h, text), 2, axis=-1)
        h = Linear(c.hidden_size, use_bias=c.mlp_bias, name="down")(activation(c.hidden_act)(gate) * up, text)
        x = x + (norm("norm_mlp_out")(h) if c.gemma else h)
        return x if cache is None else (x, cache)


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head."""

    config: DecoderConfig
    tied: bool

    def setup(self) -> None:
        """Create the parts; their names are the parameter tree's."""
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.hidden_size)
        self.blocks = [Block(c, kind) for kind in c.layer_kinds]
        self.norm = RMSNorm(c.rms_norm_eps, c.gemma)
        if not self.tied:
            self.head = Linear(c.vocab_size)

    def embed_tokens(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Embed tokens."""
        x: Float[Array, "B L D"] = self.embed(ids)
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype) if self.config.gemma else x

    def unembed(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Return logits, float32."""
        h = self.norm(x)
        logits = self.embed.attend(h) if self.tied else self.head(h)
        return logits.astype(jnp.float32)

    def __call__(self, x: Float[Array, "B L D"], context: Context) -> Float[Array, "B L V"]:
        """Run the blocks on embedded tokens and return logits."""
        for i, block in enumerate(self.blocks):
            x = context.add_deepstack(i, block(x, context))
        return self.unembed(x)


def causal_mask(
    valid: Bool[Array, "B L"],
    segments: Int[Array, "B L"] | None = None,
    window: int | None = None,
    together: Int[Array, "B L"] | None = None,
) -> Bool[Array, "B K L L"]:
    """Return the masks of keys that come no later, are not padding and, with segments, lie in segment 0 or the query's own.

    Padding attends to itself, so that its softmax is defined.

    Args:
      valid: tokens that are not padding.
      segments: 0 for a shared prefix, s >= 1 for independent continuations of it.
      window: a second mask is appended that sees so many of the last tokens only.
      together: tokens of the same number >= 0 see each other both ways, the earlier ones within the window (Gemma's images); -1 for
        all others.
    """
    batch, length = valid.shape
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    order = jnp.broadcast_to(jnp.arange(length), valid.shape)
    if segments is not None:  # a continuation goes on where the prefix ends, however far behind it lies in the row
        alike = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
        order = jnp.sum(causal & alike, axis=-1)
    seen = causal & valid[:, None, :]  # B L L
    if together is not None:
        seen = seen | ((together[:, :, None] == together[:, None, :]) & ((together >= 0) & valid)[:, None, :])
    if segments is not None:
        seen = seen & alike
    near = [seen] if window is None else [seen, seen & (order[:, :, None] - order[:, None, :] < window)]
    mask = jnp.stack(near, axis=1)  # B K L L
    return mask | jnp.eye(length, dtype=bool)[None, None]


def step_mask(used: Bool[Array, "B S"], at: Int[Array, ""], window: int | None) -> Bool[Array, "B K 1 S"]:
    """Return the masks of one new token at place ``at`` of the caches."""
    masks = [used] if window is None else [used, used & (jnp.arange(used.shape[1]) > at - window)[None]]
    return jnp.stack(masks, axis=1)[:, :, None]
