"""What the kernels of every backend share: the operands, what of a site goes into which, and the parts that XLA computes.

A site's product is ``y = s_x s_w (codes . W_m) + side . B + bias``. ``side``, R columns, carries all that is narrow:
``[x_t | x_v | X U g_s + D U g_c]``, each already rescaled per token (D: MAC's residual, 0 for tokens that MAC does not serve; g: the
gates); ``B``'s rows are ``[W_t; W_v; V]``. So one narrow product in the epilogue serves the side groups and both low-rank branches.
Accelerators hold both of its operands in bfloat16, as a float model would; the reference holds them in float32.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from splitq_jax.acc import LowRank
from splitq_jax.numerics import FLOAT_BITS, in_float32
from splitq_jax.qtensor import QTensor
from splitq_jax.site import served_by_mac, split
from splitq_jax.transforms import Transform, apply

if TYPE_CHECKING:
    from splitq_jax.linear import SplitWeight
else:
    SplitWeight = Any  # the leaf's module imports the kernels


NARROW = 256  # channels: a matrix of so many rows is read as fast as a kernel starts


class Activations(NamedTuple):
    """M tokens, ready for `api.quantized_matmul`.

    Attributes:
      values: the main group's int8 codes, as wide as the weight's padded rows (zeros there), or floats where activations stay floats.
      scale: the step of each token, None for floats.
      side: the narrow operand, segments as in `segments`, each as wide as its weight's padded rows (zeros there); None where the site
        has no side. The reference keeps it in float32, accelerators in bfloat16.
    """

    values: Array
    scale: Float[Array, "M 1"] | None
    side: Float[Array, "M R"] | None


class Segment(NamedTuple):
    """Rows of ``B``: ``codes * columns``, or ``codes`` where the weight's scales lie along its rows and are in ``side`` already."""

    w: QTensor
    columns: Float[Array, "1 N"] | None


def segments(w: SplitWeight) -> list[Segment]:
    """Return the rows of ``B`` in order: text and vision group, V, without those that the site lacks."""
    groups = [Segment(g.w, g.w.scale) for g in w.groups[1:]]
    return groups if w.branches is None else [*groups, Segment(w.branches.v, None)]


def side_width(w: SplitWeight) -> int:
    """Return R, 0 for no side."""
    return sum(s.w.padded_rows for s in segments(w))


def picked(x: Float[Array, "M D"], w: SplitWeight) -> list[Float[Array, "M K"]]:
    """Return every group's channels."""
    return split(x if w.perm is None else x[:, w.perm], tuple(g.w.rows for g in w.groups), axis=-1)


def transformed(channels: list[Float[Array, "M K"]], w: SplitWeight) -> list[Float[Array, "M K"]]:
    """Return every group's channels after its transform, float32: widened here, for picking moves half the bytes before."""
    return [apply(g.transform, x_j.astype(jnp.float32)) for g, x_j in zip(w.groups, channels, strict=True)]


def dense_sides(w: SplitWeight) -> SplitWeight:
    """Return the same site with each narrow side group's transform as one matrix: XLA's kernels cost more than their work there."""
    main, *others = w.groups
    return replace(w, groups=(main, *(replace(g, transform=_dense(g.transform, g.w.rows)) for g in others)))


@in_float32
@partial(jax.jit, static_argnames="size")
def _dense(t: Transform, size: int) -> Transform:
    return t if t.p2 is None or size > NARROW else Transform(None, None, as_matrix(t, size))


def as_matrix(t: Transform, size: int) -> Float[Array, "K K"]:
    """Return ``P``."""
    if t.p2 is not None and t.p1 is None and t.d is None:
        return t.p2
    return apply(t, jnp.eye(size, dtype=jnp.float32))


def mac_mask(w: SplitWeight, is_text: Bool[Array, " M"] | None, tokens: int) -> Float[Array, "M 1"]:
    """Return 1 for the tokens that MAC serves, 0 for the others."""
    return served_by_mac(w.mac_tokens, is_text, (tokens,)).astype(jnp.float32)


def gate_scales(branches: LowRank) -> tuple[Float[Array, "1 R"] | None, Float[Array, "1 R"] | None]:
    """Return what CWS's and MAC's products with ``U`` are multiplied by, None for one that is off: its gate and the scales of V's rows."""
    scale = branches.v.scale
    rows = 1.0 if scale is None else scale.reshape(1, -1)  # None at 16 bits
    cws, mac = branches.diagonal("cws"), branches.diagonal("mac")
    return None if cws is None else cws[None, :] * rows, None if mac is None else mac[None, :] * rows


def widen(x: Array, columns: int) -> Array:
    """Append zero columns up to ``columns``."""
    return x if x.shape[-1] == columns else jnp.pad(x, ((0, 0), (0, columns - x.shape[-1])))


def reseat(side: Float[Array, "M R"] | None, source: SplitWeight, target: SplitWeight) -> Float[Array, "M S"] | None:
    """Move the segments of ``side`` from the padded widths of one layout of a site to those of another."""
    given, needed = ([s.w for s in segments(w)] for w in (source, target))
    widths = tuple(w.padded_rows for w in given)
    if side is None or widths == tuple(w.padded_rows for w in needed):
        return side
    parts = zip(split(side, widths, axis=1), needed, strict=True)
    return jnp.concatenate([widen(part[:, : w.rows], w.padded_rows) for part, w in parts], axis=1)


def keeps_floats(w: SplitWeight) -> bool:
    """Return whether the main group's activations are not quantized."""
    return w.groups[0].a_bits >= FLOAT_BITS
