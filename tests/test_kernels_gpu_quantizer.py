"""The GPU's quantizer of few tokens, interpreted, beside the reference; what the compiler makes of it is in `test_kernels_gpu`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_targets
from kernel_reference import codes_off, mask_of, numpy_matrix, site_of, tokens_of, without_clips

from splitq_jax.kernels import gpu, gpu_quantizer, reference
from splitq_jax.kernels.operands import gate_scales, segments


def flat_site(width, **options):
    return site_of(0, width, 24, (4, 4), side=0, ranks=(0, 0), **options)


QUANTIZED = {  # tokens, mask, site
    "one token": (1, "text", lambda: site_of(0, 576, 24, (4, 4), side=16, ranks=(11, 17))),
    "two warpgroups, a ragged end": (3, "mixed", lambda: site_of(0, 67 * 68 + 32, 24, (3, 3), side=16, ranks=(16, 16))),
    "the end in a warpgroup of its own": (2, "text", lambda: flat_site(64 * 57)),
    "odd rows": (16, "text", lambda: flat_site(32 * 47)),
    "no factors but one": (16, "text", lambda: flat_site(127)),
    "cws": (5, "text", lambda: site_of(0, 576, 24, (4, 8), side=16, ranks=(16, 0))),
    "mac, no clips": (64, "mixed", lambda: without_clips(site_of(0, 576, 24, (4, 4), side=16, ranks=(0, 16)))),
    "mac for nobody": (5, "vision", lambda: site_of(0, 576, 24, (4, 4), side=16, ranks=(11, 17))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantizer_of_few_tokens(name):
    """The kernel against the reference, which multiplies in float32: they differ where a value lies next to a tie."""
    count, mask, site = QUANTIZED[name]
    w, text = site(), mask_of(mask, count)
    laid = gpu.relayout(w)
    assert laid.quantizer is not None
    x = tokens_of(0, count, w.shape[0])
    expected = jax.jit(reference.quantize_activations)(x, w, text)
    quantize = jax.jit(partial(gpu_quantizer.quantize_activations, interpret=True))
    got = quantize(x, laid, text)
    broken = quantize(x.at[-1, 3].set(jnp.nan), laid, text).scale
    assert (broken[:-1] == got.scale[:-1]).all()
    if laid.quantizer.sizes[0][1] <= 48:  # the interpreter's wider maxima leave NaN out
        assert jnp.isnan(broken[-1]).all()
    off = codes_off(got, expected, laid.groups[0].w, rtol=2e-5, share=1e-3)
    if not segments(w):
        assert got.side is None
        return
    begin, start = 0, 0
    for here, there in zip(segments(laid), segments(w), strict=True):
        part = np.asarray(got.side[:, begin : begin + here.w.padded_rows], np.float64)
        wanted = np.asarray(expected.side[:, start : start + there.w.rows], np.float64)
        assert not part[:, there.w.rows :].any()
        excess = np.abs(part[:, : there.w.rows] - wanted) - 2.0**-7 * np.abs(wanted)
        if there.columns is not None:
            assert (excess <= 0).mean() > 0.999
        else:  # of a token's codes, two of x_hat and of the residual's may be off by one, which adds a row of U
            steps = np.asarray(expected.scale, np.float64)
            weight = np.abs(numpy_matrix(w.branches.u)).max(0)
            cws, mac = (0.0 if s is None else weight * np.abs(np.asarray(s, np.float64)) for s in gate_scales(w.branches))
            slack = 2 * steps * (cws + mac) * (off != 0).any(1, keepdims=True)
            slack += 2 * steps / 2 / (2 ** (w.residual_bits - 1) - 1) * mac
            assert (excess <= slack).all(), (excess / slack).max()
        begin, start = begin + here.w.padded_rows, start + there.w.padded_rows


def test_what_the_quantizer_takes():
    assert gpu.relayout(site_of(0, 576, 24, (4, 16), side=16, ranks=(11, 0))).quantizer is None
    assert gpu.relayout(site_of(0, 576, 24, (4, 4), side=16, transform=False)).quantizer is None
    assert jax.eval_shape(gpu.relayout, tpu_targets.site(29568, 64, (4, 4))).quantizer is None  # factors of 148 and 192
    for width in (576, 1152, 1536, 3584, 4096, 8192, 11008, 18944):
        laid = jax.eval_shape(gpu.relayout, tpu_targets.site(width, 64, (4, 4)))
        for plan in gpu_quantizer.plans(laid, laid.quantizer.sizes):
            memory = gpu_quantizer._memory(plan)
            used = sum(int(np.prod(r.shape)) * jnp.dtype(r.dtype).itemsize for r in (memory.v, memory.p2, memory.absmax))
            assert used + 1024 == plan.shared_bytes <= 227 * 1024


def test_halves_are_exact_to_sixteen_bits():
    x = np.random.default_rng(0).standard_normal(4096).astype(np.float32) * np.exp2(np.arange(4096) % 200 - 100).astype(np.float32)
    high, low = (np.asarray(h, np.float64) for h in jax.jit(gpu_quantizer.halves)(x))
    assert (np.abs(high + low - x) <= np.abs(x) * 2.0**-17).all() and (low != 0).mean() > 0.9
