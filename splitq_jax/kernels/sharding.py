"""Quantized weights over several devices: each holds a share of the output channels.

A site's codes, scales and the narrow weights are cut along N; transforms, permutation and ``U`` are small and whole on every device.
Every device quantizes all tokens and computes its own output channels, so nothing is summed over devices and the result is the same
to the last bit. What follows (heads of attention, gate times up) may stay cut along the same channels.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from splitq_jax.errors import InputError
from splitq_jax.kernels import api
from splitq_jax.qtensor import QTensor

if TYPE_CHECKING:
    from splitq_jax.linear import SplitWeight
else:
    SplitWeight = Any


def by_columns(w: SplitWeight, axis: str, devices: int) -> SplitWeight:
    """Return the site marked to be cut along its output channels over an axis of the context's mesh (`jax.set_mesh`).

    Args:
      w: the site.
      axis: the mesh axis.
      devices: the size of the axis.

    Raises:
      InputError: a number of devices that does not divide the output channels.
    """
    columns = w.shape[1]
    if columns % devices:
        raise InputError(f"{columns} output channels over {devices} devices of axis {axis!r}: choose a divisor")
    return dataclasses.replace(w, axis=axis)


def specs(w: SplitWeight) -> SplitWeight:
    """Return how each array of a marked site is cut: a tree of `PartitionSpec` like the site."""
    cut, whole = PartitionSpec(None, w.axis), PartitionSpec()

    def matrix(q: QTensor) -> QTensor:
        words = (PartitionSpec(w.axis, None) if q.elements else cut,) * len(q.words)
        by_row = q.scale is None or q.scale.shape[1] == 1
        return dataclasses.replace(q, words=words, scale=None if q.scale is None else whole if by_row else cut)

    uncut = jax.tree.map(lambda _: whole, w)
    groups = tuple(dataclasses.replace(u, w=matrix(g.w)) for u, g in zip(uncut.groups, w.groups, strict=True))
    cws, mac = (None if b is None else dataclasses.replace(u, v=matrix(b.v)) for u, b in ((uncut.cws, w.cws), (uncut.mac, w.mac)))
    tree: SplitWeight = dataclasses.replace(uncut, groups=groups, cws=cws, mac=mac)
    return tree


def multiply(x: Float[Array, "M D"], w: SplitWeight, is_text: Bool[Array, " M"] | None) -> Float[Array, "M N"]:
    """Multiply tokens by a marked site: `api.split_matmul` of every device's channels."""

    def local(x: Array, w: SplitWeight, is_text: Array | None) -> Array:
        return api.split_matmul(x, w, is_text)

    whole = PartitionSpec()
    y: Array = jax.shard_map(
        local,
        in_specs=(whole, specs(w), None if is_text is None else whole),
        out_specs=PartitionSpec(None, w.axis),
        axis_names={w.axis},
        check_vma=False,
    )(x, w, is_text)
    return y
