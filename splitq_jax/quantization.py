"""The only walk over a parameter tree: which sites a recipe matches, and the pure functions that turn their leaves.

``prepare`` gives a tree with `TrainableSplit` leaves, ``freeze`` one with `SplitWeight` leaves; the model applies all three.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from splitq_jax import acc, mocd, transforms
from splitq_jax.errors import InputError
from splitq_jax.linear import Group, SplitWeight
from splitq_jax.mocd import SiteStats
from splitq_jax.numerics import FLOAT_BITS, gaussian_clip, in_float32, logit
from splitq_jax.packing import TILE_ROWS, WIDE
from splitq_jax.qtensor import quantize_columns, quantize_rows
from splitq_jax.recipe import Recipe
from splitq_jax.rounding import gptq
from splitq_jax.site import LearnedGroup, TrainableSplit, clip_factors, split, unrounded
from splitq_jax.transforms import Transform, apply

Params = dict[str, Any]
Channels = Mapping[str, tuple[Int[Array, " K"], Int[Array, " L"]]]  # by site: C_t and C_v


def kernels(params: Params, prefix: str = "") -> dict[str, Any]:
    """Return every ``kernel`` leaf by the path of its layer, such as ``decoder/blocks_0/qkv``."""
    found: dict[str, Any] = {}
    for name, child in params.items():
        if name == "kernel":
            found[prefix.rstrip("/")] = child
        elif isinstance(child, dict):
            found |= kernels(child, f"{prefix}{name}/")
    return found


def without_blocks(params: Params) -> Params:
    """Return all parameters but the decoder's blocks."""
    return params | {"decoder": {name: child for name, child in params["decoder"].items() if not name.startswith("blocks_")}}


def match(params: Params, recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipe of every site that is quantized.

    Raises:
      InputError: a pattern that matches nothing, or layers outside the decoder's blocks.
    """
    parts = [recipe] if recipe.vision == "float" else [recipe, recipe.for_vision()]
    paths = kernels(params)
    matched: dict[str, Recipe] = {}
    for part in parts:
        for pattern in part.sites:
            hits = [path for path in paths if fnmatchcase(path, pattern)]
            if part is recipe and (others := [path for path in hits if not path.startswith("decoder/blocks_")]):
                raise InputError(
                    f"pattern {pattern!r} matches {others[0]}: `sites` names layers of the decoder's blocks; the vision tower has a scheme of its "
                    "own (vision=, --vision), and what else there is stays float"
                )
            if not hits:
                raise InputError(
                    f"pattern {pattern!r} matches none of the {len(paths)} layers "
                    f"({', '.join(list(paths)[:3])}, …); mend the recipe's `sites`"
                )
            matched |= dict.fromkeys(hits, part)
    return matched


def replace_kernels(params: Params, leaves: Mapping[str, Any]) -> Params:
    """Return the tree with the kernels of the named layers replaced; the input is left alone."""
    out = dict(params)
    for path, leaf in leaves.items():
        node = out
        for name in path.split("/"):
            node[name] = dict(node[name])
            node = node[name]
        node["kernel"] = leaf
    return out


@in_float32
def prepare(params: Params, stats: Mapping[str, SiteStats], recipe: Recipe, channels: Channels | None = None) -> Params:
    """Turn the matched kernels into `TrainableSplit` leaves, partitioned and at the start of training.

    What comes from host memory (numpy arrays, `models.load`'s ``on_host``) stays there, here and in `freeze`: a device then holds one site at
    a time.

    Args:
      params: a float parameter tree.
      stats: `calib.collect`'s statistics, per site; not needed by recipes that neither split nor smooth nor round by GPTQ.
      recipe: what to do.
      channels: for the sites that it names, the text and the vision channels to split off, in place of the recipe's choice.

    Raises:
      InputError: statistics or Gram matrices that the recipe needs are missing; a rank above ``min(D_m, N)``; ``channels`` of layers that are
        not quantized, or that are no disjoint parts of their site's.
    """
    channels = channels or {}
    leaves, found, matched = {}, kernels(params), match(params, recipe)
    if unknown := channels.keys() - matched.keys():
        raise InputError(f"channels of {min(unknown)}: the recipe quantizes no such layer; it does {next(iter(matched))}, …")
    for path, part in matched.items():
        w, columns = found[path], layer_columns(params, path)
        if not hasattr(w, "dtype"):
            raise InputError(f"{path}: a {type(w).__name__}; prepare takes the float tree")
        needs_stats = (part.select != "none" and path not in channels) or part.has_diagonal or part.rounding == "gptq"
        if needs_stats and path not in stats:
            tower = ", with the vision tower's (vision_tower=True, --vision-tower)" if path.startswith("vision/") else ""
            raise InputError(f"{path}: no calibration statistics; collect them from this model{tower}")
        seed = zlib.crc32(f"{recipe.seed}/{path}".encode())
        leaves[path] = _where(w, prepare_site(w, stats.get(path), part, seed, columns, path, channels.get(path)))
    return replace_kernels(params, leaves)


def _where(source: Any, leaf: Any) -> Any:
    """Return a leaf in host memory if what it was made of lies there."""
    return jax.tree.map(np.asarray, leaf) if isinstance(source, np.ndarray) else leaf


def layer_columns(params: Params, path: str) -> tuple[int, ...]:
    """Return the output sizes of the layers that a site fuses; ``o`` reads as many channels as there are queries."""
    *parents, name = path.split("/")
    node = params
    for parent in parents:
        node = node[parent]
    width = int(node[name]["kernel"].shape[1])
    if name == "qkv":
        q = int(node["o"]["kernel"].shape[0])
        return q, (width - q) // 2, (width - q) // 2
    return (width // 2, width // 2) if name == "gate_up" else (width,)


def prepare_site(
    w: Float[Array, "D N"],
    stats: SiteStats | None,
    recipe: Recipe,
    seed: int,
    columns: tuple[int, ...],
    path: str,
    channels: tuple[Array, Array] | None = None,
) -> TrainableSplit:
    """Partition one site and set its learnable parts to their start (see `Recipe`).

    Raises:
      InputError: what `partition` refuses; Gram matrices or rank that the recipe needs and the site has not; a `Recipe.group_size`
        that does not divide the main group.
    """
    w = w.astype(jnp.float32)
    width = w.shape[0]
    perm, k_text, k_vision = partition(width, stats, recipe, seed, path, channels)
    sizes = tuple(k for k in (width - k_text - k_vision, k_text, k_vision) if k)
    if recipe.group_size is not None and sizes[0] % recipe.group_size:
        divisors = [d for d in range(1, recipe.group_size) if sizes[0] % d == 0]
        raise InputError(
            f"{path}: groups of {recipe.group_size} channels do not divide the {sizes[0]} of the main group; "
            f"{', '.join(map(str, divisors[-3:]))} do"
        )
    x_absmax = jnp.ones(width) if stats is None else jnp.max(stats.absmax, axis=0)
    groups = []
    for i, (x_max, rows) in enumerate(zip(split(x_absmax[perm], sizes, 0), split(w[perm], sizes, 0), strict=True)):
        w_bits, a_bits = recipe.main_bits if i == 0 else recipe.side
        sharing = (recipe.group_size if i == 0 else None) or rows.shape[0]
        lwc, lac = gaussian_clip(w_bits, sharing), gaussian_clip(a_bits, rows.shape[0])
        lwc = lwc if recipe.lwc_start is None else recipe.lwc_start
        scales = rows.shape[0] // sharing
        groups.append(
            LearnedGroup(
                start_transform(recipe, x_max, rows, seed),
                jnp.full((2, scales, w.shape[1]), logit(lwc), jnp.float32) if recipe.clip else None,
                jnp.full((2,), logit(lac), jnp.float32) if recipe.clip else None,
            )
        )
    if recipe.rounding == "gptq" and (stats is None or stats.gram is None):
        raise InputError(f"{path}: GPTQ needs Gram matrices; collect the statistics with them (gram=True, --gram)")
    branches, kinds = start_branches(w[perm][: sizes[0]], recipe, width, columns, path)
    return TrainableSplit(
        w=w,
        perm=perm,
        groups=tuple(groups),
        branches=branches,
        bits=jnp.array([*recipe.main_bits, *recipe.side], jnp.int32),
        gram=stats.gram if stats is not None and recipe.rounding == "gptq" else None,
        sizes=sizes,
        group_size=recipe.group_size,
        mac_tokens=recipe.mac_tokens,
        learn_transform=recipe.train and recipe.has_diagonal,
        kinds=kinds,
    )


def partition(
    width: int, stats: SiteStats | None, recipe: Recipe, seed: int, path: str, channels: tuple[Array, Array] | None
) -> tuple[Int[Array, " D"], int, int]:
    """Return a site's permutation ``[C_m | C_t | C_v]`` and the sizes ``(K_t, K_v)``: by ``channels``, else by the recipe.

    Raises:
      InputError: ``channels`` that are no disjoint parts; statistics of another split.
    """
    if channels is not None:
        text, vision = channels
        if not any(isinstance(chosen, jax.core.Tracer) for chosen in channels):
            mocd.check_channels(path, width, text, vision)
        return mocd.partition(width, jnp.asarray(text), jnp.asarray(vision)), len(text), len(vision)
    if stats is None or recipe.select == "none":
        return jnp.arange(width, dtype=jnp.int32), 0, 0
    expected = recipe.split.channels(width)
    if stats.vision_channels.shape[0] != expected:
        raise InputError(
            f"{path}: the statistics were collected for {stats.vision_channels.shape[0]} side channels, the recipe "
            f"splits {expected}; collect them with the recipe's split"
        )
    return mocd.select(stats, recipe.select, recipe.clusters, seed)


def start_transform(recipe: Recipe, x_absmax: Float[Array, " K"], rows: Float[Array, "K N"], seed: int) -> Transform:
    """Return a group's transform at the start: SmoothQuant's ``d`` and random orthogonal factors, Hadamard, or nothing."""
    size = rows.shape[0]
    if recipe.transform == "none":
        return transforms.IDENTITY
    if recipe.transform == "hadamard":
        n1, n2 = transforms.factors(size)
        return Transform(None, jnp.asarray(transforms.hadamard(n1)) if n1 > 1 else None, jnp.asarray(transforms.hadamard(n2)))
    d = transforms.smoothing(x_absmax, jnp.max(jnp.abs(rows), axis=1), *recipe.smooth)
    if recipe.transform == "diag":
        return Transform(d, None, None)
    n1, n2 = (1, size) if recipe.transform == "dense" else transforms.factors(size)
    p1, p2 = transforms.orthogonal(n1, seed), transforms.orthogonal(n2, seed + 1)
    return Transform(d, jnp.asarray(p1) if n1 > 1 else None, jnp.asarray(p2))


def start_branches(
    main: Float[Array, "K N"], recipe: Recipe, width: int, columns: tuple[int, ...], path: str
) -> tuple[acc.LowRank | None, tuple[acc.Branch, acc.Branch]]:
    """Return CWS and MAC at their start, None where both are off, and their kinds (arXiv 2605.19929, sec. 3.3).

    Args:
      main: the main group's rows of the weight.
      recipe: kinds, rates and starts.
      width: D, the site's channels.
      columns: the output sizes of the site's layers.
      path: for messages.

    Raises:
      InputError: a rank above ``min(D_m, N)``.
    """
    w_bits, a_bits = recipe.main_bits
    # MAC has nothing to send where activations are not quantized; at 16 bits throughout it stays, as what is an identity then
    no_residual = a_bits >= FLOAT_BITS and w_bits < FLOAT_BITS
    kinds: tuple[acc.Branch, acc.Branch] = (recipe.cws, "off" if no_residual else recipe.mac)
    per_layer = columns if recipe.svd_per == "layer" else None
    narrowest = min(main.shape[0], min(columns) if per_layer else main.shape[1])
    ranks = [0 if kind == "off" else acc.rank_of(rate, narrowest, width) for kind, rate in zip(kinds, recipe.rates, strict=True)]
    if not any(ranks):
        return None, kinds
    if max(ranks) > narrowest:
        raise InputError(f"{path}: rank {max(ranks)} above min(D, N) = {narrowest}; lower the rank rate")
    u, v = acc.svd_factors(main, ranks, per_layer)
    wide = [rank * (len(columns) if per_layer else 1) for rank in ranks]
    parts = list(zip(wide, kinds, (recipe.cws_start, recipe.mac_start), strict=True))
    if "free" in kinds:  # what one branch learns must not move the other
        u = jnp.concatenate([u[:, :r] for r in wide], axis=1)
        v = jnp.concatenate([(start if kind == "free" else 1.0) * v[:r] for r, kind, start in parts])
    elif wide[0] > wide[1] > 0:  # MAC has the last columns
        u, v = u[:, ::-1], v[::-1]
    gates = [jnp.full((r,), start if kind == "gated" else 1.0, jnp.float32) if r else None for r, kind, start in parts]
    return acc.LowRank(u, v, gates[0], gates[1]), kinds


@in_float32
def freeze(params: Params, recipe: Recipe) -> Params:
    """Round the `TrainableSplit` leaves that a recipe matches to `SplitWeight`: packed codes and scales.

    Args:
      params: `prepare`'s tree, trained or not.
      recipe: the same recipe; bits are static here. A tree that several recipes prepared is frozen with each of them.

    Raises:
      InputError: another tree than `prepare`'s; one that was prepared for other bits.
    """
    leaves, found = {}, kernels(params)
    for path, part in match(params, recipe).items():
        if not isinstance(found[path], TrainableSplit):
            raise InputError(f"{path}: a {type(found[path]).__name__}; freeze takes the tree of `prepare`, with the same recipe")
        bits, wanted = found[path].bits, [*part.main_bits, *part.side]
        if not isinstance(bits, jax.core.Tracer) and bits.tolist() != wanted:
            raise InputError(
                f"{path}: prepared for bits {bits.tolist()}, frozen for {wanted} (main and side, weights and activations)"
            )
        leaves[path] = _where(found[path].w, freeze_site(found[path], part))
    return replace_kernels(params, leaves)


def freeze_site(site: TrainableSplit, recipe: Recipe) -> SplitWeight:
    """Round one site."""
    (w_bits, a_bits), (side_w_bits, side_a_bits) = recipe.main_bits, recipe.side
    weights, exact = unrounded(site)
    multiple = TILE_ROWS if site.w.shape[0] >= WIDE else 1
    bits = (w_bits, *[side_w_bits] * (len(weights) - 1))
    clips = [clip_factors(group.w_clip) for group in site.groups]
    branches = None
    if exact is not None:
        u, v = quantize_columns(exact.u, side_w_bits, multiple=multiple), quantize_rows(exact.v, side_w_bits, multiple)
        branches = dataclasses.replace(exact, u=u, v=v)
    if site.gram is None or w_bits >= FLOAT_BITS:  # a recipe has codes in all groups or in none where it asks for GPTQ
        shared = (site.group_size, *[None] * (len(weights) - 1))
        codes = [quantize_columns(w, n, clip, multiple, g) for w, n, clip, g in zip(weights, bits, clips, shared, strict=True)]
    else:
        if exact is not None:  # what rounding takes from CWS itself is repaired with the rest
            weights[0] += exact.cws_product() - dataclasses.replace(exact, u=u.decode(), v=v.decode()).cws_product()
        # what the groups meet, X P, has the Gram matrix P^T (X^T X) P
        codes = gptq(weights, transformed(site, transformed(site, site.gram).T), bits, clips, multiple, site.group_size)
    groups = [
        Group(group.transform, clip_factors(group.a_clip), w, a_bits if i == 0 else side_a_bits)
        for i, (group, w) in enumerate(zip(site.groups, codes, strict=True))
    ]
    perm = site.perm if len(site.sizes) > 1 else None
    return SplitWeight(perm, tuple(groups), branches, site.mac_tokens, side_a_bits)


def transformed(site: TrainableSplit, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
    """Return ``X P``, the groups side by side."""
    parts = split(x[:, site.perm], site.sizes, axis=1)
    return jnp.concatenate([apply(g.transform, part) for g, part in zip(site.groups, parts, strict=True)], axis=1)


def quantize(params: Params, stats: Mapping[str, SiteStats], recipe: Recipe, channels: Channels | None = None) -> Params:
    """Quantize without training: ``freeze`` after ``prepare``. Pure: it jits and runs under `jax.eval_shape`.

    Args:
      params: a float parameter tree.
      stats: `prepare`'s.
      recipe: what to do.
      channels: `prepare`'s.

    Returns:
      The tree with `SplitWeight` leaves in the place of the matched kernels.

    Raises:
      InputError: what `prepare` refuses.
    """
    return freeze(prepare(params, stats, recipe, channels), recipe)
