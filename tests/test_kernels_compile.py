"""The kernels in the hands of the real TPU compiler: they compile at the shapes of real models, in the mode that is stated."""

import jax.numpy as jnp
import pytest
from tpu_targets import HAS_LIBTPU, SIZES, VMEM, activations, array, compile_for, matrix, products, site, sites_of

from splitq_jax.kernels import api, tiles, tpu

pytestmark = [pytest.mark.tpu_compile, pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")]

INTEGERS = {("v5e", 4): "s4", ("v5e", 8): "s8", ("v6e", 4): "s4", ("v6e", 8): "s8", ("tpu7x", 4): "f8e4m3fn", ("tpu7x", 8): "bf16"}


def operand_of(chip, a_bits):
    return INTEGERS[chip, 4 if a_bits <= 4 else 8]


def no_weight_sized_temporary(compiled, *weights):
    # what is left is the tokens' (picking channels turns them around); one copied or decoded weight would be more
    assert compiled.memory_analysis().temp_size_in_bytes < max(w.groups[0].w.words[0].size * 4 for w in weights)


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize(("chip", "bits"), [("v6e", (4, 4)), ("v5e", (3, 4)), ("tpu7x", (4, 8))], ids=str)
def test_decoding(chip, bits, model):
    weights = [site(*shape, bits) for shape in sites_of(model).values()]
    tokens = [array((16, w.shape[0]), "bfloat16") for w in weights]

    def step(tokens, weights, is_text):
        return [api.split_matmul(x, w, is_text) for x, w in zip(tokens, weights, strict=True)]

    compiled, program = compile_for(chip, step, tokens, weights, array((16,), "bool"))
    assert products(program) == {operand_of(chip, bits[1]), "bf16"}  # the narrow product is bfloat16
    no_weight_sized_temporary(compiled, *weights)


PREFILL = [
    ("v6e", "Qwen2.5-VL-7B", "qkv", (4, 4)),
    ("v6e", "Qwen2.5-VL-7B", "down", (3, 3)),
    ("v6e", "Qwen2.5-VL-72B", "gate_up", (4, 8)),
    ("v5e", "Qwen2.5-VL-3B", "qkv", (4, 4)),
    ("v5e", "LLaVA-7B", "down", (4, 8)),
    ("tpu7x", "Qwen2.5-VL-3B", "o", (4, 8)),
    ("tpu7x", "Qwen2.5-VL-72B", "down", (4, 4)),
]


@pytest.mark.parametrize(("chip", "model", "name", "bits"), PREFILL, ids=str)
def test_prefill(chip, model, name, bits):
    w = site(*sites_of(model)[name], bits)

    def product(a, w):
        return tpu.quantized_matmul(a, w, None, dtype=jnp.bfloat16, interpret=False)

    compiled, program = compile_for(chip, product, activations(2048, w), w)
    assert products(program) == {operand_of(chip, bits[1]), "bf16"}
    # the tokens' steps and the narrow operand may be laid out anew, the weight may not
    no_weight_sized_temporary(compiled, w)


@pytest.mark.parametrize(("chip", "bits"), [("v6e", (4, 4)), ("v5e", (4, 8)), ("tpu7x", (3, 3))], ids=str)
def test_quantizing_tokens(chip, bits):
    w = site(*sites_of("Qwen2.5-VL-7B")["o"], bits)

    def quantize(x, w, is_text):
        return tpu.quantize_activations(x, w, is_text, interpret=False)

    _, program = compile_for(chip, quantize, array((512, w.shape[0]), "bfloat16"), w, array((512,), "bool"))
    assert products(program) == {operand_of(chip, bits[1])}


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize(("chip", "group"), [("v6e", 128), ("v5e", 0), ("tpu7x", 64), ("v6e", 32)], ids=str)
def test_weight_only(chip, bits, group):
    w = matrix(3584, 4608, bits, group)
    compiled, program = compile_for(chip, api.weight_only_matmul, array((16, 3584), "bfloat16"), w)
    assert products(program) == {"bf16"}
    assert compiled.memory_analysis().temp_size_in_bytes < w.words[0].size


@pytest.mark.parametrize("chip", VMEM)
def test_tiles_fit(chip):
    """The rule stays inside VMEM and divides the shape, for every site, phase and type of operand."""
    on = tiles.Chip({"v5e": 5, "v6e": 6, "tpu7x": 7}[chip], VMEM[chip] * 25 // 32)
    for model in SIZES:
        for width, columns in sites_of(model).values():
            for tokens in (1, 16, 64, 100, 256, 2048, 8192):
                for x, w, decoded in ((0.5, 0.5, 0.5), (1, 0.5, 1), (1, 0.375, 1), (2, 0.5, 2)):
                    t = tiles.tiles(on, tokens, width, columns, x, w, decoded)
                    assert columns % t.columns == 0 and t.columns % tiles.LANES == 0
                    assert t.tokens % t.block == 0 and t.block % t.rows == 0 and tokens <= t.tokens < tokens + 1024
                    assert t.columns % (t.pieces * tiles.LANES) == 0
                    buffers = width * t.columns * (t.depth * w + decoded) + t.block * width * x + t.rows * t.columns * 12
                    assert buffers < on.vmem
