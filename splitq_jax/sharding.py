"""Where parameters lie on a mesh: a leaf's path gives its logical axes, and a logical axis its mesh axis.

Weights are split twice: over ``tensor`` along the heads, the hidden units or the vocabulary, over ``fsdp`` along the model's width.
Packed codes are split over both along their columns, the output channels: a product then sums nothing over devices and is the same to
the last bit. ``data`` is the batch's, over which parameters are repeated. What the mesh does not divide is repeated too.
"""

import math
import mmap
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from splitq_jax.errors import InputError
from splitq_jax.qtensor import QTensor

Axes = tuple[str | None, ...]

AXES = ("data", "fsdp", "tensor")
MESH_AXES = {
    "batch": ("data",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "columns": ("tensor", "fsdp"),
}

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
# the arrays of a typed leaf in a kernel's place. Under calibration they are floats, whose 0 and 1 are the kernel's inputs and outputs; of
# packed codes (`QTensor`) only the columns are split. Channel orders, transforms and clips are small and repeated
INSIDE: tuple[tuple[str, tuple[int | str | None, ...]], ...] = (
    (r"w", (0, 1)),
    (r"branches/u|a", (0, None)),
    (r"branches/v|b", (None, 1)),
    (r"groups/\d+/w_clip", (None, None, 1)),
    (r"(groups/\d+/w|branches/v)/(words/\d+|scale)", (None, "columns")),
)


def logical_axes(path: str) -> Axes:
    """Return a leaf's logical axes, empty where it is repeated; the path of an array in a typed leaf goes on after ``kernel``."""
    layer, kernel, inside = path.partition("/kernel/")
    leaf = f"{layer}/kernel" if kernel else path
    axes = next((axes for pattern, axes in LOGICAL_AXES if re.fullmatch(pattern, leaf)), ())
    if not inside:
        return axes
    ends = next((ends for pattern, ends in INSIDE if re.fullmatch(pattern, inside)), ())
    return tuple(axes[end] if isinstance(end, int) else end for end in ends)


def mesh_axes(axis: str | None, size: int, sizes: Mapping[str, int]) -> str | tuple[str, ...] | None:
    """Return the mesh axes over which a logical axis of ``size`` is split: all that it may be, or the first that divides it."""
    names = tuple(name for name in MESH_AXES.get(axis or "", ()) if name in sizes)
    for chosen in (names, *((name,) for name in names)):
        if chosen and size % math.prod(sizes[name] for name in chosen) == 0:
            return chosen if len(chosen) > 1 else chosen[0]
    return None


def spec(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """Return how a leaf is split over mesh axes of these sizes."""
    axes = logical_axes(path)
    split = len(axes) == len(shape)
    return PartitionSpec(*(mesh_axes(axis, size, sizes) for axis, size in zip(axes, shape, strict=True)) if split else ())


def specs(tree: Any, sizes: Mapping[str, int], prefix: str = "") -> Any:
    """Return how each array of a tree is split over mesh axes of these sizes, in a tree of the same structure.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`.
      sizes: of the mesh axes.
      prefix: path of the tree.
    """

    def one(keys: Any, leaf: Any) -> Any:
        path = "/".join(filter(None, (prefix, jax.tree_util.keystr(keys, simple=True, separator="/"))))
        if not isinstance(leaf, QTensor):
            return spec(path, leaf.shape, sizes)
        words = [spec(f"{path}/words/{i}", array.shape[:2], sizes) for i, array in enumerate(leaf.words)]  # a GPU's have three axes
        scale = None if leaf.scale is None else spec(f"{path}/scale", leaf.scale.shape, sizes)
        return replace(leaf, words=tuple(words), scale=scale)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Return a leaf's sharding; explicit axes, which `jax.make_mesh` makes unless told otherwise, are taken as automatic ones.

    Raises:
      InputError: a mesh with axes of other names.
    """
    return NamedSharding(_automatic(mesh), spec(path, shape, mesh.shape))


def of(tree: Any, mesh: Mesh) -> Any:
    """Return the shardings of a parameter tree, float or quantized, in a tree of the same structure.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`.
      mesh: its axes are some of ``data``, ``fsdp`` and ``tensor``.

    Raises:
      InputError: a mesh with axes of other names.
    """
    automatic = _automatic(mesh)
    return jax.tree.map(lambda found: NamedSharding(automatic, found), specs(tree, mesh.shape))


def mesh_of_sizes(text: str) -> Mesh:
    """Return a mesh of the first devices, from the sizes of its axes as ``fsdp=2,tensor=4``.

    Raises:
      InputError: axes of other names, or twice; sizes that are no positive numbers; more than there are devices.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not (size.isascii() and size.isdigit() and int(size)):
            raise InputError(f"mesh {text!r}: {part!r}; expected each axis once, of {', '.join(AXES)}, with its size, as tensor=8")
        sizes[name] = int(size)
    devices, count = jax.devices(), math.prod(sizes.values())
    if count > len(devices):
        raise InputError(f"mesh {text!r}: {count} devices; there are {len(devices)}")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices[:count])


def _automatic(mesh: Mesh) -> Mesh:
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise InputError(f"mesh: axis {unknown[0]!r}; expected {', '.join(AXES)}")
    return Mesh(mesh.devices, mesh.axis_names)


def on_mesh_of(params: Any) -> AbstractContextManager[Any]:
    """Return the context of the mesh on which a tree lies (`jax.set_mesh`), in which the kernels find it; of none for one device.

    A context that is there already is kept.
    """
    meshes = (leaf.sharding.mesh for leaf in jax.tree.leaves(params) if isinstance(getattr(leaf, "sharding", None), NamedSharding))
    mesh = next(meshes, None)
    if mesh is None or mesh.size == 1 or not jax.sharding.get_abstract_mesh().empty:
        return nullcontext()
    return jax.set_mesh(mesh)


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


def spread(tree: Any, to: NamedSharding) -> Any:
    """Put arrays on the devices of a mesh; with several processes each gives its devices their parts of what all of them hold."""
    if to.is_fully_addressable:
        return jax.device_put(tree, to)
    return jax.tree.map(lambda array: place(on_host(array), to), tree)


def on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Return an array's value whole, gathered over its devices and processes.

    A `jax.Array` keeps what `numpy.asarray` made of it for good, a second copy of the model in the end. So another one is asked
    that shares its parts.
    """
    if isinstance(array, np.ndarray):
        return array
    if not array.is_fully_addressable and array.is_fully_replicated:
        array = array.addressable_data(0)
    if not array.is_fully_addressable:
        from jax.experimental.multihost_utils import process_allgather

        return np.asarray(process_allgather(array, tiled=True))
    parts = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts))
