"""CLIP- and SigLIP-style vision towers, as Hugging Face's ``CLIPVisionModel`` and ``SiglipVisionModel`` up to the selected layer."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.errors import InputError
from splitq_jax.models.layers import LayerNorm, Linear, activation, attend, check_sizes


def check_tower(c: Any) -> None:
    """Check the sizes and the activation of a tower's config.

    Raises:
      InputError: sizes that are absurd or do not fit each other; an activation that is not supported.
    """
    names = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_channels")
    check_sizes("vision_config", **{name: getattr(c, name) for name in names})
    activation(c.hidden_act)
    if c.hidden_size % c.num_heads:
        raise InputError(f"config.json: vision hidden_size {c.hidden_size} is no multiple of its {c.num_heads} heads")
    if c.patch_size > c.image_size:
        raise InputError(f"config.json: vision patch_size {c.patch_size} is larger than image_size {c.image_size}")


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower, from ``vision_config`` in ``config.json``."""

    kind: str  # "clip_vision_model" | "siglip_vision_model"
    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    hidden_act: str
    layer_norm_eps: float
    num_channels: int = 3

    def __post_init__(self) -> None:
        check_tower(self)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "VisionConfig":
        """Read Hugging Face's ``vision_config``, with its defaults.

        Raises:
          InputError: a tower that is not supported.
        """
        kind = config.get("model_type", "clip_vision_model")
        if kind not in {"clip_vision_model", "siglip_vision_model"}:
            raise InputError(f"config.json: vision model_type {kind!r}; supported are clip_vision_model and siglip_vision_model")
        clip = kind == "clip_vision_model"
        return cls(
            kind=kind,
            image_size=config.get("image_size", 224),
            patch_size=config.get("patch_size", 32 if clip else 16),
            hidden_size=config.get("hidden_size", 768),
            intermediate_size=config.get("intermediate_size", 3072),
            num_layers=config.get("num_hidden_layers", 12),
            num_heads=config.get("num_attention_heads", 12),
            hidden_act=config.get("hidden_act", "quick_gelu" if clip else "gelu_pytorch_tanh"),
            layer_norm_eps=config.get("layer_norm_eps", 1e-5 if clip else 1e-6),
            num_channels=config.get("num_channels", 3),
        )

    @property
    def is_clip(self) -> bool:
        """CLIP has a class token, no patch bias, and a norm before the blocks."""
        return self.kind == "clip_vision_model"

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, the class token included."""
        return self.num_patches + self.is_clip


def patches(pixels: Float[Array, "N C H W"], size: int) -> Float[Array, "N P K"]:
    """Cut images into square patches, row by row, each C x size x size flattened; what is left at the right and below is dropped."""
    count, channels, height, width = pixels.shape
    down, across = height // size, width // size
    cropped = pixels[:, :, : down * size, : across * size].reshape(count, channels, down, size, across, size)
    return cropped.transpose(0, 2, 4, 1, 3, 5).reshape(count, down * across, channels * size**2)


class VisionBlock(nn.Module):
    """A pre-norm transformer block with the sites ``qkv``, ``o``, ``fc1``, ``fc2``."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "N T D"], mask: Bool[Array, "N 1 1 T"] | None = None) -> Float[Array, "N T D"]:
        """Map the tokens of N images; ``mask`` says which of them are seen."""
        c = self.config
        h = LayerNorm(c.layer_norm_eps, name="norm_attn")(x)
        qkv = Linear(3 * c.hidden_size, use_bias=True, name="qkv")(h)
        q, k, v = (a.reshape(*a.shape[:2], c.num_heads, -1) for a in jnp.split(qkv, 3, axis=-1))
        x = x + Linear(c.hidden_size, use_bias=True, name="o")(attend(q, k, v, mask))
        h = LayerNorm(c.layer_norm_eps, name="norm_mlp")(x)
        h = activation(c.hidden_act)(Linear(c.intermediate_size, use_bias=True, name="fc1")(h))
        return x + Linear(c.hidden_size, use_bias=True, name="fc2")(h)


class VisionTower(nn.Module):
    """Patch embedding and blocks; ``depth`` blocks are run (a LLaVA that reads layer -2 never runs the last).

    ``last_norm`` normalises the last hidden states.
    """

    config: VisionConfig
    depth: int
    last_norm: bool = False

    @nn.compact
    def __call__(
        self,
        pixels: Float[Array, "N C H W"],
        positions: Int[Array, "N T"] | None = None,
        valid: Bool[Array, "N T"] | None = None,
    ) -> list[Float[Array, "N T D"]]:
        """Return the hidden states before the first block and after each of ``depth`` blocks.

        Args:
          pixels: images of the config's size; of any size where ``positions`` is given.
          positions: each patch's row of the position embedding; None for their order.
          valid: patches that others may see; None for all.

        Raises:
          InputError: images of another size than the position embedding's.
        """
        c = self.config
        size = (c.num_channels, c.image_size, c.image_size)
        if positions is None and pixels.shape[1:] != size:
            raise InputError(f"pixel_values: images of shape {pixels.shape[1:]}; the vision tower takes {size}")
        kernel = self.param("patch", nn.initializers.normal(0.02), (c.num_channels * c.patch_size**2, c.hidden_size))
        x = patches(pixels, c.patch_size).astype(kernel.dtype) @ kernel
        if c.is_clip:
            token = self.param("class", nn.initializers.normal(0.02), (c.hidden_size,)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, c.hidden_size)), x], axis=1)
        else:
            x = x + self.param("patch_bias", nn.initializers.zeros, (c.hidden_size,)).astype(x.dtype).reshape(1, 1, -1)
        position = self.param("position", nn.initializers.normal(0.02), (c.num_tokens, c.hidden_size)).astype(x.dtype)
        x = x + (position[None] if positions is None else position[positions])
        if c.is_clip:
            x = LayerNorm(c.layer_norm_eps, name="norm_pre")(x)
        states, mask = [x], None if valid is None else valid[:, None, None, :]
        for i in range(self.depth):
            states.append(VisionBlock(c, name=f"blocks_{i}")(states[-1], mask))
        if self.last_norm:
            states[-1] = LayerNorm(c.layer_norm_eps, name="norm_post")(states[-1])
        return states
