"""Symmetric uniform quantization ``Q_b`` of one array: scale, encode, decode, straight-through (METHOD: arXiv 2605.19929, sec. 3.1).

Codes run from ``-2^(b-1)`` to ``2^(b-1) - 1`` and ``scale = clip * absmax / (2^(b-1) - 1)``. ``bits`` may be a Python int or a traced
scalar: one compiled training step then serves every scheme. 16 bits and more mean "not quantized".
"""

from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from splitq_jax.errors import InputError

WEIGHT_BITS = (2, 3, 4, 8, 16)
ACTIVATION_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
FLOAT_BITS = 16  # from here on nothing is rounded

Bits: TypeAlias = int | Int[Array, "*G"]
_P = ParamSpec("_P")
_T = TypeVar("_T")


def in_float32(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let a function multiply float32 matrices in float32, which accelerators do only when told; what the user has set stays."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        found = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        with jax.default_matmul_precision(found or "highest"):
            return function(*args, **kwargs)

    return run


def through_host(function: Callable[..., Any], shapes: Any, *args: Array) -> Any:
    """Run a function of numpy's world: at once where its arguments are there, by a callback where they are traced.

    Args:
      function: takes the arrays, returns numpy arrays; JAX compiles a call for each function that it has not seen.
      shapes: of the results, as `jax.pure_callback` has them.
      args: arrays.
    """
    if any(isinstance(a, jax.core.Tracer) for a in args):
        return jax.pure_callback(function, shapes, *args, vmap_method="sequential")
    # not by a callback: on a machine of one core it waits for an array that the core it occupies would have to copy
    return jax.tree.map(jnp.asarray, function(*args))


def check_bits(bits: int, supported: tuple[int, ...], what: str) -> None:
    """Raise `InputError` unless ``bits`` is one of ``supported``."""
    if bits not in supported:
        raise InputError(f"{what}: {bits} bits; supported are {', '.join(map(str, supported))}")


def code_range(bits: Bits) -> tuple[Float[Array, "*G"], Float[Array, "*G"]]:
    """Return the smallest and the largest code, float32, of each of ``bits``."""
    half = jnp.exp2(jnp.asarray(bits, jnp.float32) - 1)
    return -half, half - 1


def clipped_absmax(x: Float[Array, "*B"], clip: Float[Array, " 2 *C"] | None, axis: int) -> Float[Array, "*B1"]:
    """Largest magnitude along ``axis`` (kept as 1), its positive and its negative side scaled by a clipping factor each.

    Args:
      x: the array.
      clip: factors in (0, 1]: ``clip[0]`` for the maximum, ``clip[1]`` for the minimum, broadcast against the result with ``axis``
        kept; None for no clipping. The pair is FlatQuant's (arXiv 2410.09426).
      axis: the axis that shares a scale.
    """
    if clip is not None:
        x = x * jnp.where(x < 0, _align(clip[1], x), _align(clip[0], x))  # factors are positive: one maximum serves both sides
    return _largest(jnp.abs(x), axis)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest(x: Float[Array, "*B"], axis: int) -> Float[Array, "*B1"]:
    return jnp.max(x, axis=axis, keepdims=True)


@_largest.defjvp
def _largest_jvp(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # XLA may compute what the maximum was taken of once more for its gradient, and round it otherwise. Where no entry equals the maximum
    # then, `jnp.max` has a gradient of 0 / 0
    (x,), (dx,) = primals, tangents
    largest = _largest(x, axis)
    chosen = (x >= largest * (1 - 2.0**-20)).astype(x.dtype)
    count = jnp.sum(chosen, axis=axis, keepdims=True)
    return largest, jnp.sum(dx * (chosen / jnp.maximum(count, 1)), axis=axis, keepdims=True)


def _align(clip: Float[Array, "*C"], like: Float[Array, "*B1"]) -> Float[Array, "*B1"]:
    # a scalar factor serves all tokens; a vector holds one factor per output channel, the last axis
    return clip.reshape((1,) * (like.ndim - clip.ndim) + clip.shape)


def scale_of(x: Float[Array, "*B"], bits: Bits, clip: Float[Array, " 2 *C"] | None = None, axis: int = -1) -> Float[Array, "*B1"]:
    """Return the step between codes, ``clip * absmax / (2^(b-1) - 1)``; 1 where all entries are zero.

    NaN where one is NaN, but for what XLA's maxima of many leave out on CPU (see `splitq_jax.kernels.reference.quantize`).
    """
    _, top = code_range(bits)
    absmax = clipped_absmax(x, clip, axis)
    # on the quotient: a denormal absmax would underflow to a zero step
    step = absmax / top.astype(absmax.dtype)
    return jnp.where(step <= np.finfo(np.float32).tiny, jnp.ones_like(step), step)  # NaN stays


def _limits(bits: Bits, dtype: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
    low, high = code_range(bits)
    return low.astype(dtype), high.astype(dtype)


def _codes(x: Float[Array, "*B"], scale: Float[Array, "*B1"], bits: Bits) -> Float[Array, "*B"]:
    return jnp.clip(jnp.round(x / scale), *_limits(bits, x.dtype))


def encode(x: Float[Array, "*B"], scale: Float[Array, "*B1"], bits: int) -> Int[Array, "*B"]:
    """Round to nearest (ties to even) and clamp; int8 codes, so ``bits <= 8``."""
    return _codes(x, scale, bits).astype(jnp.int8)


def fake_quantize(
    x: Float[Array, "*B"], bits: Bits, clip: Float[Array, " 2 *C"] | None = None, axis: int = -1
) -> Float[Array, "*B"]:
    """``decode(encode(x))`` as a differentiable function.

    The gradient passes straight through the rounding, not through clamped values (there the clip and the absmax, through
    the scale, get theirs).
    """
    return _rounded(x, scale_of(x, bits, clip, axis), jnp.asarray(bits))


@jax.custom_vjp
def _rounded(x: Float[Array, "*B"], scale: Float[Array, "*B1"], bits: Int[Array, ""]) -> Float[Array, "*B"]:
    return jnp.where(bits >= FLOAT_BITS, x, _codes(x, scale, bits) * scale)


def _rounded_forward(x: Array, scale: Array, bits: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _rounded(x, scale, bits), (x, scale, bits)


def _rounded_backward(saved: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, None]:
    # written out: `jnp.clip` halves the gradient of what lies on a limit, and every value of the last code does once it is rounded
    x, scale, bits = saved
    low, high = _limits(bits, x.dtype)
    exact = x / scale
    code = jnp.round(exact)
    inside = (code >= low) & (code <= high)
    by_scale = jnp.where(bits >= FLOAT_BITS, 0, jnp.where(inside, code - exact, jnp.clip(code, low, high)))
    shared = tuple(i for i, (a, b) in enumerate(zip(x.shape, scale.shape, strict=True)) if a != b)
    return jnp.where(inside | (bits >= FLOAT_BITS), gradient, 0), jnp.sum(by_scale * gradient, axis=shared, keepdims=True), None


_rounded.defvjp(_rounded_forward, _rounded_backward)


@lru_cache(maxsize=256)
def gaussian_clip(bits: int, width: int) -> float:
    """Return the clip, relative to the absmax, with the least squared error for ``width`` Gaussian values that share a scale.

    Wide groups have a far absmax and gain from clipping; narrow ones hardly. Searched on a grid of 0.05 over 2^18 fixed draws; from a
    width of 4096 on it changes little, and that of 4096 is taken.
    """
    if bits >= 8:
        return float(1 / (1 + np.exp(-4.0)))  # sigmoid(4): rounding is finer than any gain from clipping
    width = min(width, 4096)
    draws = np.random.default_rng(0).standard_normal((2**18 // width, width))
    top = 2 ** (bits - 1) - 1
    errors = {}
    for clip in np.linspace(0.2, 0.95, 16):
        scale = clip * np.abs(draws).max(axis=1, keepdims=True) / top
        errors[float(clip)] = np.mean((np.clip(np.round(draws / scale), -top - 1, top) * scale - draws) ** 2)
    return min(errors, key=errors.__getitem__)


def logit(p: float) -> float:
    """Inverse of the sigmoid."""
    return float(np.log(p) - np.log1p(-p))
