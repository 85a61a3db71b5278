"""The GPU kernels: the packed layout, registers, every kind of tile interpreted, and what the compiler makes of them for an H200."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kernel_reference import ACCUMULATION, assert_close, mask_of, site_of, tokens_of

from splitq_jax.kernels import api, gpu, gpu_kernel, hopper
from splitq_jax.kernels.fragment import BLOCK, PLANES, bfloat16_bias, fragment_rows, pack_fragments, unpack_fragments
from splitq_jax.kernels.gpu_matmul import choose_tile, matmul
from splitq_jax.kernels.gpu_products import power_and_mantissa
from splitq_jax.kernels.gpu_tile import Operands, Tile, Work
from splitq_jax.kernels.layout import native
from splitq_jax.linear import linear
from splitq_jax.qtensor import quantize_columns
from splitq_jax.sharding import of

SCHEMES = [(bits, elements) for bits in PLANES for elements in (4, 2)]


def codes_of(rows, columns, bits, seed=0):
    return np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns)).astype(np.int8)


def numpy_fragments(codes, bits, elements):
    """Write each code's bits where the module says that they lie."""
    k, n = codes.shape
    planes = [np.zeros((n, k * field // 32), np.uint32) for field in PLANES[bits]]
    for column in range(k):
        block, inside = divmod(column, BLOCK[bits])
        register, rest = divmod(inside, 4 * elements)
        lane, element = divmod(rest, elements)
        code, low = codes[column].astype(np.int64) & (2**bits - 1), 0
        for field, plane in zip(PLANES[bits], planes, strict=True):
            words = BLOCK[bits] * field // 128
            per_word = 32 // (elements * field)
            shift = 32 // elements * element + field * (register % per_word)
            place = block * 4 * words + lane * words + register // per_word
            plane[:, place] |= ((code >> low & (2**field - 1)) << shift).astype(np.uint32)
            low += field
    return [p.reshape(n, k // 128, -1).transpose(1, 0, 2) for p in planes]


@pytest.mark.parametrize(("bits", "elements"), SCHEMES)
def test_packed_layout_is_the_documented_one(bits, elements):
    codes = codes_of(256, 6, bits)
    packed = pack_fragments(jnp.asarray(codes), bits, elements)
    for got, expected in zip(packed, numpy_fragments(codes, bits, elements), strict=True):
        assert (np.asarray(got).view(np.uint32) == expected).all()
    assert (unpack_fragments(packed, bits, elements) == codes).all()
    ragged = pack_fragments(jnp.asarray(codes[:200]), bits, elements)
    got = np.asarray(unpack_fragments(ragged, bits, elements))
    assert got.shape[0] == fragment_rows(ragged, bits) == 256 and (got[:200] == codes[:200]).all() and not got[200:].any()
    assert sum(p.size for p in packed) * 32 == codes.size * bits  # 3 bits take 3 bits


def threads(layout, array):
    """Deal an array to (warp, lane, register, element of the register) as a tiled layout says, in plain numpy."""
    for tile in layout.tiling.tiles:
        outer, inner = array.shape[: -len(tile)], array.shape[-len(tile) :]
        split = [part for d, t in zip(inner, tile, strict=True) for part in (d // t, t)]
        array = array.reshape(*outer, *split)
        at = len(outer)
        order = [*range(at), *range(at, array.ndim, 2), *range(at + 1, array.ndim, 2)]
        array = array.transpose(order)
    dims = [*layout.warp_dims, *layout.lane_dims]
    moved = np.moveaxis(array, [*dims, layout.vector_dim], [*range(len(dims)), -1])
    inner = moved.shape[len(dims) :]
    return moved.reshape(4, 32, *inner)  # warp lane registers... element


@pytest.mark.parametrize(("bits", "elements"), SCHEMES)
def test_words_expand_to_the_operand_in_every_thread(bits, elements):
    """The words that each thread loads, expanded by the kernel's own function, are its registers of wgmma's operand."""
    codes = codes_of(256, 128, bits)
    planes = [np.asarray(p).view(np.uint32)[1] for p in pack_fragments(jnp.asarray(codes), bits, elements)]
    dealt = [threads(hopper.plane_layout(n).to_mgpu(), p) for n, p in zip(hopper.lane_words(bits), planes, strict=True)]
    layout = {4: hopper.plgpu.Layout.WGMMA_8BIT, 2: hopper.plgpu.Layout.WGMMA}[elements].to_mgpu()
    wanted = threads(layout, codes[128:].T.astype(np.int64))
    for warp in range(4):
        for lane in range(32):
            words = [hopper._map(list, _registers(d[warp, lane])) for d in dealt]
            got = hopper.operand_registers(words, bits, elements)
            expected = _registers(wanted[warp, lane])
            assert got.size == expected.size
            for word, values in zip(got.flat, expected.flat, strict=True):
                register = np.array([int(word) & 0xFFFFFFFF], np.uint32)
                if elements == 4:
                    assert (register.view(np.int8) == values * 2 ** (8 - bits)).all()
                else:
                    assert (register.view(ml_dtypes.bfloat16).astype(np.int64) - bfloat16_bias(bits) == values).all()


def _registers(array):
    """An object array of vectors, by the first axes: rows / 64, column tiles, the rest."""
    out = np.empty(array.shape[:-1], dtype=object)
    for index in np.ndindex(out.shape):
        out[index] = [int(v) for v in array[index]]
    return hopper._map(np.array, out)


def test_relayout_keeps_the_weight():
    site = site_of(0, 1536, 72, (3, 4), ranks=(20, 40), transform=False)
    laid = gpu.relayout(site)
    assert gpu.relayout(laid) is not site and gpu.relayout(laid).groups[0].w is laid.groups[0].w  # made once
    for before, after in zip(*([*[g.w for g in w.groups], w.branches.v] for w in (site, laid)), strict=True):
        assert before.elements == 0 and after.elements in (2, 4) and after.shape == before.shape
        assert (before.codes() == after.codes()).all() and (before.decode() == after.decode()).all()
    narrow = laid.groups[1].w  # in other steps than a main weight's, whatever its rows
    assert (gpu.relayout(narrow).codes() == narrow.codes()).all() and gpu.relayout(narrow).words[0].shape[2] == 16
    grouped = quantize_columns(jnp.asarray(np.random.default_rng(0).standard_normal((384, 8)), jnp.float32), 4, group=64)
    assert (gpu.relayout(grouped).decode() == grouped.decode()).all()


def test_a_laid_out_site_over_devices():
    """The shares stay where they were; each is laid out by itself."""
    site = site_of(13, 576, 256, (3, 4), side=8, ranks=(11, 17))
    x, text = tokens_of(13, 6, 576, jnp.float32), mask_of("mixed", 6)
    whole = jax.jit(linear)(x, site, text)
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    placed = native(jax.device_put(site, of({"down": {"kernel": site}}, mesh)["down"]["kernel"]), "gpu")
    assert [p.sharding.shard_shape(p.shape)[1] for p in placed.groups[0].w.words] == [64, 64]
    with jax.set_mesh(mesh):
        cut = jax.jit(linear)(x, placed, text)
    assert cut.sharding.shard_shape(cut.shape) == (6, 64)
    # XLA on CPU reads a transposed matrix of another width in another order: float32 sums differ in their last bits
    assert (np.abs(np.asarray(cut) - np.asarray(whole)) <= ACCUMULATION * np.abs(np.asarray(whole)).max(1, keepdims=True)).all()


def test_on_a_gpu_nothing_is_interpreted(monkeypatch):
    """What a forced backend traces to where it is at home: XLA refuses to lower the interpreter's effects for a GPU."""
    site, x = gpu.relayout(site_of(0, 576, 64, (4, 8), side=8, ranks=(11, 17))), tokens_of(0, 5, 576)
    assert jax.make_jaxpr(lambda x: api.split_matmul(x, site, backend="gpu"))(x).effects
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    api.split_matmul.clear_cache()
    assert not jax.make_jaxpr(lambda x: api.split_matmul(x, site, backend="gpu"))(x).effects


def test_powers_and_mantissas_are_exact():
    scale = np.array([[1.2e-38, 3e-20, 0.1, 1.0, 1.9999999, 7.5, 3e38]], np.float32)
    power, mantissa = (np.asarray(v, np.float64) for v in power_and_mantissa(jnp.asarray(scale)))
    assert (power * mantissa == scale).all() and (mantissa >= 1).all() and (mantissa < 2).all()
    assert (np.log2(power) % 1 == 0).all()


def test_rule_of_tiles():
    """Every tile divides what it is for, and few tokens get thread blocks for every processor where the weight is long enough."""
    assert choose_tile(2048, 37888, 3456, False) == Tile(256, 64, 2, 1, 1)
    assert choose_tile(2048, 37888, 3584, False, floats=True) == Tile(128, 128, 2, 1, 1)
    assert choose_tile(2048, 37888, 3584, True).rows == 64
    assert choose_tile(1, 14336, 4096, False) == Tile(8, 64, 2, 2, 1)
    assert choose_tile(256, 14336, 4096, False).tokens == 256 and choose_tile(128, 14336, 4096, False) == Tile(128, 64, 2, 1, 1)
    assert choose_tile(257, 14336, 4096, False).tokens == 128
    down = choose_tile(16, 3584, 18176, False)
    assert down.splits * 3584 // 64 >= 100 and down.tokens == 16


@pytest.mark.parametrize("tokens", [1, 16, 32, 64, 256, 2048])
@pytest.mark.parametrize(("dtype", "group"), [("int8", None), ("bfloat16", None), ("bfloat16", 32), ("bfloat16", 128)], ids=str)
def test_shared_memory_suffices(tokens, dtype, group):
    """Every tile's rings, staged results and partial sums fit a processor, and a ring has a slot for every companion."""
    for bits in PLANES:
        for channels, width in ((37888, 3584), (4608, 3584), (3584, 18176), (2560, 2048), (200, 576)):
            for out, narrow in (("bfloat16", 0), ("float32", 0), ("bfloat16", 384), ("float32", 1024)):
                tile = choose_tile(tokens, channels, width, group is not None, floats=dtype == "bfloat16")
                m, n, k = (-(-d // t) * t for d, t in ((tokens, tile.tokens), (channels, tile.channels), (width, 128)))
                planes = tuple(np.empty((k // 128, n, 4 * field), np.int32) for field in PLANES[bits])
                side = np.empty((m, narrow), ml_dtypes.bfloat16) if narrow and group is None else None
                o = Operands(np.empty((m, k), dtype), planes, None, None, side, (), (), None)
                result = np.empty((0,), out)
                slots, side_slots = gpu_kernel._slots(o, result, bits, group, tile)
                work = Work(bits, tile, group, slots, side_slots, 0, 0, 0, 0, 0, (), None)
                memory = gpu_kernel._memory(o, result, work)
                refs = [
                    r for r in (*memory.planes, memory.x, memory.out, memory.scale, memory.side, memory.words, memory.sums) if r
                ]
                used = sum(int(np.prod(r.shape)) * jnp.dtype(r.dtype).itemsize for r in refs)
                assert used + 3072 <= 227 * 1024, (tile, slots, used)
                assert slots % tile.along == 0 and side_slots % tile.along == 0 and 2 <= slots <= 32


def product(rng, m, k, n, bits, group=None, side=(), bias=False, integer=True):
    """Operands of a product, its value in float64 and the sum of its terms' magnitudes."""
    codes = codes_of(k, n, bits)
    planes = pack_fragments(jnp.asarray(codes), bits, 4 if integer else 2)
    padded = fragment_rows(planes, bits)
    x = (
        rng.integers(-128, 128, (m, padded)).astype(np.int8)
        if integer
        else rng.standard_normal((m, padded)).astype(ml_dtypes.bfloat16)
    )
    token_scale = np.exp(rng.standard_normal(m)).astype(np.float32) if integer else None
    scale = np.exp(rng.standard_normal((1 if group is None else padded // group, n))).astype(np.float32)
    rows = np.ones((m, 1)) if token_scale is None else token_scale[:, None].astype(np.float64)
    main = np.pad(codes, ((0, padded - k), (0, 0))) * np.repeat(scale.astype(np.float64), padded // scale.shape[0], 0)
    terms = [(x.astype(np.float64) * rows, main)]
    words, columns, sides = [], [], []
    for width, scaled in side:
        narrow = codes_of(width, n, 4, seed=width)
        words.append(pack_fragments(jnp.asarray(narrow), 4, 2, 64)[0])
        if scaled:
            columns.append(np.exp(5 * rng.standard_normal(n)).astype(np.float32))
        sides.append(rng.standard_normal((m, width)).astype(ml_dtypes.bfloat16))
        terms.append((sides[-1].astype(np.float64), narrow * (columns[-1].astype(np.float64) if scaled else 1.0)))
    offset = rng.standard_normal(n).astype(np.float32) if bias else None
    if bias:
        terms.append((np.ones((m, 1)), offset[None].astype(np.float64)))
    operands = Operands(
        jnp.asarray(x),
        planes,
        jnp.asarray(scale),
        None if token_scale is None else jnp.asarray(token_scale),
        jnp.asarray(np.concatenate(sides, 1)) if side else None,
        tuple(words),
        tuple(jnp.asarray(c[None]) for c in columns),
        None if offset is None else jnp.asarray(offset),
    )
    return operands, sum(a @ b for a, b in terms), sum(np.abs(a) @ np.abs(b) for a, b in terms)


SIDE = ((64, True), (64, True), (128, False))
TILES = {
    "one warpgroup": (Tile(32, 64, 1, 1, 1), dict(m=9, k=300, n=64, bits=4, side=SIDE, bias=True)),
    "across": (Tile(64, 128, 2, 1, 1), dict(m=40, k=1500, n=256, bits=3, side=((64, True), (64, False)), bias=True)),
    "along and splits": (Tile(8, 64, 1, 2, 2), dict(m=5, k=650, n=64, bits=4, side=SIDE, bias=True)),
    "four along, ragged": (Tile(8, 64, 1, 4, 1), dict(m=11, k=1100, n=70, bits=3, bias=True)),
    "groups of 32": (Tile(8, 64, 1, 1, 1), dict(m=5, k=256, n=64, bits=4, group=32, integer=False)),
    "groups of 64": (Tile(8, 64, 1, 2, 1), dict(m=5, k=384, n=64, bits=3, group=64, integer=False, bias=True)),
    "groups and splits": (Tile(8, 64, 1, 2, 2), dict(m=5, k=512, n=64, bits=4, group=64, integer=False)),
    "groups of 256": (Tile(16, 64, 2, 1, 1), dict(m=20, k=512, n=128, bits=4, group=256, integer=False)),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "along and splits" else pytest.mark.slow) for n in TILES])
def test_every_kind_of_tile(name):
    """Rings, barriers, splits, sums of companions, the narrow operand: the kernel itself, interpreted."""
    tile, shape = TILES[name]
    operands, value, magnitude = product(np.random.default_rng(1), **shape)
    for dtype in (jnp.float32,):
        got = matmul(operands, shape["bits"], shape.get("group"), dtype, tile, interpret=True)
        assert got.dtype == dtype and got.shape == value.shape
        assert_close(got, value, magnitude, dtype)


STEPS = ["step 1 2", "step 4 2", "step 1 32", "step 4 32"]  # a decoder step on so many GPUs, through so many blocks


@pytest.fixture(scope="module")
def compiled():
    """What the CUDA compiler makes of the kernels, by case; skipped where its wheels are not."""
    script = Path(__file__).with_name("compile_for_hopper.py")
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, str(script), *CASES, *QUANTIZERS, *STEPS], capture_output=True, text=True, env=env, check=False
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# sites of Qwen2.5-VL 7B and LLaVA 7B, kinds of product, tokens
CASES = [
    f"{kind} {site} {count}"
    for site, kinds, tokens in (
        ("qwen gate_up", ("w4a8", "w3a8", "w4a16", "w4a16g128"), (1, 16, 32, 2048)),
        ("qwen down", ("w4a8", "w3a16g64", "w4a16g128side"), (16, 2048)),
        ("llava gate_up", ("w4a8", "w4a16g32"), (1, 2048)),
        ("llava o", ("w3a8", "w3a16"), (32, 2048)),
    )
    for kind in kinds
    for count in tokens
]


@pytest.mark.gpu_compile
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiled_for_hopper(compiled, case):
    got = compiled[case]
    integer = "a8" in case
    assert got["spilled"] == 0
    assert "serialized" not in got["log"]
    sass = got["sass"]
    assert sass["IGMMA" if integer else "HGMMA"] >= 4
    assert not sass.keys() & {"IMMA", "HMMA", "STL", "LDL"}
    # integers become floats once, in the accumulators at the end: none in the expansion of weights
    assert sum(n for op, n in sass.items() if op.startswith("I2F")) == (got["accumulators"] if integer else 0)
    # nor do bytes move about: what is permuted is the result on its way out, two 16-bit values a register
    assert sass.get("PRMT", 0) <= got["accumulators"] // 2 + 8


QUANTIZERS = [f"quantize {width} {tokens}" for width, tokens in ((576, 8), (1536, 64), (4096, 16), (11008, 8), (18944, 8))]


@pytest.mark.gpu_compile
@pytest.mark.slow
@pytest.mark.parametrize("case", QUANTIZERS)
def test_quantizer_compiled_for_hopper(compiled, case):
    """The quantizer and the product with U: tensor cores, no spills, and XLA has two kernels beside them."""
    got = compiled[case]
    assert [k["spilled"] for k in got["kernels"]] == [0, 0]
    assert not any(k["sass"].keys() & {"IMMA", "HMMA", "STL", "LDL"} for k in got["kernels"])
    assert sorted(op for k in got["kernels"] for op in k["sass"] if op in ("IGMMA", "HGMMA")) == ["HGMMA", "IGMMA"]
    assert got["fusions"] == 2


@pytest.mark.gpu_compile
@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
def test_a_decoder_step_compiled_for_hopper(compiled, case):
    """A kernel for every site, no copy of the caches or of the weights, and between GPUs only the tokens move."""
    got, (over, blocks) = compiled[case], map(int, case.split()[1:])
    assert got["sites"] == 4 * blocks
    assert got["kernels"] == 3 * got["sites"]  # of each site: quantizer, product with U, product
    assert 2 * got["weight"] < got["caches"]
    # shared and many, XLA lays the caches of some blocks out anew at a time: one eighth of them
    assert got["temporary"] < (got["caches"] / 6 if (over, blocks) == (4, 32) else 2 * got["weight"])
    assert (got["moved"] > 0) == (over > 1) and got["moved"] <= 16 * 11008
