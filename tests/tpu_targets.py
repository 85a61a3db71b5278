"""TPUs that are not there: what their compiler makes of a program, and the shapes of real models."""

import contextlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from splitq_jax.acc import LowRank
from splitq_jax.kernels.operands import Activations, side_width
from splitq_jax.linear import Group, SplitWeight
from splitq_jax.mocd import SplitSize
from splitq_jax.packing import TILE_ROWS, padded_rows
from splitq_jax.qtensor import QTensor
from splitq_jax.transforms import Transform, factors

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
DUMP = Path(tempfile.gettempdir()) / f"splitq-llo-{os.getpid()}"

# (D, N) of a decoder block's four sites: hidden, inner, heads and KV heads of 128
SIZES = {
    "Qwen2.5-VL-3B": (2048, 11008, 16, 2),
    "Qwen2.5-VL-7B": (3584, 18944, 28, 4),
    "Qwen2.5-VL-72B": (8192, 29568, 64, 8),
    "LLaVA-7B": (4096, 11008, 32, 32),
}


def sites_of(model: str) -> dict[str, tuple[int, int]]:
    hidden, inner, heads, kv_heads = SIZES[model]
    return {
        "qkv": (hidden, 128 * (heads + 2 * kv_heads)),
        "o": (hidden, hidden),
        "gate_up": (hidden, 2 * inner),
        "down": (inner, hidden),
    }


def devices(chip: str, dump: bool = True) -> np.ndarray:
    """Return the devices of a topology of ``chip``; the compiler's programs are then left in `DUMP`, which takes it longer."""
    jax.devices()  # has read the tests' flags, of which a compiler of another age may know none, and then end the process
    os.environ |= {
        "XLA_FLAGS": "",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    if dump:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*packed-bundles-post-ra.*"
        )
    from jax.experimental import topologies

    return np.array(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices)


@contextlib.contextmanager
def target(chip: str, axes: dict[str, int], dump: bool = True) -> Iterator[jax.sharding.Mesh]:
    """Trace for a mesh of ``chip``s."""
    axis_types = (jax.sharding.AxisType.Auto,) * len(axes)
    found = devices(chip, dump)[: int(np.prod(list(axes.values())))].reshape(tuple(axes.values()))
    mesh = jax.sharding.Mesh(found, tuple(axes), axis_types=axis_types)
    jax.clear_caches()  # a trace for another chip must not be taken for this one's
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield mesh
    jax.clear_caches()


def compile_for(
    chip: str, function: Any, *args: Any, specs: Any = None, over: int = 1, donate: int | None = None
) -> tuple[Any, str]:
    """Compile for ``over`` chips, the arguments cut as ``specs`` say (None: whole); return executable and the kernels' final programs."""
    DUMP.mkdir(exist_ok=True)
    with target(chip, {"tensor": over}) as mesh:
        specs = jax.tree.map(lambda _: jax.sharding.PartitionSpec(), args) if specs is None else specs

        def placed(a: Any, spec: Any) -> Any:
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

        compiled = jax.jit(function, donate_argnums=donate).trace(*jax.tree.map(placed, args, specs)).lower().compile()
    programs = "".join(f.read_text() for f in sorted(DUMP.iterdir()) if "splitq" in f.name)
    for file in DUMP.iterdir():
        file.unlink()
    return compiled, programs


def products(program: str) -> set[str]:
    """Return the operand types of a program's MXU instructions."""
    return set(re.findall(r"vmatmul\.(?:mubr\.)?(?:msk\.)?(\w+)", program))


# --- shapes of what is multiplied


def array(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def matrix(rows: int, columns: int, bits: int, group: int = 0, row_scales: bool = False) -> QTensor:
    padded = padded_rows(rows, bits, TILE_ROWS)
    scale = (rows, 1) if row_scales else (rows // group if group else 1, columns)
    words = array((padded * bits // 32, columns), "int32") if bits < 8 else array((padded, columns), "int8")
    return QTensor((words,), array(scale, "float32"), bits, rows)


def site(width: int, columns: int, bits: tuple[int, int], split: bool = True, group: int = 0) -> SplitWeight:
    """A site as `freeze` leaves it, its numbers left out; ``split=False``: the product alone; ``group``: rows that share a scale."""
    (w_bits, a_bits), side_w, side_a = bits, max(4, bits[0]), max(4, bits[1])
    k = SplitSize().channels(width) if split else 0
    sizes = [size for size in (width - 2 * k, k, k) if size]

    def transform(size: int) -> Transform:
        n1, n2 = factors(size)
        return Transform(array((size,), "float32"), array((n1, n1), "float32") if n1 > 1 else None, array((n2, n2), "float32"))

    def rank(rate: float) -> int:
        return -(-round(rate * min(sizes[0], columns)) // 16) * 16

    branches = None
    if split:
        most = rank(0.03 if a_bits < 16 else 0.02)
        gates = array((rank(0.02),), "float32"), array((most,), "float32") if a_bits < 16 else None
        branches = LowRank(matrix(sizes[0], most, side_w), matrix(most, columns, side_w, row_scales=True), *gates)
    groups = tuple(
        Group(
            transform(size),
            array((2,), "float32"),
            matrix(size, columns, side_w) if i else matrix(size, columns, w_bits, group),
            side_a if i else a_bits,
        )
        for i, size in enumerate(sizes)
    )
    perm = array((width,), "int32") if split else None
    return SplitWeight(perm, groups, branches, "text", side_a)


def activations(tokens: int, w: SplitWeight) -> Activations:
    main, r = w.groups[0], side_width(w)
    if main.a_bits >= 16:
        values, scale = array((tokens, main.w.padded_rows), "bfloat16"), None
    else:
        values, scale = array((tokens, main.w.padded_rows), "int4" if main.a_bits <= 4 else "int8"), array((tokens, 1), "float32")
    return Activations(values, scale, array((tokens, r), "bfloat16") if r else None)
