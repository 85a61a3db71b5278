"""The order of packed codes in memory, by who reads them."""

from typing import Any

import jax

from splitq_jax.kernels.api import Backend
from splitq_jax.linear import SplitWeight
from splitq_jax.qtensor import QTensor


def native(params: Any, backend: Backend | None = None) -> Any:
    """Return the same weights in the order in which they are multiplied where they lie, each device's share where it was.

    GPUs read codes in the order of their registers (`splitq_jax.kernels.fragment`), XLA's products read bytes, the TPU's kernels what
    `freeze` packs. Every backend computes the same from any order, but what is in another one is laid out anew at every product. So
    `generate` and `evaluate` do it once, as a loop of your own should; checkpoints are for all backends and hold the packed order.

    Args:
      params: a tree of arrays on their devices.
      backend: who multiplies; None for the one of the devices.
    """
    backend = backend or _backend(params)
    if backend == "tpu":
        return params

    def is_site(leaf: Any) -> bool:
        return isinstance(leaf, SplitWeight)

    def laid(leaf: Any) -> Any:
        if not is_site(leaf):
            return leaf
        if backend == "reference":
            return jax.tree.map(_bytes, leaf, is_leaf=lambda part: isinstance(part, QTensor))
        from splitq_jax.kernels import gpu

        return jax.jit(gpu.relayout)(leaf)

    return jax.tree.map(laid, params, is_leaf=is_site)


def _backend(params: Any) -> Backend:
    arrays = (leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array))
    platform = next((d.platform for array in arrays for d in array.devices()), jax.default_backend())
    return "tpu" if platform == "tpu" else "gpu" if platform == "gpu" else "reference"


def _bytes(leaf: Any) -> Any:
    if not isinstance(leaf, QTensor) or leaf.bits >= 8:
        return leaf
    return QTensor((_codes(leaf),), leaf.scale, 8, leaf.rows)


_codes = jax.jit(QTensor.codes)
