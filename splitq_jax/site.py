"""`TrainableSplit`: a site while it is calibrated: float weight, learnable parts, and a differentiable quantized product.

A site is one fused weight whose layers read the same input (q, k and v; gate and up). Its input channels are split into the groups
main, text and vision, each with its own transform, scales and clips: ``Y = sum_j Q(X_j P_j) Q(P_j^-1 W_j)`` (arXiv 2605.19929, eq. 6).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.acc import BRANCH_NAMES, Branch, LowRank
from splitq_jax.numerics import fake_quantize
from splitq_jax.qtensor import in_groups
from splitq_jax.transforms import Transform, apply, apply_inverse


@struct.dataclass
class LearnedGroup:
    """What is learned for one group of K channels.

    Attributes:
      transform: ``P_j``.
      w_clip: logits of LWC's two factors per scale, G of them for each output channel; None for no clipping.
      a_clip: logits of LAC's two factors; None for no clipping.
    """

    transform: Transform
    w_clip: Float[Array, "2 G N"] | None
    a_clip: Float[Array, " 2"] | None


@struct.dataclass
class TrainableSplit:
    """A site under calibration.

    Attributes:
      w: the float weight, rows in the model's order.
      perm: ``[C_m | C_t | C_v]``, C_m ascending.
      groups: one per non-empty group, in that order; main first.
      branches: CWS and MAC, or None.
      bits: (main weight, main activation, side weight, side activation); an array, so that one compiled step serves every scheme.
      gram: ``X^T X`` of the input in the model's order, for GPTQ, or None.
      sizes: channels per group.
      group_size: channels of the main group that share a weight's scale; None: all.
      mac_tokens: which tokens MAC serves: ``text``, ``vision`` or ``both``.
      learn_transform: whether the transforms are learned.
      kinds: of the branches (CWS, MAC): ``gated`` learns the gate, ``free`` learns u and v, ``fixed`` learns nothing (``G = I``).
    """

    w: Float[Array, "D N"]
    perm: Int[Array, " D"]
    groups: tuple[LearnedGroup, ...]
    branches: LowRank | None
    bits: Int[Array, " 4"]
    gram: Float[Array, "D D"] | None
    sizes: tuple[int, ...] = struct.field(pytree_node=False)
    group_size: int | None = struct.field(pytree_node=False)
    mac_tokens: str = struct.field(pytree_node=False)
    learn_transform: bool = struct.field(pytree_node=False)
    kinds: tuple[Branch, Branch] = struct.field(pytree_node=False)


@struct.dataclass
class RoundedSplit:
    """A site with its weights rounded, still floats: computed once a training step and shared by the step's samples.

    Attributes:
      perm, bits, mac_tokens: `TrainableSplit`'s.
      transforms: ``P_j`` of each group.
      a_clips: logits of LAC's two factors of each group, or None.
      w: ``Q(P_j^-1 W_j)`` of each group (main group: less CWS's product).
      branches: ``Q(U)`` and ``Q(V)`` with the gates, or None.
    """

    perm: Int[Array, " D"]
    transforms: tuple[Transform, ...]
    a_clips: tuple[Float[Array, " 2"] | None, ...]
    w: tuple[Float[Array, "K N"], ...]
    branches: LowRank | None
    bits: Int[Array, " 4"]
    mac_tokens: str = struct.field(pytree_node=False)


def split(x: Array, sizes: tuple[int, ...], axis: int) -> list[Array]:
    """Cut an axis, already permuted, into its groups."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return jnp.split(x, ends, axis=axis)


def served_by_mac(mac_tokens: str, is_text: Bool[Array, "*B"] | None, shape: tuple[int, ...]) -> Bool[Array, "*B 1"]:
    """Return the mask of the tokens that MAC serves; ``is_text=None`` means that all tokens are text."""
    if is_text is None:
        is_text = jnp.ones(shape, bool)
    masks = {"text": is_text, "vision": ~is_text, "both": jnp.ones_like(is_text)}
    return masks[mac_tokens][..., None]


def clip_factors(logits: Array | None) -> Array | None:
    """Sigmoid of the clipping logits, or None."""
    return None if logits is None else jax.nn.sigmoid(logits)


class Unrounded(NamedTuple):
    """What of a site is rounded.

    Attributes:
      w: ``P_j^-1 W_j`` of each group; the main group's is ``W~ - U_s V_s`` (arXiv 2605.19929, eq. 8).
      branches: ``P_m^-1 U_r sqrt(S_r)``, ``sqrt(S_r) V_r^T`` and the gates (eq. 9), or None.
    """

    w: list[Float[Array, "K N"]]
    branches: LowRank | None


def unrounded(site: TrainableSplit) -> Unrounded:
    """Transform a site's weights and the factors of its branches."""
    main, *side = split(site.w[site.perm], site.sizes, axis=0)
    side = [apply_inverse(g.transform, w_j) for g, w_j in zip(site.groups[1:], side, strict=True)]
    transform, b = site.groups[0].transform, site.branches
    if b is None:
        return Unrounded([apply_inverse(transform, main), *side], None)
    # side by side, so that P_m is inverted once
    w, u = split(apply_inverse(transform, jnp.concatenate([main, b.u], axis=1)), (main.shape[1], b.rank), axis=1)
    b = dataclasses.replace(b, u=u)
    return Unrounded([w - b.cws_product(), *side], b)


def round_weights(site: TrainableSplit) -> RoundedSplit:
    """Round a site's weights straight through: all of a training step that does not depend on the tokens."""
    w_bits, _, side_w_bits, _ = site.bits
    w, b = unrounded(site)
    bits = (w_bits, *[side_w_bits] * (len(w) - 1))
    if b is not None:
        b = dataclasses.replace(b, u=fake_quantize(b.u, side_w_bits, axis=0), v=fake_quantize(b.v, side_w_bits, axis=1))
    return RoundedSplit(
        perm=site.perm,
        transforms=tuple(g.transform for g in site.groups),
        a_clips=tuple(g.a_clip for g in site.groups),
        w=tuple(
            _round_columns(w_j, n, g.w_clip, site.group_size if i == 0 else None)
            for i, (w_j, n, g) in enumerate(zip(w, bits, site.groups, strict=True))
        ),
        branches=b,
        bits=site.bits,
        mac_tokens=site.mac_tokens,
    )


def _round_columns(
    w: Float[Array, "K N"], bits: Array, logits: Float[Array, "2 G N"] | None, rows: int | None
) -> Float[Array, "K N"]:
    clip = clip_factors(logits)
    return fake_quantize(in_groups(w, rows), bits, None if clip is None else clip[:, :, None], axis=1).reshape(w.shape)


def rounded_linear(x: Float[Array, "*B D"], site: RoundedSplit, is_text: Bool[Array, "*B"] | None) -> Float[Array, "*B N"]:
    """Multiply with straight-through quantization of the tokens: the value that the packed codes give, with gradients."""
    _, a_bits, _, side_a_bits = site.bits
    tokens = split(x[..., site.perm], tuple(w.shape[0] for w in site.w), axis=-1)
    y = jnp.zeros((*x.shape[:-1], site.w[0].shape[1]), x.dtype)
    for i, (transform, a_clip, x_j, w_j) in enumerate(zip(site.transforms, site.a_clips, tokens, site.w, strict=True)):
        is_main = i == 0
        x_t = apply(transform, x_j)
        x_hat = fake_quantize(x_t, a_bits if is_main else side_a_bits, clip_factors(a_clip))
        y += x_hat @ w_j
        if is_main and (b := site.branches) is not None:
            if b.cws is not None:
                at = b.columns("cws")
                y += (x_hat @ b.u[:, at]) @ (b.cws[:, None] * b.v[at])
            if b.mac is not None:
                at = b.columns("mac")
                residual = fake_quantize(x_t - x_hat, side_a_bits)
                served = served_by_mac(site.mac_tokens, is_text, x.shape[:-1])
                y += jnp.where(served, (residual @ b.u[:, at]) @ (b.mac[:, None] * b.v[at]), 0)
    return y


def learnable(site: TrainableSplit) -> dict[str, Any]:
    """Return the learnable arrays: ``transforms`` (and free branches) apart from ``clips`` (and gates), which learn ten times as fast."""
    free, gates = {}, {}
    if (b := site.branches) is not None:
        for name, kind, gate in zip(BRANCH_NAMES, site.kinds, (b.cws, b.mac), strict=True):
            if kind == "gated":
                gates[name] = gate
            elif kind == "free":
                at = b.columns(name)
                free[name] = {"u": b.u[:, at], "v": b.v[at]}
    return {
        "transforms": {"groups": tuple(g.transform for g in site.groups) if site.learn_transform else (), **free},
        "clips": {"groups": tuple((g.w_clip, g.a_clip) for g in site.groups), **gates},
    }


def with_learnable(site: TrainableSplit, values: dict[str, Any]) -> TrainableSplit:
    """Put learnable arrays back: ``with_learnable(site, learnable(site)) == site``."""
    groups = [
        dataclasses.replace(g, w_clip=w_clip, a_clip=a_clip)
        for g, (w_clip, a_clip) in zip(site.groups, values["clips"]["groups"], strict=True)
    ]
    if site.learn_transform:
        transforms = values["transforms"]["groups"]
        groups = [dataclasses.replace(g, transform=t) for g, t in zip(groups, transforms, strict=True)]
    branches = site.branches
    for name in BRANCH_NAMES:
        if branches is not None and name in values["clips"]:
            branches = dataclasses.replace(branches, **{name: values["clips"][name]})
        if branches is not None and name in values["transforms"]:
            at, new = branches.columns(name), values["transforms"][name]
            branches = dataclasses.replace(branches, u=branches.u.at[:, at].set(new["u"]), v=branches.v.at[at].set(new["v"]))
    return dataclasses.replace(site, groups=tuple(groups), branches=branches)
