"""What the families share: linear layers that take typed leaves, norms, grouped attention."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from splitq_jax.errors import InputError
from splitq_jax.linear import linear

SCORES = 1 << 27  # of an attention that are held at once: 0.5 GB in float32
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def activation(name: str) -> Callable[[Array], Array]:
    """Return an activation by Hugging Face's name.

    Raises:
      InputError: a name that is not supported.
    """
    if name not in ACTIVATIONS:
        raise InputError(f"config.json: activation {name!r}; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


LARGEST = 1 << 24  # of any size in a config.json; the largest vocabularies have 2^18
DEEPEST = 1 << 10  # of any number of layers
LARGEST_NUMBER = 1 << 31  # of any epsilon or rotary base

# a JSON string is true, and JSON has one kind of number: what is read is checked for its type
FIELDS: dict[str, tuple[type, ...]] = {
    "model_type": (str,),
    "hidden_act": (str,),
    "projector_hidden_act": (str,),
    "vision_feature_select_strategy": (str,),
    "attention_bias": (bool,),
    "mlp_bias": (bool,),
    "multimodal_projector_bias": (bool,),
    "tie_word_embeddings": (bool,),
    "image_token_id": (int,),
    "image_token_index": (int,),
    "hidden_size": (int,),
    "num_attention_heads": (int,),
    "rms_norm_eps": (float, int),
    "layer_norm_eps": (float, int),
    "rope_theta": (float, int),
    "rope_parameters": (dict,),
    "rope_scaling": (dict,),
}
NULLABLE = {"rope_parameters", "rope_scaling", "tie_word_embeddings"}


def check_sizes(part: str, **sizes: Any) -> None:
    """Check the sizes of a config.

    Raises:
      InputError: a size that is not a positive integer below 2^24; 2^10 layers or more.
    """
    for name, size in sizes.items():
        limit = DEEPEST if name == "num_layers" else LARGEST
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < limit:
            raise InputError(f"config.json: {part} has {name}={size!r}; expected a positive integer below {limit}")


def check_types(part: str, config: Any) -> None:
    """Check the types of a config's fields.

    Raises:
      InputError: no object; a field of another type; a number that is negative, not finite or 2^31 or more.
    """
    if not isinstance(config, dict):
        raise InputError(f"config.json: {part} is a {type(config).__name__}; expected an object")
    for name in FIELDS.keys() & config.keys():
        value, kinds = config[name], FIELDS[name]
        if value is None and name in NULLABLE:
            continue
        if type(value) not in kinds or (float in kinds and not 0 <= value < LARGEST_NUMBER):
            raise InputError(f"config.json: {part} has {name}={value!r}; expected {kinds[0].__name__}")


class Linear(nn.Module):
    """``x W + b``; the kernel may be an array or a typed (quantized) leaf, and is then not checked for its shape.

    The input is sown into the collection ``inputs`` for calibration.
    """

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B K"], is_text: Bool[Array, "*B"] | None = None) -> Float[Array, "*B N"]:
        """Multiply; ``is_text`` goes to the leaf."""
        self.sow("inputs", "kernel", x)
        if self.is_initializing():
            kernel: Any = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        else:
            kernel = self.get_variable("params", "kernel")
        y = linear(x, kernel, is_text)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32; ``centered`` scales by ``1 + scale``, in float32 too (Gemma)."""

    eps: float
    centered: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).reshape((1,) * (x.ndim - 1) + (-1,))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + self.eps)
        if self.centered:
            return (y * (1 + scale.astype(jnp.float32))).astype(x.dtype)
        return y.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + self.eps)
        shape = (1,) * (x.ndim - 1) + (-1,)
        return (y * scale.astype(jnp.float32).reshape(shape) + bias.astype(jnp.float32).reshape(shape)).astype(x.dtype)


def attend(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B S G d"],
    v: Float[Array, "B S G d"],
    mask: Bool[Array, "#B 1 #L S"] | None,
    scale: float | None = None,
) -> Float[Array, "B L D"]:
    """Attention with H query heads over G key/value heads; softmax in float32; ``scale`` is ``d^-1/2`` unless given.

    Queries take turns where all scores at once would be more than `SCORES`: those of a large image or a long prompt.
    """
    batch, length, heads, size = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, size)
    factor = size**-0.5 if scale is None else scale

    def some(q: Float[Array, "B l G r d"], mask: Bool[Array, "#B 1 #l S"] | None) -> Float[Array, "B l G r d"]:
        scores = jnp.einsum("blgrd,bsgd->bgrls", q, k).astype(jnp.float32) * factor
        if mask is not None:
            scores = jnp.where(mask[:, :, None], scores, np.finfo(np.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bgrls,bsgd->blgrd", weights, v)

    turns = -(-batch * heads * length * k.shape[1] // SCORES)
    if turns <= 1:
        return some(grouped, mask).reshape(batch, length, heads * size)
    share = -(-length // turns)

    def cut(array: Array, axis: int) -> Array:
        """Bring the turns to the front, the last one filled up."""
        widths = [(0, turns * share - length if i == axis else 0) for i in range(array.ndim)]
        shape = (*array.shape[:axis], turns, share, *array.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(array, widths).reshape(shape), axis, 0)

    turn = jax.checkpoint(some)  # gradients make the scores again instead of keeping them
    if mask is not None and mask.shape[2] > 1:
        parts = jax.lax.map(lambda part: turn(*part), (cut(grouped, 1), cut(mask, 2)))
    else:
        parts = jax.lax.map(lambda part: turn(part, mask), cut(grouped, 1))
    return jnp.moveaxis(parts, 0, 1).reshape(batch, turns * share, heads * size)[:, :length]
