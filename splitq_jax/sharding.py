"""Where parameters lie on a mesh: a leaf's path gives its logical axes, and a logical axis its mesh axis.

Weights are split twice: over ``tensor`` along the heads, the hidden units or the vocabulary, over ``fsdp`` along the model's width.
``data`` is the batch's, over which parameters are repeated. What the mesh does not divide is repeated too.
"""

import math
import mmap
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from splitq_jax.errors import InputError

Axes = tuple[str | None, ...]

AXES = ("data", "fsdp", "tensor")
MESH_AXES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}

# a leaf's path (the first pattern that matches) → its logical axes; what matches nothing is small and repeated
LOGICAL_AXES: tuple[tuple[str, Axes], ...] = (
    (r".*/embedding", ("vocab", "embed")),
    (r".*/head/kernel", ("embed", "vocab")),
    (r".*/(qkv|q|k|v)/kernel", ("embed", "heads")),
    (r".*/(qkv|q|k|v)/bias", ("heads",)),
    (r".*/o/kernel", ("heads", "embed")),
    (r".*/(down|fc2)/kernel", ("mlp", "embed")),
    (r".*/(gate_up|gate|up|fc1)/bias", ("mlp",)),
    (r".*/kernel", ("embed", "mlp")),
)
# the arrays of a typed leaf in a kernel's place: 0 and 1 are the kernel's inputs and outputs; channel orders, transforms and clips
# are small and repeated
INSIDE: tuple[tuple[str, tuple[int | None, ...]], ...] = (
    (r"(groups/\d+/)?w(/words/\d+|/scale)?", (0, 1)),  # packed words lie along the inputs
    (r"(cws|mac)/u(/words/\d+|/scale)?|a", (0, None)),
    (r"(cws|mac)/v(/words/\d+|/scale)?|b|groups/\d+/w_clip", (None, 1)),
)


def logical_axes(path: str) -> Axes:
    """Return a leaf's logical axes, empty where it is repeated; the path of an array in a typed leaf goes on after ``kernel``."""
    layer, kernel, inside = path.partition("/kernel/")
    leaf = f"{layer}/kernel" if kernel else path
    axes = next((axes for pattern, axes in LOGICAL_AXES if re.fullmatch(pattern, leaf)), ())
    if not inside:
        return axes
    ends = next((ends for pattern, ends in INSIDE if re.fullmatch(pattern, inside)), ())
    return tuple(None if end is None else axes[end] for end in ends)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return how a leaf is split over the mesh's axes."""
    axes = logical_axes(path)
    names = [MESH_AXES.get(axis) if axis else None for axis in axes if len(axes) == len(shape)]
    return PartitionSpec(
        *(name if name in mesh.shape and size % mesh.shape[name] == 0 else None for name, size in zip(names, shape, strict=False))
    )


def sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Return a leaf's sharding; explicit axes, which `jax.make_mesh` makes unless told otherwise, are taken as automatic ones.

    Raises:
      InputError: a mesh with axes of other names.
    """
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise InputError(f"mesh: axis {unknown[0]!r}; expected {', '.join(AXES)}")
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names), spec(path, shape, mesh))


def of(tree: Any, mesh: Mesh) -> Any:
    """Return the shardings of a parameter tree, float or quantized, in a tree of the same structure.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`.
      mesh: its axes are some of ``data``, ``fsdp`` and ``tensor``.

    Raises:
      InputError: a mesh with axes of other names.
    """
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: sharding(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf.shape, mesh), tree
    )


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return host memory of its own, aligned to a page: a CPU device takes it over without a copy, and it is free as soon as let go."""
    dtype, size = np.dtype(dtype), math.prod(shape)
    memory = mmap.mmap(-1, max(1, size * dtype.itemsize))
    return np.frombuffer(memory, dtype, size).reshape(shape)


def place(value: np.ndarray, to: jax.sharding.Sharding | None) -> jax.Array:
    """Put a host array on its devices, each its own part, and wait; None: the default device.

    The array is given away: a CPU device may hold its memory. What a device copies is let go some time later, so parts that have to be
    copied are copied here.
    """

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        view = value[index]
        if view.flags.c_contiguous:
            return view
        copy = empty(view.shape, view.dtype)
        copy[...] = view
        return copy

    placed: jax.Array = jax.device_put(value) if to is None else jax.make_array_from_callback(value.shape, to, part)
    return placed.block_until_ready()


def on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Return an array's value whole, gathered over its devices and processes.

    A `jax.Array` keeps what `numpy.asarray` made of it for good, a second copy of the model in the end. So another one is asked
    that shares its parts.
    """
    if isinstance(array, np.ndarray):
        return array
    if not array.is_fully_addressable:
        from jax.experimental.multihost_utils import process_allgather

        return np.asarray(process_allgather(array, tiled=True))
    parts = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts))
