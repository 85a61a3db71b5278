"""Calibration batches at the door of the decoder, sharded over a ``data`` mesh axis, and the walk through its blocks.

Only one block's inputs and outputs are held at a time, on the host, so memory does not grow with the depth.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from splitq_jax.errors import InputError
from splitq_jax.quantization import without_blocks
from splitq_jax.sharding import on_host, spread

Batch = Mapping[str, np.ndarray]
Params = dict[str, Any]


@dataclass(frozen=True)
class Hidden:
    """A batch between two blocks: ``x`` of shape (B, L, D) and the model's context, both on the host."""

    x: Float[np.ndarray, "B L D"]
    context: Any


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh with the one axis ``data`` over the given (default: all) devices."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def checked(mesh: Mesh | None) -> Mesh:
    """Return the mesh, None: of the first device.

    Raises:
      InputError: a mesh without the axis ``data``.
    """
    if mesh is not None and "data" not in mesh.axis_names:
        raise InputError(f"mesh: axes {', '.join(mesh.axis_names)}; samples are shared over an axis `data` (calib.data_mesh())")
    return mesh or data_mesh(jax.local_devices()[:1])


def on_all(mesh: Mesh, tree: Any) -> Any:
    """Give every device the whole tree, wherever it was."""
    return spread(tree, NamedSharding(mesh, P()))


def block_name(i: int) -> str:
    """Return the path of decoder block ``i``."""
    return f"decoder/blocks_{i}"


def block_params(params: Params, i: int) -> Params:
    """Return the parameters of decoder block ``i``."""
    found: Params = params["decoder"][f"blocks_{i}"]
    return found


def outer_params(params: Params) -> Params:
    """Return all parameters but the decoder's blocks; those in host memory on the default device."""
    placed: Params = jax.device_put(without_blocks(params))
    return placed


def pad_rows(hidden: Hidden, multiple: int) -> Hidden:
    """Repeat the last sample until the mesh divides the batch; the copies are marked invalid and count for nothing."""
    rows = -hidden.x.shape[0] % multiple
    if rows == 0:
        return hidden
    repeat: Callable[[np.ndarray], np.ndarray] = lambda a: np.concatenate([a, np.repeat(a[-1:], rows, axis=0)])  # noqa: E731
    context = jax.tree.map(repeat, hidden.context)
    valid = context.valid.copy()
    valid[-rows:] = False
    return Hidden(repeat(hidden.x), context.replace(valid=valid))


def embed(model: Any, params: Params, batches: Iterable[Batch]) -> Iterator[Hidden]:
    """Run the vision tower, the projector and the embedding; what comes out is float32, and so are the blocks then, whatever weights are.

    Raises:
      InputError: no batch at all; parameters on devices of several processes.
    """
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(params)):
        raise InputError(
            "params: lie on devices of several processes; calibrate from host memory (`models.load(folder, on_host=True)`)"
        )
    outer, empty = outer_params(params), True
    for batch in batches:
        empty = False
        out = jax.tree.map(_in_float32, _embed(model, outer, model.prepare(batch)))
        yield Hidden(out.x, out.context)
    if empty:
        raise InputError(
            "calibration: the set is empty; give at least one image with a question and an answer (a generator is empty once it was read)"
        )


def _in_float32(a: Any) -> np.ndarray:
    return np.asarray(a, np.float32 if jnp.issubdtype(a.dtype, jnp.floating) else None)


@partial(jax.jit, static_argnums=0)  # compiled once, however often a calibration set is read
def _embed(model: Any, params: Params, batch: Batch) -> Any:
    return model.apply({"params": params}, **batch, method="embed")


def sharded(fn: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Jit ``fn`` under `jax.shard_map`; arguments are placed by their specs."""
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(mapped, compiler_options=_cpu_options() if mesh.devices.flat[0].platform == "cpu" else None)


def _cpu_options() -> dict[str, Any]:
    """Return how XLA compiles calibration for CPUs, where that takes longer than a short training."""
    # the last of these levels would take two thirds more time, and what it makes is no faster
    options: dict[str, Any] = {"xla_backend_optimization_level": 1}
    if "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", ""):
        options = {}
    if version("jaxlib").startswith("0.10."):
        # the older emitters take a quarter less, to compile and to run; later versions have no choice
        options["xla_cpu_use_fusion_emitters"] = False
    return options


def place(mesh: Mesh, tree: Any) -> Any:
    """Put host arrays on the mesh, the leading axis over ``data``."""
    return spread(tree, NamedSharding(mesh, P("data")))


@cache
def forward(block: Any, mesh: Mesh) -> Callable[[Params, Sequence[Hidden]], list[Hidden]]:
    """Return a function that maps hidden batches through a block, given its parameters."""
    step = sharded(lambda p, x, context: block.apply({"params": p}, x, context), mesh, (P(), P("data"), P("data")), P("data"))

    def run(p: Params, hiddens: Sequence[Hidden]) -> list[Hidden]:
        outs = []
        for hidden in hiddens:
            padded = pad_rows(hidden, mesh.size)
            y = on_host(step(p, place(mesh, padded.x), place(mesh, padded.context)))
            outs.append(Hidden(y[: hidden.x.shape[0]], hidden.context))
        return outs

    return run


def after(i: int, hidden: Hidden) -> Hidden:
    """Return what the next block reads, given block ``i``'s output."""
    return Hidden(hidden.context.add_deepstack(i, hidden.x), hidden.context)


stack_rows = partial(jax.tree.map, lambda *a: np.concatenate(a))


def merge(hiddens: Sequence[Hidden]) -> Hidden:
    """Concatenate batches of one length into one.

    Raises:
      InputError: batches of different lengths.
    """
    lengths = {h.x.shape[1] for h in hiddens}
    if len(lengths) != 1:
        raise InputError(f"calibration: batches of lengths {sorted(lengths)}; pad them to one length")
    return Hidden(np.concatenate([h.x for h in hiddens]), stack_rows(*[h.context for h in hiddens]))


def finite(path: str, value: jnp.ndarray | np.ndarray, what: str) -> None:
    """Raise `InputError` where an array has NaN or infinite entries."""
    if not np.isfinite(np.asarray(value)).all():
        raise InputError(f"{path}: {what} are not finite; check the weights and the calibration samples")
