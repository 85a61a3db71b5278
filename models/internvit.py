"""InternViT (arXiv 2312.14238), the vision tower of InternVL, as Hugging Face's ``InternVLVisionModel`` up to the selected layer."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from splitq_jax.errors import InputError
from splitq_jax.models.layers import LayerNorm, Linear, RMSNorm, activation, attend
from splitq_jax.models.vision import check_tower, patches

NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}
QK_EPS = 1e-6  # of the norms of queries and keys


@dataclass(frozen=True)
class InternViTConfig:
    """The vision tower's sizes and what sets its models apart, from ``vision_config`` in ``config.json``.

    Attributes:
      norm: ``layer_norm`` or ``rms_norm``.
      qkv_bias: q, k and v have biases.
      qk_norm: queries and keys are normalised, all heads at once.
      has_positions: patches have learned positions.
      has_mask_token: the files have a token that training puts over patches; it is never read.
      has_last_norm: the files have a norm of the last block's output.
    """

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_channels: int
    hidden_act: str
    norm: str
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    has_positions: bool
    has_mask_token: bool
    has_last_norm: bool

    def __post_init__(self) -> None:
        check_tower(self)
        if self.norm not in NORMS:
            raise InputError(f"config.json: vision norm_type {self.norm!r}; supported are {', '.join(NORMS)}")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "InternViTConfig":
        """Read a `normalized` ``vision_config``.

        Raises:
          InputError: images or patches that are no squares.
        """
        for name in ("image_size", "patch_size"):
            if len(config[name]) != 2 or config[name][0] != config[name][1]:
                raise InputError(f"config.json: vision {name} {list(config[name])}; only squares are supported")
        return cls(
            image_size=config["image_size"][0],
            patch_size=config["patch_size"][0],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_channels=config["num_channels"],
            hidden_act=config["hidden_act"],
            norm=config["norm_type"],
            norm_eps=config["layer_norm_eps"],
            qkv_bias=config["attention_bias"],
            qk_norm=config["use_qk_norm"],
            has_positions=config["use_absolute_position_embeddings"],
            has_mask_token=config["use_mask_token"],
            has_last_norm=not config["use_mean_pooling"],
        )

    @property
    def side(self) -> int:
        """Patches along an image's side."""
        return self.image_size // self.patch_size


class InternViTBlock(nn.Module):
    """A pre-norm block whose two branches are scaled channel by channel."""

    config: InternViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        """Map the tokens of N images."""
        c = self.config

        def scaled(name: str, branch: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
            return branch * self.param(name, nn.initializers.ones, (c.hidden_size,)).astype(x.dtype).reshape(1, 1, -1)

        h = NORMS[c.norm](c.norm_eps, name="norm_attn")(x)
        q, k, v = jnp.split(Linear(3 * c.hidden_size, use_bias=c.qkv_bias, name="qkv")(h), 3, axis=-1)
        if c.qk_norm:
            q, k = RMSNorm(QK_EPS, name="norm_q")(q), RMSNorm(QK_EPS, name="norm_k")(k)
        q, k, v = (a.reshape(*a.shape[:2], c.num_heads, -1) for a in (q, k, v))
        x = x + scaled("scale_attn", Linear(c.hidden_size, use_bias=True, name="o")(attend(q, k, v, None)))
        h = NORMS[c.norm](c.norm_eps, name="norm_mlp")(x)
        h = activation(c.hidden_act)(Linear(c.intermediate_size, use_bias=True, name="fc1")(h))
        return x + scaled("scale_mlp", Linear(c.hidden_size, use_bias=True, name="fc2")(h))


class InternViT(nn.Module):
    """Patch embedding with a class token, and ``depth`` blocks."""

    config: InternViTConfig
    depth: int
    norm_last: bool

    @nn.compact
    def __call__(self, pixels: Float[Array, "N C H W"]) -> Float[Array, "N P D"]:
        """Return the features of the patches."""
        c, init = self.config, nn.initializers.normal(0.02)
        kernel = self.param("patch", init, (c.num_channels * c.patch_size**2, c.hidden_size))
        x = patches(pixels, c.patch_size).astype(kernel.dtype) @ kernel
        x = x + self.param("patch_bias", nn.initializers.zeros, (c.hidden_size,)).astype(x.dtype).reshape(1, 1, -1)
        token = self.param("class", init, (1, 1, c.hidden_size)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, c.hidden_size)), x], axis=1)
        if c.has_positions:
            x = x + self.param("position", init, (1, c.side**2 + 1, c.hidden_size)).astype(x.dtype)
        for i in range(self.depth):
            x = InternViTBlock(c, name=f"blocks_{i}")(x)
        return (LayerNorm(c.norm_eps, name="norm_post")(x) if self.norm_last else x)[:, 1:]
