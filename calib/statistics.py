"""Statistics of every site's input over the calibration set, in two streamed passes a block.

The first finds maxima and with them ``C_v``; the second counts the text tokens' ranks among the other channels. Samples go through
a block one by one, so that a sample's arithmetic does not depend on its neighbours, and are gathered by maxima, counts and sums in
float64: the scores are the same under any order and any sharding of the samples.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float
from rich.progress import Progress

from splitq_jax.calib.blocks import (
    Batch,
    Hidden,
    Params,
    after,
    block_name,
    block_params,
    checked,
    embed,
    finite,
    on_all,
    outer_params,
    pad_rows,
    place,
    sharded,
)
from splitq_jax.calib.run import fingerprint
from splitq_jax.errors import InputError
from splitq_jax.mocd import FIRST, RANK_BINS, TEXT, VISION, SiteStats, SplitSize, rank_histogram, token_ranks, top
from splitq_jax.numerics import in_float32
from splitq_jax.output import counter
from splitq_jax.processes import check_alike
from splitq_jax.sharding import on_host

DEFAULT_SPLIT = SplitSize()


@in_float32
def collect(
    model: Any,
    params: Params,
    batches: Iterable[Batch],
    split: SplitSize = DEFAULT_SPLIT,
    *,
    skip_first: bool = True,
    gram: bool = False,
    vision_tower: bool = False,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> dict[str, SiteStats]:
    """Collect the statistics of all decoder sites (and, on request, of the vision tower's), as arrays in host memory.

    Args:
      model: the Flax model.
      params: its float parameters.
      batches: calibration batches.
      split: the size of the side groups; ranks are counted among the channels that it leaves.
      skip_first: leave each sample's first token out of the scores: models park massive activations on it.
      gram: also collect ``X^T X``, which GPTQ needs.
      vision_tower: also collect maxima for the vision tower's sites.
      mesh: devices to share the samples (axis ``data``).
      progress: a rich progress bar to add a task to.

    Raises:
      InputError: an empty set, one modality only, values that are not finite, a mesh without the axis ``data``; parameters on devices of
        several processes (`jax.distributed`), or processes with other samples.

    Returns:
      Statistics by the path of the site, such as ``decoder/blocks_0/qkv``.
    """
    mesh = checked(mesh)
    batches = list(batches)
    check_alike("calibration samples", lambda: fingerprint(batches))
    hiddens = list(embed(model, params, batches))
    check_modalities(hiddens)
    stats = _vision_stats(model, params, batches, gram) if vision_tower else {}
    depth = model.config.num_layers
    most = max(_texts(h, skip_first).sum(1).max() for h in hiddens)
    count_block = counter(progress, "collecting statistics", depth)
    for i in range(depth):
        p = on_all(mesh, block_params(params, i))
        first_pass, second_pass = _passes(model.block(i), mesh, skip_first, gram)
        sums: dict[str, dict[str, np.ndarray]] = {}
        outs = []
        for hidden in hiddens:
            padded = pad_rows(hidden, mesh.size)
            y, part, grams = first_pass(p, place(mesh, padded.x), place(mesh, padded.context))
            outs.append(Hidden(on_host(y)[: hidden.x.shape[0]], hidden.context))
            part = {n: _over_samples(v, hidden.x.shape[0]) for n, v in part.items()}
            for n, g in grams.items():  # none, or one a site
                part[n]["gram"] = np.asarray(g, np.float64)
            sums = part if not sums else {name: _add(sums[name], part[name]) for name in part}
        for name, s in sums.items():
            finite(f"{block_name(i)}/{name}", s["abs_sum"], "activations")  # XLA's maxima of many leave NaN out on CPU
        chosen = {n: np.asarray(top(s["absmax"][VISION], split.channels(s["absmax"].shape[1]))) for n, s in sums.items()}
        main = {n: ~np.isin(np.arange(s["absmax"].shape[1]), chosen[n]) for n, s in sums.items()}
        ranks: dict[str, np.ndarray] = {}
        for hidden in hiddens:
            padded = pad_rows(hidden, mesh.size)
            where = text_positions(padded, skip_first, most)
            part = second_pass(p, place(mesh, padded.x), place(mesh, padded.context), place(mesh, where), main)
            part = jax.tree.map(on_host, part)
            ranks = part if not ranks else {n: ranks[n] + part[n] for n in part}
        for n, s in sums.items():
            stats[f"{block_name(i)}/{n}"] = SiteStats(
                **{k: np.asarray(v, np.float32) for k, v in s.items()},
                vision_channels=np.asarray(chosen[n], np.int32),
                ranks=ranks[n],
            )
        hiddens = [after(i, h) for h in outs]
        count_block()
    return stats


def check_modalities(hiddens: list[Hidden]) -> None:
    """Raise `InputError` unless the set holds vision and text tokens."""
    text = sum(int((h.context.valid & h.context.is_text).sum()) for h in hiddens)
    vision = sum(int((h.context.valid & ~h.context.is_text).sum()) for h in hiddens)
    if min(text, vision) == 0:
        missing = "vision" if vision == 0 else "text"
        raise InputError(f"calibration: {text} text and {vision} vision tokens; the method needs both; add samples with {missing}")


def _texts(hidden: Hidden, skip_first: bool) -> Bool[np.ndarray, "B L"]:
    context = hidden.context
    scored = context.valid & context.is_text
    return np.asarray(scored & (context.positions[..., 0] > 0) if skip_first else scored)


def text_positions(hidden: Hidden, skip_first: bool, most: int) -> dict[str, np.ndarray]:
    """Return the places of each sample's scored text tokens, at most ``most``, and which entries are real.

    Ranks need a sort a token; gathering the text tokens first spares it for the vision tokens.
    """
    text = _texts(hidden, skip_first)
    index = np.argsort(~text, axis=1, kind="stable")[:, :most]
    return {"index": index, "real": np.take_along_axis(text, index, axis=1)}


def _over_samples(part: dict[str, Array], samples: int) -> dict[str, np.ndarray]:
    """Gather one site's statistics, one row a sample, the padding left out."""
    rows = {k: on_host(v)[:samples] for k, v in part.items()}
    return {k: v.max(axis=0) if k == "absmax" else v.sum(axis=0, dtype=np.float64) for k, v in rows.items()}


def _add(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: np.maximum(a[k], b[k]) if k == "absmax" else a[k] + b[k] for k in a}


@cache
def _passes(block: Any, mesh: Mesh, skip_first: bool, gram: bool) -> tuple[Any, Any]:
    def inputs(p: Params, x: Array, context: Any) -> tuple[Array, dict[str, Array]]:
        y, state = block.apply({"params": p}, x[None], jax.tree.map(lambda a: a[None], context), mutable=["inputs"])
        return y[0], {name: entry["kernel"][0][0] for name, entry in state["inputs"].items()}

    def first(p: Params, xs: Array, contexts: Any) -> tuple[Array, dict[str, dict[str, Array]], dict[str, Array]]:
        def one(grams: dict[str, Array], sample: tuple[Array, Any]) -> tuple[dict[str, Array], Any]:
            x, context = sample
            y, sites = inputs(p, x, context)
            is_first = context.valid & context.is_text & (context.positions[..., 0] == 0) & skip_first
            classes = {VISION: ~context.is_text, TEXT: context.is_text & ~is_first, FIRST: is_first}
            masks = jnp.stack([classes[c] & context.valid for c in range(3)])  # 3 L
            live = {n: jnp.where(context.valid[:, None], v, 0) for n, v in sites.items()}
            grams = {n: g + live[n].T @ live[n] for n, g in grams.items()}
            return grams, (y, {n: _sums(v, masks) for n, v in sites.items()})

        shapes = jax.eval_shape(lambda: inputs(p, xs[0], jax.tree.map(lambda a: a[0], contexts))[1])
        start = {n: jnp.zeros((s.shape[-1],) * 2) for n, s in shapes.items()} if gram else {}
        grams, (y, sums) = jax.lax.scan(one, start, (xs, contexts))
        return y, sums, jax.lax.psum(grams, "data")

    def second(p: Params, xs: Array, contexts: Any, where: Any, main: dict[str, Array]) -> dict[str, Array]:
        def one(totals: dict[str, Array], sample: tuple[Array, Any, Any]) -> tuple[dict[str, Array], None]:
            x, context, at = sample
            _, sites = inputs(p, x, context)
            ranks = {n: token_ranks(v[at["index"]], main[n]) for n, v in sites.items()}
            return {n: t + rank_histogram(ranks[n], at["real"]) for n, t in totals.items()}, None

        start = {n: jnp.zeros((m.shape[0], RANK_BINS), jnp.int32) for n, m in main.items()}
        totals: dict[str, Array] = jax.lax.psum(jax.lax.scan(one, start, (xs, contexts, where))[0], "data")
        return totals

    rows = P("data")
    return (
        sharded(first, mesh, (P(), rows, rows), (rows, rows, P())),
        sharded(second, mesh, (P(), rows, rows, rows, P()), P()),
    )


def _sums(v: Float[Array, "L D"], masks: Bool[Array, "3 L"]) -> dict[str, Array]:
    magnitude = jnp.where(masks[..., None], jnp.abs(v), 0)  # 3 L D
    count = jnp.sum(masks, axis=1).astype(jnp.float32)
    return {"absmax": jnp.max(magnitude, axis=1), "abs_sum": jnp.sum(magnitude, axis=1), "count": count}


def _vision_stats(model: Any, params: Params, batches: list[Batch], gram: bool) -> dict[str, SiteStats]:
    """Maxima of the vision tower's sites; one modality, so no ranks and no split. A site may lie at any depth and be run several times."""

    @jax.jit
    def run(p: Params, batch: Any) -> dict[str, dict[str, Array]]:
        _, state = model.apply({"params": p}, **batch, method="embed", mutable=["inputs"])
        found: dict[str, dict[str, Array]] = {}
        for path, values in jax.tree_util.tree_leaves_with_path(
            state.get("inputs", {}).get("vision", {}), is_leaf=lambda v: isinstance(v, tuple)
        ):
            site = "/".join(["vision", *(key.key for key in path[:-1])])  # without the kernel's own name
            x = jnp.concatenate([v.reshape(-1, v.shape[-1]) for v in values]).astype(jnp.float32)
            found[site] = {"absmax": jnp.max(jnp.abs(x), axis=0), "abs_sum": jnp.sum(jnp.abs(x), axis=0)}
            found[site] |= {"count": jnp.full(1, x.shape[0], jnp.float32)} | ({"gram": x.T @ x} if gram else {})
        return found

    total: dict[str, dict[str, np.ndarray]] = {}
    outer = outer_params(params)
    for batch in batches:
        part = jax.tree.map(lambda a: np.asarray(a, np.float64), run(outer, model.prepare(batch)))
        if part:  # a batch of text has no images
            total = part if not total else {path: _add(total[path], part[path]) for path in part}
    out = {}
    for path, s in total.items():
        finite(path, s["abs_sum"], "activations")
        of_vision = np.arange(3) == VISION
        out[path] = SiteStats(
            absmax=np.where(of_vision[:, None], s["absmax"], 0).astype(np.float32),
            abs_sum=np.where(of_vision[:, None], s["abs_sum"], 0).astype(np.float32),
            count=np.where(of_vision, s["count"], 0).astype(np.float32),
            vision_channels=np.zeros(0, np.int32),
            ranks=np.zeros((s["absmax"].shape[0], 1), np.int32),
            gram=np.asarray(s["gram"], np.float32) if gram else None,
        )
    return out
