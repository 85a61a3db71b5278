"""The order of packed codes in memory, by who reads them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from splitq_jax.kernels.api import Backend
from splitq_jax.kernels.operands import dense_sides
from splitq_jax.linear import SplitWeight
from splitq_jax.qtensor import QTensor


def native(params: Any, backend: Backend | None = None) -> Any:
    """Return the same weights in the order in which they are multiplied where they lie, each device's share where it was.

    The layer before ``down`` writes its channels as ``[C_m | C_t | C_v]`` of ``down``, where none are picked then at run time. GPUs
    read codes in the order of their registers (`splitq_jax.kernels.fragment`), XLA's products read bytes, the TPU's kernels what
    `freeze` packs; accelerators read each side group's transform as one matrix. Every backend computes the same from any order, but
    what is in another one is laid out anew at every product. So `generate` and `evaluate` do it once, as a loop of your own should;
    checkpoints are for all backends and hold the packed order. What is laid out is a copy, of gate and up on every backend: where
    memory is short, drop the tree that was given.

    Args:
      params: a tree of arrays on their devices; those in host memory are put on the default device.
      backend: who multiplies; None for the one of the devices.
    """
    params = jax.device_put(params)  # what lies in host memory; nothing else moves
    backend = backend or _backend(params)
    params = _folded(params)

    def is_site(leaf: Any) -> bool:
        return isinstance(leaf, SplitWeight)

    def laid(leaf: Any) -> Any:
        if not is_site(leaf):
            return leaf
        if backend == "tpu":
            return dense_sides(leaf)
        if backend == "reference":
            return jax.tree.map(_bytes, leaf, is_leaf=lambda part: isinstance(part, QTensor))
        from splitq_jax.kernels import gpu

        return jax.jit(gpu.relayout)(leaf)

    return jax.tree.map(laid, params, is_leaf=is_site)


def _folded(node: Any) -> Any:
    """Permute the columns of gate and up instead of the channels that ``down`` reads: what lies between works channel by channel."""
    if not isinstance(node, dict):
        return node
    node = {name: _folded(child) for name, child in node.items()}
    before, after = (node[name].get("kernel") if name in node else None for name in ("gate_up", "down"))
    if (
        not (isinstance(before, SplitWeight) and isinstance(after, SplitWeight))
        or after.perm is None
        or before.groups[0].w.elements
    ):
        return node
    # each device keeps its share of the columns, which it has from others
    places = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), node["gate_up"])
    moved = jax.jit(_pick_columns, out_shardings=places)(node["gate_up"], after.perm)
    return node | {"gate_up": moved, "down": node["down"] | {"kernel": dataclasses.replace(after, perm=None)}}


def _pick_columns(layer: dict[str, Any], perm: Int[Array, " D"]) -> dict[str, Any]:
    order = jnp.concatenate([perm, perm.shape[0] + perm])  # of gate and of up

    def picked(part: QTensor) -> QTensor:
        scale = part.scale
        if scale is not None and scale.shape[1] > 1:  # not V's, which lie along its rows
            scale = scale[:, order]
        return dataclasses.replace(part, words=tuple(w[:, order] for w in part.words), scale=scale)

    w: SplitWeight = layer["kernel"]
    groups = tuple(dataclasses.replace(g, w=picked(g.w)) for g in w.groups)
    branches = None if w.branches is None else dataclasses.replace(w.branches, v=picked(w.branches.v))
    biases = {name: bias[order] for name, bias in layer.items() if name != "kernel"}
    return {"kernel": dataclasses.replace(w, groups=groups, branches=branches), **biases}


def _backend(params: Any) -> Backend:
    arrays = (leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array))
    platform = next((d.platform for array in arrays for d in array.devices()), jax.default_backend())
    return "tpu" if platform == "tpu" else "gpu" if platform == "gpu" else "reference"


def _bytes(leaf: Any) -> Any:
    if not isinstance(leaf, QTensor) or leaf.bits >= 8:
        return leaf
    return QTensor((_codes(leaf),), leaf.scale, 8, leaf.rows)


_codes = jax.jit(QTensor.codes)
