"""`TrainableSplit`: a site while it is calibrated: float weight, learnable parts, and a differentiable quantized product.

A site is one fused weight whose layers read the same input (q, k and v; gate and up). Its input channels are split into the groups
main, text and vision, each with its own transform, scales and clips: ``Y = sum_j Q(X_j P_j) Q(P_j^-1 W_j)`` (arXiv 2605.19929, eq. 6).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.acc import LowRank
from splitq_jax.numerics import fake_quantize
from splitq_jax.transforms import Transform, apply, apply_inverse


@struct.dataclass
class LearnedGroup:
    """What is learned for one group of K channels.

    Attributes:
      transform: ``P_j``.
      w_clip: logits of LWC's two factors per output channel; None for no clipping.
      a_clip: logits of LAC's two factors; None for no clipping.
    """

    transform: Transform
    w_clip: Float[Array, "2 N"] | None
    a_clip: Float[Array, " 2"] | None


@struct.dataclass
class TrainableSplit:
    """A site under calibration.

    Attributes:
      w: the float weight, rows in the model's order.
      perm: ``[C_m | C_t | C_v]``.
      groups: one per non-empty group, in that order; main first.
      cws: the smoothing branch (all tokens) or None.
      mac: the compensation branch or None.
      bits: (main weight, main activation, side weight, side activation); an array, so that one compiled step serves every scheme.
      gram: ``X^T X`` of the input in the model's order, for GPTQ, or None.
      sizes: channels per group.
      mac_tokens: which tokens MAC serves: ``text``, ``vision`` or ``both``.
      learn_transform: whether the transforms are learned.
    """

    w: Float[Array, "D N"]
    perm: Int[Array, " D"]
    groups: tuple[LearnedGroup, ...]
    cws: LowRank | None
    mac: LowRank | None
    bits: Int[Array, " 4"]
    gram: Float[Array, "D D"] | None
    sizes: tuple[int, ...] = struct.field(pytree_node=False)
    mac_tokens: str = struct.field(pytree_node=False)
    learn_transform: bool = struct.field(pytree_node=False)


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


def branch_factors(branch: LowRank, transform: Transform) -> tuple[Float[Array, "K r"], Float[Array, "r N"]]:
    """Return ``U_* = P^-1 u`` and ``V_* = diag(gate) v``, unquantized (eq. 9)."""
    return apply_inverse(transform, branch.u), branch.gate[:, None] * branch.v


def main_weight(site: TrainableSplit, rows: Float[Array, "K N"]) -> Float[Array, "K N"]:
    """Return what of the main rows is rounded: ``W~ - U_s V_s`` with ``W~ = P^-1 W_m``."""
    transform = site.groups[0].transform
    if site.cws is None:
        return apply_inverse(transform, rows)
    return apply_inverse(transform, rows - site.cws.u @ (site.cws.gate[:, None] * site.cws.v))


def trainable_linear(x: Float[Array, "*B D"], site: TrainableSplit, is_text: Bool[Array, "*B"] | None) -> Float[Array, "*B N"]:
    """Multiply with straight-through quantization: the value that the packed codes give, with gradients."""
    w_bits, a_bits, side_w_bits, side_a_bits = site.bits
    tokens = split(x[..., site.perm], site.sizes, axis=-1)
    rows = split(site.w[site.perm], site.sizes, axis=0)
    y = jnp.zeros((*x.shape[:-1], site.w.shape[1]), x.dtype)
    for i, (group, x_j, w_j) in enumerate(zip(site.groups, tokens, rows, strict=True)):
        is_main = i == 0
        x_t = apply(group.transform, x_j)
        x_hat = fake_quantize(x_t, a_bits if is_main else side_a_bits, clip_factors(group.a_clip))
        w_t = main_weight(site, w_j) if is_main else apply_inverse(group.transform, w_j)
        y += x_hat @ fake_quantize(w_t, w_bits if is_main else side_w_bits, clip_factors(group.w_clip), axis=0)
        if is_main and site.cws is not None:
            y += _branch(x_hat, site.cws, group.transform, side_w_bits)
        if is_main and site.mac is not None:
            residual = fake_quantize(x_t - x_hat, side_a_bits)
            served = served_by_mac(site.mac_tokens, is_text, x.shape[:-1])
            y += jnp.where(served, _branch(residual, site.mac, group.transform, side_w_bits), 0)
    return y


def _branch(x: Float[Array, "*B K"], branch: LowRank, transform: Transform, bits: Any) -> Float[Array, "*B N"]:
    u, v = branch_factors(branch, transform)
    return (x @ fake_quantize(u, bits, axis=0)) @ fake_quantize(v, bits, axis=1)


def learnable(site: TrainableSplit) -> dict[str, Any]:
    """Return the learnable arrays: ``transforms`` (and free branches) apart from ``clips`` (and gates), which learn ten times as fast."""
    branches = {"cws": site.cws, "mac": site.mac}
    return {
        "transforms": {
            "groups": tuple(g.transform for g in site.groups) if site.learn_transform else (),
            **{k: {"u": b.u, "v": b.v} for k, b in branches.items() if b is not None and b.kind == "free"},
        },
        "clips": {
            "groups": tuple((g.w_clip, g.a_clip) for g in site.groups),
            **{k: b.gate for k, b in branches.items() if b is not None and b.kind == "gated"},
        },
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

    def branch(name: str, start: LowRank | None) -> LowRank | None:
        if start is not None and name in values["clips"]:
            return dataclasses.replace(start, gate=values["clips"][name])
        if start is not None and name in values["transforms"]:
            return dataclasses.replace(start, **values["transforms"][name])
        return start

    return dataclasses.replace(site, groups=tuple(groups), cws=branch("cws", site.cws), mac=branch("mac", site.mac))
