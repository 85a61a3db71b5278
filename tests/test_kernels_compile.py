"""The kernels in the hands of the real TPU compiler: they compile at the shapes of real models, in the mode that is stated."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from decoder_step import decoder_step
from jax.sharding import AxisType, PartitionSpec
from tpu_targets import HAS_LIBTPU, SIZES, activations, array, compile_for, matrix, products, site, sites_of

from splitq_jax import sharding
from splitq_jax.kernels import api, tpu
from splitq_jax.linear import SplitWeight
from splitq_jax.models.generate import advance
from splitq_jax.models.sampling import Sampling
from splitq_jax.quantization import kernels

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


def product(a, w):
    return tpu.quantized_matmul(a, w, None, dtype=jnp.bfloat16, interpret=False)


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
    compiled, program = compile_for(chip, product, activations(2048, w), w)
    assert products(program) == {operand_of(chip, bits[1]), "bf16"}
    # the tokens' steps and the narrow operand may be laid out anew, the weight may not
    no_weight_sized_temporary(compiled, w)


@pytest.mark.parametrize(
    ("chip", "bits", "tokens"), [("v5e", (3, 3), 6000), ("tpu7x", (4, 8), 8192), ("v5e", (4, 16), 2048)], ids=str
)
def test_many_tokens_of_the_widest_site(chip, bits, tokens):
    """What the compiler spills fits VMEM beside what the kernel keeps, too."""
    w = site(*sites_of("Qwen2.5-VL-7B")["down"], bits)
    compile_for(chip, product, activations(tokens, w), w)


@pytest.mark.parametrize(("chip", "bits"), [("v6e", (4, 4)), ("v5e", (4, 8)), ("tpu7x", (3, 3))], ids=str)
def test_quantizing_tokens(chip, bits):
    w = site(*sites_of("Qwen2.5-VL-3B")["o"], bits)

    def quantize(x, w, is_text):
        return tpu.quantize_activations(x, w, is_text, interpret=False)

    args = (array((512, w.shape[0]), "bfloat16"), w, array((512,), "bool"))
    with jax.default_matmul_precision("default"):
        compiled, program = compile_for(chip, quantize, *args)
    assert products(program) == {"bf16"}
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 2**20  # XLA turns no tokens around
    # asked for products in float32, XLA transforms
    _, program = compile_for(chip, quantize, *args)
    assert products(program) == {operand_of(chip, bits[1])}


@pytest.mark.parametrize(
    ("chip", "width", "in_order"), [("v6e", 11008, False), ("v5e", 18944, True), ("tpu7x", 4096, False)], ids=str
)
def test_quantizing_many_tokens(chip, width, in_order):
    """Segments that fill tiles and that do not, picked and in order."""
    w = site(width, 128, (4, 8))
    w = replace(w, perm=None) if in_order else w

    def quantize(x, w, is_text):
        return tpu.quantize_activations(x, w, is_text, interpret=False)

    with jax.default_matmul_precision("default"):
        _, program = compile_for(chip, quantize, array((512, width), "bfloat16"), w, array((512,), "bool"))
    assert products(program) == {"bf16"}


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize(("chip", "group"), [("v6e", 128), ("v5e", 0), ("tpu7x", 64), ("v6e", 32)], ids=str)
def test_weight_only(chip, bits, group):
    w = matrix(3584, 4608, bits, group)
    compiled, program = compile_for(chip, api.weight_only_matmul, array((16, 3584), "bfloat16"), w)
    assert products(program) == {"bf16"}
    assert compiled.memory_analysis().temp_size_in_bytes < w.words[0].size


@pytest.mark.parametrize("tokens", [16, 2048])
@pytest.mark.parametrize(("chip", "bits"), [("v6e", 4), ("v5e", 3)], ids=str)
def test_sites_with_scales_per_group(chip, bits, tokens):
    """Weight-only, beside side groups and CWS."""
    w = site(3584, 4608, (bits, 16), group=128)
    compiled, program = compile_for(chip, api.split_matmul, array((tokens, 3584), "bfloat16"), w)
    assert products(program) == {"bf16"}
    if tokens == 16:
        no_weight_sized_temporary(compiled, w)


# --- a decoder step


@pytest.mark.parametrize("over", [1, 4])
@pytest.mark.parametrize("blocks", [2, 32], ids="{}blocks".format)
def test_decoder_step(blocks, over):
    """One token a row through quantized blocks of a 7B model, on one device and cut over four: the kernels are inside."""
    model, params, state = decoder_step(blocks)
    args = (params, state, array((1,), "int32"), array((), "int32"))
    mesh = jax.make_mesh((over,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:over])
    whole = jax.tree.map(lambda _: PartitionSpec(), args[1:])
    specs = (jax.tree.map(lambda place: place.spec, sharding.of(params, mesh)), *whole)
    compiled, program = compile_for(
        "v6e", lambda p, s, stops, until: advance(model, p, s, Sampling(), stops, until), *args, specs=specs, over=over, donate=1
    )
    assert "s4" in products(program)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    held = jax.tree.map(lambda a, place: array(place.shard_shape(a.shape), a.dtype), params, sharding.of(params, mesh))
    quantized = size(list(kernels(held["decoder"]).values()))
    # each device holds its share and no more; tiles of narrow arrays are padded
    assert compiled.memory_analysis().argument_size_in_bytes < 1.3 * quantized + 1.05 * (size(held) - quantized + size(args[1:]))
    # the loop holds the caches once more, in the layout that it likes; one copied or decoded weight would be more
    weights = [w for w in kernels(params["decoder"]).values() if isinstance(w, SplitWeight)]
    limit = size(state.caches) * 1.02 + max(w.groups[0].w.words[0].size * 4 for w in weights)
    assert compiled.memory_analysis().temp_size_in_bytes < limit
