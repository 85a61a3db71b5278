"""`linear`: the one place where a model meets a weight, and `SplitWeight`, the weight held as packed codes.

How packed codes are multiplied is the business of `splitq_jax.kernels`.
"""

from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.acc import LowRank
from splitq_jax.kernels import api
from splitq_jax.qtensor import QTensor
from splitq_jax.site import RoundedSplit, TrainableSplit, round_weights, rounded_linear
from splitq_jax.transforms import Transform


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
class SplitWeight:
    """A quantized site: the typed leaf that takes a kernel's place in the parameter tree.

    Attributes:
      perm: ``[C_m | C_t | C_v]``, the order in which the input channels are read, C_m ascending; None where they come in it: nothing is split
        off, or the layer before writes them so (`splitq_jax.kernels.layout.native`).
      groups: main, then text and vision where they are not empty.
      branches: CWS and MAC: codes of ``U``, codes of ``V`` and the gates, or None.
      mac_tokens: the tokens that MAC serves.
      residual_bits: bits of MAC's activation residual.
      quantizer: what a GPU's quantizer of few tokens reads instead of ``perm`` and the transforms (`splitq_jax.kernels.gpu_quantizer`); None
        in other layouts and for sites that it does not take.
    """

    perm: Int[Array, " D"] | None
    groups: tuple[Group, ...]
    branches: LowRank | None
    mac_tokens: str = struct.field(pytree_node=False)
    residual_bits: int = struct.field(pytree_node=False)
    quantizer: Any = None

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
        return split_linear(x, w, is_text)
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
    """Multiply tokens by packed codes: ``Y = Y_m + Y_t + Y_v`` (arXiv 2605.19929, eq. 6, 8, 10), by the kernels of the platform."""
    mask = None if is_text is None else is_text.reshape(-1)
    y = api.split_matmul(x.reshape(-1, x.shape[-1]), w, mask)
    return y.reshape(*x.shape[:-1], w.shape[1])


def stored_bits(w: SplitWeight) -> int:
    """Count the bits of everything that the leaf holds: codes, scales, transforms, branches, permutation."""
    return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(w))
