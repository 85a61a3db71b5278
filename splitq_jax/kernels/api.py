"""Low-bit products, one public function a job; each runs on the backend that fits where the program runs.

``backend=None`` chooses inside jit, by the platform that the program is lowered for: the TPU's and the GPU's kernels, and the
reference everywhere else. A backend's name forces it: ``"tpu"`` and ``"gpu"`` are interpreted where there is none (slow, exact).
What a backend does not take goes to the reference, and says why to the logger ``splitq_jax.kernels`` at level DEBUG.
Each is jitted, so that a model traces and lowers a site once for every shape, not for every block, and on each platform. None has a
derivative. The formulas are eq. 6, 8 and 10 of arXiv 2605.19929 (see `splitq_jax.kernels.operands`).
"""

import logging
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float

from splitq_jax.errors import InputError
from splitq_jax.kernels import reference
from splitq_jax.kernels.operands import Activations, side_width
from splitq_jax.kernels.sharding import over_devices
from splitq_jax.qtensor import QTensor

if TYPE_CHECKING:
    from splitq_jax.linear import SplitWeight
else:
    SplitWeight = Any

Backend = Literal["reference", "tpu", "gpu"]
PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}  # backends and JAX's names of what they run on
DECODE_TOKENS = 64  # up to here the product is bound by the weight's bytes, and quantizing inside it is free
_Run = Callable[[str, Any, int], Callable[..., Any]]
LOG = logging.getLogger("splitq_jax.kernels")


@partial(jax.jit, static_argnames=("dtype", "backend"))
def split_matmul(
    x: Float[Array, "M D"],
    w: SplitWeight,
    is_text: Bool[Array, " M"] | None = None,
    bias: Float[Array, " N"] | None = None,
    *,
    dtype: DTypeLike | None = None,
    backend: Backend | None = None,
) -> Float[Array, "M N"]:
    """Multiply tokens by a site: `decode_matmul` for few tokens, else `quantize_activations` and `quantized_matmul`.

    Args:
      x: tokens.
      w: the site.
      is_text: which tokens are text; only MAC reads it. None: all are.
      bias: added at the end.
      dtype: of the result; None for that of ``x``.
      backend: see the module.

    Raises:
      InputError: an unknown backend; tokens, a mask or a bias that do not fit the site.
    """
    _check("split_matmul", x, w, is_text, bias)
    out = jnp.dtype(dtype or x.dtype)

    def on(run: _Run, tokens: tuple[Array, Array | None], w: SplitWeight, bias: Array | None) -> Array:
        x, is_text = tokens
        if x.shape[0] <= DECODE_TOKENS:
            return run("decode_matmul", w, x.shape[0])(x, w, is_text, bias, dtype=out)
        # side's type is the backend's own: it stays inside
        a = run("quantize_activations", w, x.shape[0])(x, w, is_text)
        return run("quantized_matmul", w, x.shape[0])(a, w, bias, dtype=out)

    return _dispatch(on, backend, (x, is_text), w, bias)


@partial(jax.jit, static_argnames="backend")
def quantize_activations(
    x: Float[Array, "M D"],
    w: SplitWeight,
    is_text: Bool[Array, " M"] | None = None,
    *,
    backend: Backend | None = None,
) -> Activations:
    """Transform and split tokens, quantize each with a scale of its own, and compute the narrow operand of `quantized_matmul`.

    The narrow operand is bfloat16, the tensor cores' type, on every backend but the forced reference, which leaves it in float32.

    Raises:
      InputError: an unknown backend; tokens or a mask that do not fit the site.
    """
    _check("quantize_activations", x, w, is_text)
    side = jnp.float32 if backend == "reference" else jnp.bfloat16

    def on(run: _Run, tokens: tuple[Array, Array | None], w: SplitWeight, _: None) -> Activations:
        x, is_text = tokens
        a: Activations = run("quantize_activations", w, x.shape[0])(x, w, is_text)
        values = a.values if a.scale is None else a.values.astype(jnp.int8)  # int4 stays inside a backend
        return a._replace(values=values, side=None if a.side is None else a.side.astype(side))

    prepared: Activations = _dispatch(on, backend, (x, is_text), w, None, columns=False)
    return prepared


@partial(jax.jit, static_argnames=("dtype", "backend"))
def quantized_matmul(
    a: Activations,
    w: SplitWeight,
    bias: Float[Array, " N"] | None = None,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    backend: Backend | None = None,
) -> Float[Array, "M N"]:
    """Return ``s_x s_w (codes . W_m) + side . B + bias``: integer products for integer codes, float ones where activations stay floats.

    Raises:
      InputError: an unknown backend; a side operand or a bias that does not fit the site.
    """
    _check("quantized_matmul", None, w, None, bias)
    width = 0 if a.side is None else a.side.shape[1]
    if width != side_width(w):
        raise InputError(f"quantized_matmul: the side operand has {width} columns, the site's has {side_width(w)}")
    return _dispatch(_job("quantized_matmul", dtype), backend, (a,), w, bias)


@partial(jax.jit, static_argnames=("dtype", "backend"))
def decode_matmul(
    x: Float[Array, "M D"],
    w: SplitWeight,
    is_text: Bool[Array, " M"] | None = None,
    bias: Float[Array, " N"] | None = None,
    *,
    dtype: DTypeLike | None = None,
    backend: Backend | None = None,
) -> Float[Array, "M N"]:
    """Quantize tokens inside the product: the form for few tokens, as in decoding.

    Raises:
      InputError: an unknown backend; tokens, a mask or a bias that do not fit the site.
    """
    _check("decode_matmul", x, w, is_text, bias)
    return _dispatch(_job("decode_matmul", dtype or x.dtype), backend, (x, is_text), w, bias)


@partial(jax.jit, static_argnames=("dtype", "backend"))
def weight_only_matmul(
    x: Float[Array, "M K"],
    w: QTensor,
    bias: Float[Array, " N"] | None = None,
    *,
    dtype: DTypeLike | None = None,
    backend: Backend | None = None,
) -> Float[Array, "M N"]:
    """Return ``x W + bias`` for float tokens and packed codes with scales per column, or per column and group of rows.

    Raises:
      InputError: an unknown backend; tokens or a bias that do not fit the weight.
    """
    _check("weight_only_matmul", x, w, None, bias)
    return _dispatch(_job("weight_only_matmul", dtype or x.dtype), backend, (x,), w, bias)


def _check(job: str, x: Array | None, w: SplitWeight | QTensor, is_text: Array | None = None, bias: Array | None = None) -> None:
    rows, columns = w.shape
    if x is not None:
        if x.ndim != 2 or x.shape[1] != rows or not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(f"{job}: tokens {x.dtype}{list(x.shape)}; expected floats [M, {rows}], a row for each token")
        if is_text is not None and (is_text.shape != x.shape[:1] or is_text.dtype != bool):
            raise InputError(f"{job}: is_text {is_text.dtype}{list(is_text.shape)}; expected bool[{x.shape[0]}]")
    if bias is not None and bias.shape != (columns,):
        raise InputError(f"{job}: a bias of shape {list(bias.shape)}; expected [{columns}]")


def _job(name: str, dtype: DTypeLike) -> Callable[..., Any]:
    def on(run: _Run, tokens: tuple[Any, ...], w: SplitWeight | QTensor, bias: Array | None) -> Any:
        return run(name, w, jax.tree.leaves(tokens)[0].shape[0])(tokens[0], w, *tokens[1:], bias, dtype=jnp.dtype(dtype))

    return on


def _dispatch(
    on: Callable[..., Any], backend: Backend | None, tokens: Any, w: SplitWeight | QTensor, bias: Array | None, columns: bool = True
) -> Any:
    """Run ``on(run, tokens, w, bias)`` over the devices where those lie, on the backend asked for or on the platform's.

    ``run`` finds a backend's function of a job. ``columns``: see `over_devices`.
    """
    if backend not in (None, "reference", *PLATFORMS):
        raise InputError(f"backend {backend!r}; expected None, 'reference', {', '.join(map(repr, PLATFORMS))}")
    run = partial(_on_platform, on, backend)
    product = jax.custom_jvp(lambda tokens, w, bias: over_devices(run, tokens, w, bias, columns))
    product.defjvp(_no_derivative)
    return product(tokens, w, bias)


def _no_derivative(*_: Any) -> Any:
    raise InputError(
        "products of packed codes have no derivative: codes are whole numbers; differentiate with the tree of `prepare`, before `freeze`"
    )


def _on_platform(on: Callable[..., Any], backend: Backend | None, *args: Any) -> Any:
    on_reference = partial(on, _reference)
    if backend == "reference":
        return on_reference(*args)
    if backend is None:
        compiled = {PLATFORMS[name]: partial(on, partial(_kernel, name, False)) for name in PLATFORMS}
        return jax.lax.platform_dependent(*args, default=on_reference, **compiled)
    if jax.default_backend() == backend:
        # an interpreter's ordered effects may not stand in a program for a GPU, not even in a branch that is left out
        return on(partial(_kernel, backend, False), *args)
    compiled = {PLATFORMS[backend]: partial(on, partial(_kernel, backend, False))}
    return jax.lax.platform_dependent(*args, default=partial(on, partial(_kernel, backend, True)), **compiled)


def _reference(job: str, w: SplitWeight | QTensor, tokens: int) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(reference, job)
    return function


def _kernel(backend: str, interpret: bool, job: str, w: SplitWeight | QTensor, tokens: int) -> Callable[..., Any]:
    """Return a backend's function of a job, or the reference's where the backend refuses."""
    module = import_module(f"splitq_jax.kernels.{backend}")
    if reason := module.refuses(job, w, tokens):
        LOG.debug("%s %s x %s: %s leaves it to the reference: %s", job, tokens, w.shape, backend, reason)
        return _reference(job, w, tokens)
    return partial(getattr(module, job), interpret=interpret)
