"""Attention against float64 numpy: all queries at once, and in turns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from splitq_jax.models import layers
from splitq_jax.models.layers import attend

MASKS = {"none": None, "by query": (2, 1, 13, 20), "by row": (2, 1, 1, 20), "for all": (1, 1, 13, 20)}


def numpy_attention(q, k, v, mask):
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = np.einsum("blhd,bshd->bhls", q, k) / np.sqrt(q.shape[3])
    scores = scores if mask is None else np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhls,bshd->blhd", weights / weights.sum(-1, keepdims=True), v).reshape(*q.shape[:2], -1)


@pytest.mark.parametrize("limit", [None, 2 * 6 * 20 * 5, 1], ids=["at once", "five queries a turn", "one query a turn"])
@pytest.mark.parametrize("name", MASKS)
def test_attention(name, limit, monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, h, 8)) for n, h in ((13, 6), (20, 3), (20, 3)))
    mask = None if MASKS[name] is None else rng.random(MASKS[name]) > 0.4
    expected = numpy_attention(q, k, v, mask)
    arrays = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
    loss = lambda *a: (attend(*a, mask) ** 2).sum()  # noqa: E731
    gradients = jax.grad(loss, (0, 1, 2))(*arrays)
    if limit is not None:
        monkeypatch.setattr(layers, "SCORES", limit)
    np.testing.assert_allclose(attend(*arrays, mask), expected, atol=2e-6)
    for found, wanted in zip(jax.grad(loss, (0, 1, 2))(*arrays), gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_large_images_scores_are_not_held_at_once():
    tokens, heads = 16384, 16
    q = jax.ShapeDtypeStruct((1, tokens, heads, 80), jnp.bfloat16)
    memory = jax.jit(lambda q, k, v: attend(q, k, v, None)).lower(q, q, q).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2.2e9 < tokens * tokens * heads * 4 / 5  # 17 GB
