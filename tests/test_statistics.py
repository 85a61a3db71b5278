import jax
import numpy as np
import pytest
from tiny import SPLIT, batches, intermediates, merged

from splitq_jax import calib
from splitq_jax.mocd import FIRST, TEXT, VISION, select


def assert_equal_stats(a, b):
    assert a.keys() == b.keys()
    for path in a:
        for name in ("absmax", "abs_sum", "count", "vision_channels", "ranks"):
            np.testing.assert_array_equal(getattr(a[path], name), getattr(b[path], name), err_msg=f"{path} {name}")
        for chosen, other in zip(select(a[path], "mocd", 3, 0), select(b[path], "mocd", 3, 0), strict=True):
            np.testing.assert_array_equal(chosen, other)


def test_statistics_are_numpys(tiny, stats):
    model, params = tiny
    (batch,) = merged(4)
    state, hidden = intermediates(model, params, batch)
    text, valid = np.asarray(hidden.context.is_text), np.asarray(hidden.context.valid)
    first = text & (np.arange(text.shape[1]) == 0)
    for block in ("blocks_0", "blocks_1"):
        for site in ("qkv", "o", "gate_up", "down"):
            x = np.asarray(state["inputs"]["decoder"][block][site]["kernel"][0])
            s = stats[f"decoder/{block}/{site}"]
            for kind, mask in ((VISION, valid & ~text), (TEXT, text & ~first), (FIRST, first)):
                # within 1e-5 of the site's largest: a float32 product's rounding scales with its row, not with the single entry
                np.testing.assert_allclose(s.absmax[kind], np.abs(x[mask]).max(0), rtol=0, atol=1e-5 * np.abs(x).max())
                np.testing.assert_allclose(s.abs_sum[kind], np.abs(x[mask]).sum(0), rtol=1e-4)
                assert int(s.count[kind]) == mask.sum()
            np.testing.assert_allclose(s.gram, x[valid].T @ x[valid], rtol=1e-3, atol=1e-2)
            k = SPLIT.channels(x.shape[-1])
            vision = np.sort(np.argsort(-np.abs(x[valid & ~text]).max(0), kind="stable")[:k])
            np.testing.assert_array_equal(s.vision_channels, vision)
            assert np.asarray(s.ranks).sum() == int((text & ~first).sum()) * x.shape[-1]


def test_statistics_do_not_depend_on_the_order(tiny, stats):
    model, params = tiny
    assert_equal_stats(stats, calib.collect(model, params, batches(4)[::-1], SPLIT))
    (whole,) = merged(4)
    mixed = {k: v[np.random.default_rng(0).permutation(len(v))] for k, v in whole.items()}
    assert_equal_stats(*(calib.collect(model, params, [b], SPLIT) for b in (whole, mixed)))


@pytest.mark.parametrize("devices", [3, 8])
def test_statistics_do_not_depend_on_the_sharding(devices, tiny):
    """Where the devices do not divide a batch either."""
    meshes = (None, calib.data_mesh(jax.devices()[:devices]))
    assert_equal_stats(*(calib.collect(*tiny, batches(4), SPLIT, mesh=mesh) for mesh in meshes))


def test_first_tokens_may_count_as_text(tiny):
    for s in calib.collect(*tiny, batches(1), SPLIT, skip_first=False).values():
        assert s.count.tolist() == [4 * 4, 4 * 10 - 3, 0] and not s.absmax[FIRST].any()
        assert s.ranks.sum() == s.count[TEXT] * s.ranks.shape[0]
