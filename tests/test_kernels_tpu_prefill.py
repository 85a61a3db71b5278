"""The TPU's quantizer of many tokens, interpreted, beside the reference; what the compiler makes of it is in `test_kernels_compile`."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_targets
from kernel_reference import codes_off, mask_of, numpy_matrix, run, site_of, tokens_of, without_clips

from splitq_jax.kernels import api, reference, tiles, tpu
from splitq_jax.kernels.operands import gate_scales, segments
from splitq_jax.kernels.tpu_prefill_plan import plan_of
from splitq_jax.qtensor import quantize_columns
from splitq_jax.transforms import Transform


def in_order(w):
    return replace(w, perm=None)


def with_wide_factors(w):
    u = quantize_columns(jnp.asarray(np.random.default_rng(1).standard_normal(w.branches.u.shape), jnp.float32), 8)
    return replace(w, branches=replace(w.branches, u=u))


SITES = {  # tokens, mask, site
    "mac for the last": (200, "last", lambda: site_of(0, 256, 24, (4, 4), side=16, ranks=(0, 16))),
    "two steps": (300, "mixed", lambda: site_of(0, 576, 24, (4, 4), side=16, ranks=(11, 17))),
    "rows between tiles": (70, "mixed", lambda: without_clips(site_of(0, 8 * 61 + 32, 24, (4, 8), side=16, ranks=(16, 0)))),
    "in order": (70, "text", lambda: in_order(site_of(0, 1000 + 80, 24, (3, 3), side=40, ranks=(16, 16)))),
    "no transform, mac for nobody": (130, "vision", lambda: site_of(0, 600, 24, (3, 2), side=20, ranks=(0, 16), transform=False)),
    "factors of 8 bits": (65, "text", lambda: with_wide_factors(site_of(0, 256, 24, (4, 8), side=16, ranks=(16, 16)))),
    "one factor": (65, "text", lambda: site_of(0, 127, 24, (4, 4), side=0, ranks=(0, 0))),
}


@pytest.mark.parametrize("name", SITES)
def test_quantizer_of_many_tokens(name):
    """The kernel against the reference; both multiply in float32 here, so they differ where a value lies next to a tie."""
    count, mask, site = SITES[name]
    w, text = site(), mask_of(mask, count)
    x = tokens_of(0, count, w.shape[0])
    assert plan_of(x, w, interpret=True) is not None
    expected = jax.jit(reference.quantize_activations)(x, w, text)
    got = jax.jit(partial(tpu.quantize_activations, interpret=True))(x, w, text)
    off = codes_off(got, expected, w.groups[0].w, rtol=1e-6, share=1e-4)
    if not segments(w):
        assert got.side is None
        return
    at = 0
    for segment in segments(w):
        part, wanted = (np.asarray(a.side[:, at : at + segment.w.padded_rows], np.float64) for a in (got, expected))
        assert part.shape[0] == count and not part[:, segment.w.rows :].any()
        error = np.abs(part - wanted)[:, : segment.w.rows]
        slack = 2.0**-8 * np.abs(wanted[:, : segment.w.rows]) + 1e-6 * np.abs(wanted).max(1, keepdims=True)
        if segment.columns is None:  # a code more or less adds a row of U, of the residual too
            weight = np.abs(numpy_matrix(w.branches.u)).max(0)
            gates = sum(0.0 if s is None else weight * np.abs(np.asarray(s, np.float64)) for s in gate_scales(w.branches))
            steps = np.asarray(expected.scale, np.float64) * gates
            top = 2 ** (w.residual_bits - 1) - 1
            # of the residual's codes as many as float32 leaves near ties: its error, 1e-6 of `top` steps, in steps of half of 1 / top
            differ = 2 + w.groups[0].w.rows * 2 * 2e-6 * top**2
            slack = slack + 2 * steps * (off != 0).any(1, keepdims=True) + differ * steps / 2 / top
        assert (error <= slack).mean() > 1 - 1e-3, (error / slack).max()  # which NaN is not
        at += segment.w.padded_rows
    assert at == got.side.shape[1]


def test_two_steps_after_xla():
    """Tokens in float32 are transformed by XLA, and the kernel takes 256 at a time."""
    w = site_of(0, 96, 24, (4, 4), side=8, ranks=(3, 5))
    x, text = tokens_of(0, 300, 96, jnp.float32), mask_of("mixed", 300)
    assert plan_of(x, w, interpret=True) is None
    got, expected = (run(api.quantize_activations, x, w, text, backend=b) for b in ("tpu", "reference"))
    codes_off(got, expected, w.groups[0].w, rtol=1e-6, share=1e-3)
    error = np.abs(np.asarray(got.side, np.float64) - np.asarray(expected.side, np.float64))
    assert (error.max(1) <= 2.0**-6 * np.abs(np.asarray(expected.side)).max(1)).mean() > 0.95
    unserved = run(api.quantize_activations, x, w, mask_of("vision", 300), backend="tpu").side
    assert ((np.asarray(got.side) != np.asarray(unserved)).any(1) == (np.asarray(text) & np.asarray(x).any(1))).all()


def test_channels_outside_their_windows_are_not_silently_wrong():
    w = site_of(0, 1024, 24, (4, 4), side=16, ranks=(0, 0))
    x = tokens_of(0, 70, 1024)
    quantize = jax.jit(partial(tpu.quantize_activations, interpret=True))
    assert jnp.isfinite(quantize(x, w, None).scale).all()
    assert jnp.isnan(quantize(x, replace(w, perm=w.perm[::-1]), None).scale).all()  # the site promises ascending channels


def test_what_is_planned():
    w = site_of(0, 576, 24, (4, 4), side=16)
    x = tokens_of(0, 70, 576)
    assert plan_of(x, w, interpret=True)
    assert not plan_of(x[:64], w, interpret=True)
    assert not plan_of(x.astype(jnp.float32), w, interpret=True)
    with jax.default_matmul_precision("float32"):  # the user wants what the kernel's bfloat16 would not give
        assert not plan_of(x, w, interpret=False)
    dense = replace(w.groups[0], transform=Transform(None, None, jnp.eye(544)))
    assert not plan_of(x, replace(w, groups=(dense, *w.groups[1:])), interpret=True)
    planned = set()
    for width in (576, 2048, 3584, 4096, 8192, 11008, 18944, 29568):
        for site in (tpu_targets.site(width, 64, (4, 4)), in_order(tpu_targets.site(width, 64, (4, 4)))):
            plan = plan_of(tpu_targets.array((2048, width), "bfloat16"), site, interpret=True)
            if plan is not None:
                planned.add((width, site.perm is None))
                assert plan.window % tiles.LANES == 0 and plan.window <= plan.lanes
                assert plan.products * plan.together >= plan.n1 and plan.n1 * plan.n2 >= plan.channels
    assert len(planned) == 15 and (29568, False) not in planned  # whose products would take all of VMEM
