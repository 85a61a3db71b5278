"""Compile the GPU kernels for an H200 that need not be there, and print what came out as JSON; exit 77 where the CUDA wheels are not.

A script of its own: the compiler reads its settings from the environment, before JAX starts. It measures no time.
"""

import collections
import glob
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

DEVICE = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a" device_address_bits: 64
  name: "NVIDIA H200 141GB HBM3e" driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""
SITES = {  # width of the main group, output channels, narrow segments (columns, whether scaled)
    "qwen gate_up": (3456, 37888, ((64, True), (64, True), (128, False))),
    "qwen down": (18176, 3584, ((384, True), (384, True), (128, False))),
    "llava gate_up": (3968, 22016, ((64, True), (64, True), (128, False))),
    "llava o": (3968, 4096, ((64, True), (64, True), (128, False))),
}


def toolkit() -> str:
    """Return the folder of the CUDA wheels, empty where they are not complete."""
    found = importlib.util.find_spec("nvidia")
    for place in (found.submodule_search_locations or []) if found else []:
        root = pathlib.Path(place) / "cu13"
        if all((root / "bin" / tool).exists() for tool in ("ptxas", "nvdisasm")):
            return str(root)
    return ""


def census(sass: str) -> dict[str, int]:
    """Count the opcodes of a disassembly."""
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass)
    return dict(collections.Counter(opcodes))


def main() -> int:
    """Compile every case that the arguments name."""
    root = toolkit()
    if not root or importlib.util.find_spec("jax_cuda13_plugin") is None:
        print("jax[cuda13], nvidia-cuda-nvdisasm and ptxas are not installed")
        return 77
    dump = tempfile.mkdtemp(prefix="hopper_")
    os.environ.update(
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", JAX_PLATFORMS="cpu", MOSAIC_GPU_DUMP_TO=dump, MOSAIC_GPU_DUMP_PTX="1",
        CUDA_ROOT=root, CUDA_HOME=root, XLA_FLAGS=f"--xla_gpu_cuda_data_dir={root}", PATH=f"{root}/bin:{os.environ['PATH']}",
    )  # fmt: skip
    import jax
    import jax.numpy as jnp
    import numpy as np
    from decoder_step import decoder_step
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
    from tpu_targets import array, site

    from splitq_jax import sharding
    from splitq_jax.kernels import gpu
    from splitq_jax.kernels.fragment import PLANES
    from splitq_jax.kernels.gpu_matmul import choose_tile, matmul
    from splitq_jax.kernels.gpu_tile import SIDE_STEP, STEP, Operands
    from splitq_jax.linear import SplitWeight
    from splitq_jax.models.generate import advance
    from splitq_jax.models.sampling import Sampling

    def devices(count: int) -> list:
        return topologies.get_topology_desc("", "cuda", target_config=DEVICE, topology=f"1x1x{count}").devices

    device = devices(1)[0]

    def shape(dims, dtype):
        return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype), sharding=SingleDeviceSharding(device))

    def compile_case(kind: str, name: str, m: int) -> dict:
        bits, group = int(kind[1]), int(re.findall(r"g(\d+)", kind)[0]) if "g" in kind else None
        integer = "a8" in kind
        k, n, side = SITES[name]
        side = side if integer else tuple(segment for segment in side if segment[1]) if kind.endswith("side") else ()
        k = k if integer else -(-k // 128) * 128
        scaled = sum(s for _, s in side)
        operands = Operands(
            shape((m, k), "int8" if integer else "bfloat16"),
            tuple(shape((k // STEP, n, STEP * field // 32), "int32") for field in PLANES[bits]),
            shape((k // group if group else 1, n), "float32"),
            shape((m,), "float32") if integer else None,
            shape((m, sum(w for w, _ in side)), "bfloat16") if side else None,
            tuple(shape((w // SIDE_STEP, n, SIDE_STEP // 8), "int32") for w, _ in side),
            (shape((1, n), "float32"),) * scaled,
            shape((n,), "float32"),
        )
        _, (found,) = assembled(lambda o: matmul(o, bits, group, jnp.bfloat16), operands)
        tile = choose_tile(m, n, k, group is not None, floats=not integer)
        return found | {"accumulators": tile.rows * tile.tokens // 128, "tile": str(tile)}

    def assembled(function, *args) -> tuple[str, list[dict]]:
        """Compile; return the program and what its Mosaic kernels became."""
        before = set(glob.glob(dump + "/**/*.ptx", recursive=True))
        program = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compile().as_text()
        out = []
        for ptx in sorted(set(glob.glob(dump + "/**/*.ptx", recursive=True)) - before):
            ran = subprocess.run(
                ["ptxas", "-v", "-arch=sm_90a", ptx, "-o", ptx + ".cubin"], capture_output=True, text=True, check=True
            )
            sass = subprocess.run(["nvdisasm", "-c", ptx + ".cubin"], capture_output=True, text=True, check=True).stdout
            out.append(
                {
                    "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", ran.stderr))),
                    "registers": int(re.findall(r"Used (\d+) registers", ran.stderr)[0]),
                    "log": ran.stderr + ran.stdout,
                    "sass": census(sass),
                }
            )
        return program, out

    def compile_quantizer(width: int, m: int) -> dict:
        w = jax.eval_shape(gpu.relayout, site(width, 4096, (4, 4)))
        args = (array((m, width), "bfloat16"), w, array((m,), "bool"))
        program, found = assembled(gpu.quantize_activations, *jax.tree.map(lambda a: shape(a.shape, a.dtype), args))
        entry = program[program.index("ENTRY") :]
        return {"kernels": found, "fusions": len(re.findall(r" fusion\(", entry))}

    def compile_step(over: int, blocks: int) -> dict:
        """One token a row through quantized blocks of a 7B model, their output channels shared by ``over`` GPUs."""
        mesh = Mesh(np.array(devices(over)), ("tensor",), axis_types=(AxisType.Auto,))
        model, params, state = decoder_step(blocks)

        def placed(leaf, place):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        is_site = lambda leaf: isinstance(leaf, SplitWeight)  # noqa: E731
        params = jax.tree.map(lambda leaf: jax.eval_shape(gpu.relayout, leaf) if is_site(leaf) else leaf, params, is_leaf=is_site)
        params = jax.tree.map(placed, params, sharding.of(params, mesh))
        rest = (state, array((1,), "int32"), array((), "int32"))
        args = (params, *jax.tree.map(lambda a: placed(a, NamedSharding(mesh, PartitionSpec())), rest))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            step = jax.jit(lambda p, s, stops, until: advance(model, p, s, Sampling(), stops, until), donate_argnums=1)
            compiled = step.trace(*args).lower(lowering_platforms=("cuda",)).compile()
        kernels, program = [w for w in jax.tree.leaves(params, is_leaf=is_site) if is_site(w)], compiled.as_text()
        moved = re.findall(r"\w+\[([\d,]*)\]\S* (?:all-\w+|collective-permute|reduce-scatter)(?:-done)?\(", program)
        return {
            "sites": len(kernels),
            "kernels": len(re.findall(r'custom_call_target="mosaic_gpu[^"]*"', program)),
            "moved": max((math.prod(map(int, filter(None, shape.split(",")))) for shape in moved), default=0),
            "temporary": compiled.memory_analysis().temp_size_in_bytes,
            "weight": max(w.groups[0].w.words[0].size * 4 for w in kernels),
            "caches": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.caches)),
        }

    out = {}
    for case in sys.argv[1:]:
        if case.startswith("step"):
            out[case] = compile_step(*map(int, case.split()[1:]))
            continue
        kind, *name, m = case.split()
        if kind == "quantize":
            out[case] = compile_quantizer(int(name[0]), int(m))
            continue
        out[case] = compile_case(kind, " ".join(name), int(m))
        print(case, out[case]["tile"], out[case]["registers"], out[case]["spilled"], out[case]["sass"], file=sys.stderr, flush=True)
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
