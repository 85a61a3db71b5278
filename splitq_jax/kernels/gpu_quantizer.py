"""The quantizer of few tokens on Hopper: one Mosaic GPU kernel from picked channels to codes, steps and the side groups' columns.

A thread block takes a token and a group of channels. The token is ``V`` of shape ``(n1, n2)``; ``Y = P1^T V P2`` are two products of the
tensor cores, rows of ``Y`` dealt to warpgroups, 64 to each, which keep them in registers until they are codes. What a product multiplies
is the sum of two bfloat16 (`halves`), of whose four products the three larger are added: exact to about 2^-16, finer than TF32.

What is constant is laid out once (`lay_out`): the factors as halves, padded with zeros to what ``wgmma`` takes, and where in the token the
elements of the padded ``V`` lie, by which XLA picks and scales them in one kernel. ``[codes; residual codes] U`` is one product more, by
`gpu_matmul`, and one XLA kernel scales, gates and joins what becomes ``side``.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, BFloat16, Bool, Float, Int

from splitq_jax.kernels import hopper, hopper_interpreted
from splitq_jax.kernels.fragment import PLANES, pack_fragments
from splitq_jax.kernels.gpu_matmul import matmul, token_tile
from splitq_jax.kernels.gpu_tile import ROWS, SHARED_BYTES, STEP, Operands, Tile
from splitq_jax.kernels.operands import Activations, gate_scales, mac_mask, widen
from splitq_jax.numerics import FLOAT_BITS
from splitq_jax.qtensor import QTensor
from splitq_jax.transforms import Transform

if TYPE_CHECKING:
    from splitq_jax.linear import SplitWeight
else:
    SplitWeight = Any

TOKENS = 64  # up to here a token is a thread block's
WARPGROUPS = 2  # with more, a thread has too few registers for its share of Y
SPLITS, ALONG = 8, 4  # of the product with U, see `Tile`


@struct.dataclass
class Layout:
    """What the kernel reads of a site besides its clips.

    Attributes:
      channels: of the token, in the order of the padded ``V`` of all groups, one below the other; any where they are padded.
      scale: the transforms' ``d`` in that order, 0 where they are padded.
      factors: ``P1^T`` and ``P2`` of each group as halves, padded.
      u: the branches' ``U``, its columns padded to what the product takes, or None.
      sizes: ``(n1, n2)`` of each group.
    """

    channels: Int[Array, " E"]
    scale: Float[Array, " E"]
    factors: tuple[tuple[BFloat16[Array, "2 R D"], BFloat16[Array, "2 C C"]], ...]
    u: QTensor | None
    sizes: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)


class Plan(NamedTuple):
    """A group as the kernel computes it.

    Attributes:
      n1, n2: of ``V``.
      tile: columns of shared memory that lie together, of which what is multiplied is a multiple.
      rows: of ``Y``, a multiple of 64, such that ``rows n2`` covers what is stored.
      depth: rows of ``V``, padded.
      columns: of ``V`` and ``Y``, padded.
      first: where the group begins in the rows of all groups.
      bits: of the codes.
    """

    n1: int
    n2: int
    tile: int
    rows: int
    depth: int
    columns: int
    first: int
    bits: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block."""
        return 4 * self.columns * (self.depth + self.columns) + 8 * self.rows + 1024


class Memory(NamedTuple):
    """Shared memory: halves of ``V`` and ``P2``, the rows' absmax twice, and the barriers that say that these are there."""

    v: Any
    p2: Any
    absmax: Any
    full: Any
    met: Any


def plans(w: SplitWeight, sizes: tuple[tuple[int, int], ...]) -> list[Plan]:
    """Return every group's plan; ``w`` has the padded rows that the GPU's layout gives it."""
    out: list[Plan] = []
    for g, (n1, n2) in zip(w.groups, sizes, strict=True):
        columns = _up(n2, 16)
        tile = next(t for t in (64, 32, 16) if columns % t == 0 and t <= _up(n1, 16))
        first = out[-1].first + out[-1].depth if out else 0
        rows = _up(-(-g.w.padded_rows // n2), ROWS)
        out.append(Plan(n1, n2, tile, rows, _up(n1, tile), columns, first, g.a_bits))
    return out


def lay_out(w: SplitWeight, transforms: list[Transform]) -> Layout | None:
    """Return what the kernel reads, None for a site that it does not take: float activations, no factors, too wide ones.

    Args:
      w: the site as the GPU reads it.
      transforms: of its groups, with their factors.
    """
    if any(t.p2 is None or g.a_bits >= FLOAT_BITS for t, g in zip(transforms, w.groups, strict=True)):
        return None
    if w.branches is not None and w.branches.u.bits not in PLANES:
        return None
    sizes = tuple((1 if t.p1 is None else t.p1.shape[0], t.p2.shape[0]) for t in transforms if t.p2 is not None)
    groups = plans(w, sizes)
    if any(p.shared_bytes > SHARED_BYTES or p.columns > 256 or p.rows > ROWS * WARPGROUPS for p in groups):
        return None
    perm = jnp.arange(w.shape[0], dtype=jnp.int32) if w.perm is None else w.perm
    channels, scale, factors, at = [], [], [], 0
    across = max(p.columns for p in groups)
    for p, t in zip(groups, transforms, strict=True):
        assert t.p2 is not None
        size = p.n1 * p.n2
        d = jnp.ones(size, jnp.float32) if t.d is None else t.d.astype(jnp.float32)
        channels.append(_padded(perm[at : at + size].reshape(p.n1, p.n2), p.depth, across))
        scale.append(_padded(d.reshape(p.n1, p.n2), p.depth, across))
        p1 = jnp.ones((1, 1), jnp.float32) if t.p1 is None else t.p1.astype(jnp.float32)
        p1, p2 = _padded(p1.T, p.rows, p.depth), _padded(t.p2.astype(jnp.float32), p.columns, p.columns)
        factors.append((jnp.stack(halves(p1)), jnp.stack(halves(p2))))
        at += size
    u = None if w.branches is None else _fragments(w.branches.u)
    return Layout(jnp.concatenate(channels).ravel(), jnp.concatenate(scale).ravel(), tuple(factors), u, sizes)


def _fragments(u: QTensor) -> QTensor:
    assert u.scale is not None
    padding = ((0, 0), (0, -u.shape[1] % ROWS))
    words = pack_fragments(jnp.pad(u.codes(), padding), u.bits, 4, STEP)
    return QTensor(words, jnp.pad(u.scale.astype(jnp.float32), padding), u.bits, u.rows, 4)


def halves(x: Float[Array, "*B"]) -> tuple[BFloat16[Array, "*B"], BFloat16[Array, "*B"]]:
    """Return ``x`` as a sum of two bfloat16; by its bits, for compilers take a conversion there and back for nothing."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    high = lax.bitcast_convert_type((bits + 0x8000) & -0x10000, jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def quantize_activations(x: Float[Array, "M D"], w: SplitWeight, is_text: Bool[Array, " M"] | None, interpret: bool) -> Activations:
    """Transform, split and quantize tokens, and compute the narrow operand, of a site that `lay_out` takes."""
    laid, b, tokens = w.quantizer, w.branches, x.shape[0]
    groups = plans(w, laid.sizes)
    across = max(p.columns for p in groups)
    v = jnp.stack(halves(x[:, laid.channels].astype(jnp.float32) * laid.scale[None]), axis=1)
    v = v.reshape(2 * tokens, -1, across)
    scales = (None, None) if b is None else gate_scales(b)
    sends = tuple(scale is not None for scale in scales)
    widths = tuple(g.w.padded_rows for g in w.groups)
    count = sum(sends)
    clips = tuple(None if g.a_clip is None else g.a_clip.astype(jnp.float32) for g in w.groups)
    codes, step, *rest = _run(v, laid.factors, clips, tuple(groups), sends, widths, w.residual_bits, interpret)
    parts, sent = rest[: len(widths) - 1], rest[len(widths) - 1 :]
    if b is not None:
        narrow = jnp.zeros((tokens, b.rank), jnp.float32)
        products = iter(_with_u(sent[0], sent[1], laid.u, interpret)[..., : b.rank] if count else ())
        if scales[0] is not None:
            narrow += next(products) * scales[0]
        if scales[1] is not None:
            narrow += next(products) * scales[1] * mac_mask(w, is_text, tokens)
        parts.append(widen(narrow, b.v.padded_rows).astype(jnp.bfloat16))
    return Activations(codes, step[:, None], jnp.concatenate(parts, axis=1) if parts else None)


@partial(jax.jit, static_argnames=("groups", "sends", "widths", "residual_bits", "interpret"))  # sites of one shape share a trace
def _run(
    v: BFloat16[Array, "2M R C"],
    factors: tuple[tuple[Array, Array], ...],
    clips: tuple[Float[Array, " 2"] | None, ...],
    groups: tuple[Plan, ...],
    sends: tuple[bool, ...],
    widths: tuple[int, ...],
    residual_bits: int,
    interpret: bool,
) -> tuple[Array, ...]:
    """Return codes, steps, the side groups' columns, and the codes and steps that are multiplied by ``U``."""
    tokens, count = v.shape[0] // 2, sum(sends)
    # what goes into U's product is stored a second time: a slice of an operand would be a kernel of its own
    types = [((tokens, widths[0]), jnp.int8), ((tokens,), jnp.float32)]
    types += [((tokens, width), jnp.bfloat16) for width in widths[1:]]
    types += [((count, tokens, widths[0]), jnp.int8), ((count, tokens), jnp.float32)] if count else []
    together = tokens if interpret else 1  # the interpreter compiles anew for every thread block
    run = plgpu.kernel(
        partial(
            _kernel,
            groups=groups,
            sends=sends,
            residual_bits=residual_bits,
            together=together,
            registers=hopper_interpreted if interpret else hopper,
        ),
        out_type=tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in types),
        grid=(tokens // together, len(groups)),
        grid_names=("block", "group"),
        num_threads=max(p.rows for p in groups) // ROWS,
        thread_name="warpgroup",
        compiler_params=hopper.PARAMS,
        interpret=hopper.INTERPRETER if interpret else False,
    )
    out: tuple[Array, ...] = run(v, factors, clips)
    return out


def _with_u(codes: Int[Array, "B M K"], steps: Float[Array, "B M"], u: QTensor, interpret: bool) -> Float[Array, "B M R"]:
    """Return ``steps codes U`` of each of B matrices, by one product."""
    assert u.scale is not None
    x = codes.reshape(-1, codes.shape[2])
    operands = Operands(x, u.words, u.scale, steps.reshape(-1), None, (), (), None)
    # U has few columns: its rows are dealt to warpgroups and to thread blocks, or most of the processors would idle
    splits = max(1, min(SPLITS, x.shape[1] // STEP // ALONG))
    tile = Tile(min(TOKENS, token_tile(x.shape[0])), ROWS, 1, ALONG, splits)
    y = matmul(operands, u.bits, None, jnp.float32, None if interpret else tile, interpret)
    return y.reshape(*codes.shape[:2], -1)


def _kernel(
    v: Any,
    factors: Any,
    clips: Any,
    *outs: Any,
    groups: tuple[Plan, ...],
    sends: tuple[bool, ...],
    residual_bits: int,
    together: int,
    registers: Any,
) -> None:
    """Quantize: the body that every warpgroup of every thread block runs; all but the last arguments are references."""
    # asked for here, for the interpreter keeps what is asked for first, and may not take it out of a branch
    block, group, warpgroup = (lax.axis_index(name) for name in ("block", "group", "warpgroup"))
    for number, plan in enumerate(groups):

        def scope(memory: Memory, plan: Plan = plan, number: int = number) -> None:
            def token(i: Any, _: None) -> None:
                at, meetings = block * together + i, iter(range(2))
                y = _transform(plan, v, at, factors[number], memory, registers)

                def encode(y: Array, bits: int, clip: Any = None) -> tuple[Array, Array]:
                    return _encode(y, bits, clip, next(meetings), memory, registers)

                if number == 0:
                    _store_main(plan, at, y, clips[0], outs, sends, residual_bits, encode, registers)
                else:
                    codes, step = encode(y, plan.bits, clips[number])
                    registers.store_rows(outs[1 + number].at[at], (codes * step).astype(jnp.bfloat16), plan.n2)

            @pl.when(warpgroup < plan.rows // ROWS)
            def _() -> None:
                lax.fori_loop(0, together, token, None)

        @pl.when(group == number)
        def _(plan: Plan = plan, scope: Any = scope) -> None:
            pl.run_scoped(scope, _memory(plan), collective_axes="warpgroup")


def _store_main(
    plan: Plan,
    at: Any,
    y: Float[Array, "64 C"],
    clip: Any,
    outs: tuple[Any, ...],
    sends: tuple[bool, ...],
    residual_bits: int,
    encode: Callable[..., tuple[Array, Array]],
    registers: Any,
) -> None:
    """Encode the main group and what is left of it, each stored before the next is computed: registers are few."""

    def store(values: Any, steps: Any, codes: Array, step: Array) -> None:
        registers.store_rows(values, codes.astype(jnp.int8), plan.n2)
        steps[...] = step

    codes, step = encode(y, plan.bits, clip)
    store(outs[0].at[at], outs[1].at[at], codes, step)
    if sends[0]:
        store(outs[-2].at[0, at], outs[-1].at[0, at], codes, step)
    if sends[1]:
        residual, residual_step = encode(y - codes * step, residual_bits)
        store(outs[-2].at[sum(sends) - 1, at], outs[-1].at[sum(sends) - 1, at], residual, residual_step)


def _memory(plan: Plan) -> Memory:
    tiling = hopper.tiling(jnp.bfloat16, plan.tile)
    return Memory(
        v=plgpu.SMEM((2, plan.depth, plan.columns), jnp.bfloat16, transforms=tiling),
        p2=plgpu.SMEM((2, plan.columns, plan.columns), jnp.bfloat16, transforms=tiling),
        absmax=plgpu.SMEM((2, plan.rows), jnp.float32),
        full=plgpu.Barrier(num_arrivals=4),
        met=plgpu.Barrier(num_arrivals=plan.rows // ROWS, num_barriers=2),
    )


def _transform(plan: Plan, v: Any, token: Any, factors: tuple[Any, Any], memory: Memory, registers: Any) -> Float[Array, "64 C"]:
    """Return this warpgroup's rows of ``P1^T V P2``."""
    warpgroup, (p1, p2) = lax.axis_index("warpgroup"), factors

    @pl.when(warpgroup == 0)
    def _() -> None:
        for half in range(2):
            rows = v.at[2 * token + half, pl.ds(plan.first, plan.depth), pl.ds(0, plan.columns)]
            plgpu.copy_gmem_to_smem(rows, memory.v.at[half], memory.full)
            plgpu.copy_gmem_to_smem(p2.at[half], memory.p2.at[half], memory.full)

    mine = pl.ds(warpgroup * ROWS, ROWS)
    left = tuple(registers.load(p1.at[half, mine], hopper.ACCUMULATOR, optimized=False) for half in range(2))
    plgpu.barrier_wait(memory.full)

    def product(left: tuple[Array, Array], right: Any) -> Float[Array, "64 C"]:
        def products(accumulator: Any) -> None:
            for i, j in ((0, 0), (0, 1), (1, 0)):
                registers.wgmma_rows(accumulator, left[i], right.at[j])
            registers.wgmma_wait()

        y: Array = registers.summed((ROWS, plan.columns), jnp.float32, products)
        return y

    return product(halves(product(left, memory.v)), memory.p2)


def _encode(
    x: Float[Array, "64 C"], bits: int, clip: Any, meeting: int, memory: Memory, registers: Any
) -> tuple[Float[Array, "64 C"], Float[Array, ""]]:
    """`numerics.scale_of` and `numerics.encode` over the rows of all warpgroups; the codes stay floats."""
    top = 2.0 ** (bits - 1) - 1
    # factors are positive: the larger of the two is the magnitude times its side's factor
    sizes = jnp.abs(x) if clip is None else jnp.maximum(x * clip[0], x * -clip[1])
    warpgroup = lax.axis_index("warpgroup")
    memory.absmax[meeting, pl.ds(warpgroup * ROWS, ROWS)] = jnp.max(sizes, axis=1)
    plgpu.barrier_arrive(memory.met.at[meeting])
    plgpu.barrier_wait(memory.met.at[meeting])
    step = jnp.max(registers.load_vector(memory.absmax.at[meeting], hopper.COLUMNS)) / top
    step = jnp.where(step <= np.finfo(np.float32).tiny, 1.0, step)  # NaN stays
    # one division a token instead of one a channel: a quotient may come out a rounding away, which moves exact ties only
    codes = lax.round(x * (1.0 / step), lax.RoundingMethod.TO_NEAREST_EVEN)
    return jnp.minimum(jnp.maximum(codes, -top - 1), top), step


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(x: Array, rows: int, columns: int) -> Array:
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))
