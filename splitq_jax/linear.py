"""`linear`: the one place where a model meets a weight, and `SplitWeight`, the weight held as packed codes.

This is the reference path: integer dot products in XLA with one rescale per token and per output channel.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.numerics import FLOAT_BITS, encode, scale_of
from splitq_jax.qtensor import QTensor, integer_dot
from splitq_jax.site import RoundedSplit, TrainableSplit, round_weights, rounded_linear, served_by_mac, split
from splitq_jax.transforms import Transform, apply


@struct.dataclass
class Group:
    """One group of K input channels: ``Q(X_j P_j) Q(P_j^-1 W_j)``.

    Attributes:
      transform: ``P_j``.
      a_clip: LAC's two factors (maximum, minimum) or None.
      w: the codes of ``P_j^-1 W_j`` (main group: less CWS's product), scales per output channel.
      a_bits: bits of the activations.
    """

    transform: Transform
    a_clip: Float[Array, " 2"] | None
    w: QTensor
    a_bits: int = struct.field(pytree_node=False)


@struct.dataclass
class Branch:
    """A low-rank branch: ``u`` with scales per column, ``v`` with scales per row, so both lie along the singular directions."""

    u: QTensor
    v: QTensor


@struct.dataclass
class SplitWeight:
    """A quantized site: the typed leaf that takes a kernel's place in the parameter tree.

    Attributes:
      perm: ``[C_m | C_t | C_v]``, the order in which the input channels are read; None where nothing is split off.
      groups: main, then text and vision where they are not empty.
      cws: ``Q(U_s)``, ``Q(V_s)`` or None.
      mac: ``Q(U_c)``, ``Q(V_c)`` or None.
      mac_tokens: the tokens that MAC serves.
      residual_bits: bits of MAC's activation residual.
    """

    perm: Int[Array, " D"] | None
    groups: tuple[Group, ...]
    cws: Branch | None
    mac: Branch | None
    mac_tokens: str = struct.field(pytree_node=False)
    residual_bits: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int]:
        """``(D, N)`` of the kernel that it replaces."""
        return sum(g.w.rows for g in self.groups), self.groups[0].w.shape[1]


@struct.dataclass
class Lora:
    """A frozen kernel with a trainable low-rank update, ``w + a b`` (LoRA, arXiv 2106.09685); merged before quantization."""

    w: Float[Array, "D N"]
    a: Float[Array, "D r"]
    b: Float[Array, "r N"]


class Tokens(NamedTuple):
    """Activations as int8 codes with a scale per token, or floats with ``scale=None``."""

    values: Array
    scale: Float[Array, "*B 1"] | None

    def decode(self) -> Float[Array, "*B K"]:
        """Return the float activations."""
        return self.values if self.scale is None else self.values.astype(self.scale.dtype) * self.scale


def linear(x: Float[Array, "*B D"], w: Any, is_text: Bool[Array, "*B"] | None = None) -> Float[Array, "*B N"]:
    """Multiply tokens by a weight leaf.

    Args:
      x: tokens.
      w: a ``(D, N)`` array, a `SplitWeight` (packed codes), a `TrainableSplit` or `RoundedSplit` (under calibration) or a `Lora`
        (fine-tuning).
      is_text: which tokens are text; only MAC reads it. None: all are.

    Raises:
      TypeError: for any other leaf.
    """
    if isinstance(w, SplitWeight):
        return split_linear(x.astype(jnp.float32), w, is_text).astype(x.dtype)
    if isinstance(w, TrainableSplit):
        w = round_weights(w)
    if isinstance(w, RoundedSplit):
        return rounded_linear(x, w, is_text)
    if isinstance(w, Lora):
        return x @ w.w + (x @ w.a) @ w.b
    if not hasattr(w, "dtype"):
        raise TypeError(f"linear: a weight leaf of type {type(w).__name__}; expected an array, SplitWeight or TrainableSplit")
    return x @ w.astype(x.dtype)


def split_linear(x: Float[Array, "*B D"], w: SplitWeight, is_text: Bool[Array, "*B"] | None) -> Float[Array, "*B N"]:
    """Multiply float32 tokens by packed codes: ``Y = Y_m + Y_t + Y_v`` (arXiv 2605.19929, eq. 6, 8, 10)."""
    tokens = [x] if w.perm is None else split(x[..., w.perm], tuple(g.w.rows for g in w.groups), axis=-1)
    y = jnp.zeros((*x.shape[:-1], w.shape[1]), x.dtype)
    for i, (group, x_j) in enumerate(zip(w.groups, tokens, strict=True)):
        x_t = apply(group.transform, x_j)
        x_hat = quantize_tokens(x_t, group.a_bits, group.a_clip)
        y += dot(x_hat, group.w)
        if i == 0 and w.cws is not None:
            y += branch(x_hat, w.cws)
        if i == 0 and w.mac is not None:
            residual = quantize_tokens(x_t - x_hat.decode(), w.residual_bits, None)
            y += jnp.where(served_by_mac(w.mac_tokens, is_text, x.shape[:-1]), branch(residual, w.mac), 0)
    return y


def quantize_tokens(x: Float[Array, "*B K"], bits: int, clip: Float[Array, " 2"] | None) -> Tokens:
    """Quantize each token with a scale of its own, computed from the token."""
    if bits >= FLOAT_BITS:
        return Tokens(x, None)
    scale = scale_of(x, bits, clip)
    return Tokens(encode(x, scale, bits), scale)


def dot(x: Tokens, w: QTensor) -> Float[Array, "*B N"]:
    """Multiply tokens by codes with a scale per column: an integer product, rescaled once."""
    if w.scale is None:
        return x.decode() @ w.words[0]
    columns = w.scale.reshape((1,) * (x.values.ndim - 1) + (-1,))
    if x.scale is None:
        return (x.values @ w.codes().astype(x.values.dtype)) * columns
    return integer_dot(x.values, w.codes()).astype(x.scale.dtype) * x.scale * columns


def branch(x: Tokens, pair: Branch) -> Float[Array, "*B N"]:
    """Return ``(x u) v``; the narrow product stays float and carries both scales of each singular direction."""
    narrow = dot(x, pair.u)  # *B r
    if pair.v.scale is None:
        return narrow @ pair.v.words[0]
    return (narrow * pair.v.scale.reshape((1,) * (narrow.ndim - 1) + (-1,))) @ pair.v.codes().astype(narrow.dtype)


def stored_bits(w: SplitWeight) -> int:
    """Count the bits of everything that the leaf holds: codes, scales, transforms, branches, permutation."""
    return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(w))
