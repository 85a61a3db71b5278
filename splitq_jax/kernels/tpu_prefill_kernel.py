"""In a TPU kernel: tokens as the model has them become codes, steps and the narrow operand, channels in rows and tokens in lanes.

So a token's maximum takes no shuffle, and each step is a product of what lies in place:

1. ``(S diag(d) P2)^T`` of some segments of n2 channels at a time, where S, ones and zeros, picks them: a matrix with few columns, for the
   main group's channels are ascending. It is made in the first step.
2. ``P1^T (x) I_8``: eight channels of each segment are one tile of eight rows, and mixing segments mixes tiles.
3. Codes are turned back, 128 channels at a time; U meets them before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from splitq_jax.kernels.operands import Activations
from splitq_jax.kernels.tiles import LANES, up
from splitq_jax.kernels.tpu_prefill_plan import ROWS, Kept, Plan
from splitq_jax.kernels.tpu_quantizer import step_of
from splitq_jax.kernels.tpu_words import dot, expand

SOUGHT = 512  # channels among which the side groups' are looked for at a time
SHIFT, SHIFT_BITS = 1.5 * 2**23, 0x4B400000  # a float32 whose last bit is worth 1


class Side(NamedTuple):
    """``P^T`` of a side group, and its clips."""

    p: Any
    clip: Any


class Given(NamedTuple):
    """The kernel's operands: padded arrays, references to them in the kernel; None for what the site lacks.

    Attributes:
      x: tokens.
      mask: 1 for those that MAC serves, in a row.
      perm: of the main group's channels, a row a product; -1 for padding.
      d: their scales, likewise.
      p2: ``I (x) P2^T``, for the segments of one product.
      p1: ``P1^T``.
      clip: of the main group.
      side_perm: the side groups' channels, in a column; -1 for padding.
      sides: their transforms and clips.
      u: words of U.
      cws: U's scales times CWS's gate and V's scales, in a column.
      mac: likewise with MAC's gate.
    """

    x: Any
    mask: Any
    perm: Any
    d: Any
    p2: Any
    p1: Any
    clip: Any
    side_perm: Any
    sides: tuple[Side, ...]
    u: Any
    cws: Any
    mac: Any


def run(plan: Plan, interpret: bool, given: Given, out: Activations, kept: Kept) -> None:
    """Quantize one step's tokens."""
    _Quantizer(plan, interpret, given, out, kept).run()


@dataclass(frozen=True)
class _Quantizer:
    plan: Plan
    interpret: bool
    given: Given
    out: Any
    kept: Kept

    def run(self) -> None:
        plan, kept = self.plan, self.kept
        _, scale, side = self.out
        pl.when(pl.program_id(0) == 0)(self.begin)

        def turn(i: Any) -> None:
            kept.turned[_tile(i), :] = self.given.x[:, _tile(i)].T

        self.each(plan.lanes // LANES, 32, turn)
        step = step_of(self.transform(), plan.bits)
        self.encode(step)
        scale[...] = jnp.broadcast_to(step, (ROWS, plan.tokens)).T[:, :1]
        if side is not None:
            self.write_side(side)

    def begin(self) -> None:
        """Make what all steps use."""
        plan, given, kept = self.plan, self.given, self.kept
        kept.channels[...] = jnp.zeros(kept.channels.shape, kept.channels.dtype)
        kept.codes[...] = jnp.zeros(kept.codes.shape, kept.codes.dtype)
        if given.p1 is not None:
            kept.p1[...] = self.with_identity(given.p1[...])
        if given.u is not None:
            u = expand(given.u[...], plan.u_bits, jnp.int8 if plan.u_bits == 8 else jnp.bfloat16).astype(jnp.float32)
            columns = min(kept.u.shape[1], u.shape[0])
            kept.u[...] = jnp.zeros(kept.u.shape, kept.u.dtype)
            kept.u[: plan.rank, :columns] = u.T[:, :columns].astype(kept.u.dtype)
        lane = jax.lax.broadcasted_iota(jnp.int32, (plan.window, plan.together * plan.n2), 0)

        def pick(g: Any) -> None:
            where = given.perm[g] - self.start(g)
            missed = ((where < 0) | (where >= plan.window)) & (given.perm[g] >= 0)
            # the site promises ascending channels; one outside its window must not be left out in silence
            scaled = given.p2[...] * jnp.where(missed, jnp.nan, given.d[g])
            kept.picks[g] = self.dot(scaled, jnp.where(lane == where, 1.0, 0.0).T).astype(kept.picks.dtype)

        self.each(plan.products, 4, pick)

    def with_identity(self, p: Float[Array, "n n"]) -> Float[Array, "8*n 8*n"]:
        """Return ``p (x) I_8``, by products with ones and zeros; XLA would lay it out anew."""
        n, wide = p.shape[0], ROWS * p.shape[0]
        index, of = jax.lax.broadcasted_iota, jnp.int32
        rows = (index(of, (wide, n), 0) // ROWS == index(of, (wide, n), 1)).astype(jnp.float32)
        columns = (index(of, (n, wide), 0) == index(of, (n, wide), 1) // ROWS).astype(jnp.float32)
        same = index(of, (wide, wide), 0) % ROWS == index(of, (wide, wide), 1) % ROWS
        return jnp.where(same, self.dot(self.dot(rows, p), columns), 0.0).astype(self.kept.p1.dtype)

    def start(self, g: Any) -> Any:
        """Return the first channel that product ``g`` reads."""
        first = g * (self.plan.together * self.plan.n2) // LANES * LANES
        return jnp.minimum(first, self.plan.lanes - self.plan.window)

    def transform(self) -> Float[Array, "1 T"]:
        """Leave the main channels, transformed, in ``kept.channels``; return each token's clipped absmax."""
        plan, kept = self.plan, self.kept
        tall, halves = up(plan.n2, ROWS), range(plan.tokens // LANES)
        target = kept.segments if plan.mixes else kept.channels

        def pick(g: Any, ends: _Ends) -> _Ends:
            read = pl.ds(pl.multiple_of(self.start(g), LANES), plan.window)
            y = self.dot(kept.picks[g], kept.turned[read, :])
            for h in halves:
                target[h, pl.ds(pl.multiple_of(g * plan.picked_rows, ROWS), plan.picked_rows), :] = y[:, _half(h)]
            return ends if plan.mixes else _further(ends, y)

        def mix(k: Any, ends: _Ends) -> _Ends:
            rows = [pl.ds(pl.multiple_of(i * tall + ROWS * k, ROWS), ROWS) for i in range(plan.n1)]
            v = [jnp.concatenate([kept.segments[h, at, :] for at in rows], axis=0).astype(kept.p1.dtype) for h in halves]
            y = self.dot(kept.p1[...], jnp.concatenate(v, axis=1))
            for a in range(plan.n1):
                row = a * plan.n2 + ROWS * k
                at = pl.ds(pl.multiple_of(row, ROWS) if plan.n2 % ROWS == 0 else row, ROWS)
                for h in halves:
                    kept.channels[h, at, :] = y[a * ROWS : (a + 1) * ROWS, _half(h)]
            return _further(ends, y)

        ends = self.fold(plan.products, 64, pick, (_zeros(plan.tokens), _zeros(plan.tokens)))
        if plan.mixes:
            # the last tiles first: a segment's may spill padding into the next one, whose first tile comes after it
            last = tall // ROWS - 1
            unrolled = 4 if plan.n2 % ROWS == 0 else last + 1  # the compiler has to know rows between tiles
            ends = self.fold(last + 1, unrolled, lambda k, ends: mix(last - k, ends), ends)
        return _absmax(ends, self.given.clip)

    def encode(self, step: Float[Array, "1 T"]) -> None:
        """Write the main group's codes, and what the branches make of them and of what they leave."""
        plan, given, kept, values = self.plan, self.given, self.kept, self.out.values
        halves, blocks = range(plan.tokens // LANES), (plan.rows - ROWS) // LANES
        whole = min(blocks, plan.padded // LANES)

        def block(i: Any, columns: Any, most: Array) -> Array:
            tops = []
            for h in halves:
                x = kept.channels[h, _tile(i), :]
                codes = _codes(x, step[:, _half(h)], plan.bits)
                values[_half(h), columns] = codes.T[:, : columns.size].astype(values.dtype)
                if plan.rank:
                    kept.codes[_tile(i), _half(h)] = codes.astype(jnp.float32).astype(jnp.bfloat16)
                if given.mac is not None:
                    left = x - codes.astype(jnp.float32) * step[:, _half(h)]
                    kept.channels[h, _tile(i), :] = left
                    tops.append(_tree(jnp.maximum, _tiles(jnp.abs(left))))
            return jnp.maximum(most, jnp.concatenate(tops, axis=1)) if tops else most

        most = self.fold(whole, 8, lambda i, most: block(i, _tile(i), most), _zeros(plan.tokens))
        for i in range(whole, -(-plan.padded // LANES)):
            columns: Any = pl.ds(i * LANES, min(LANES, plan.padded - i * LANES))
            if i < blocks:
                most = block(i, columns, most)
            else:
                values[:, columns] = jnp.zeros((plan.tokens, columns.size), values.dtype)
        if plan.rank:
            kept.narrow[...] = jnp.zeros(kept.narrow.shape, jnp.float32)
        if given.cws is not None:
            kept.narrow[...] = dot(kept.u[...], kept.codes[...], self.interpret) * (given.cws[...] * step)

        def send_residual() -> None:
            left_step = step_of(jnp.max(most, axis=0, keepdims=True), plan.residual_bits)

            def one(i: Any) -> None:
                for h in halves:
                    codes = _codes(kept.channels[h, _tile(i), :], left_step[:, _half(h)], plan.residual_bits)
                    kept.codes[_tile(i), _half(h)] = codes.astype(jnp.float32).astype(jnp.bfloat16)

            self.each(blocks, 8, one)
            sent = dot(kept.u[...], kept.codes[...], self.interpret)
            kept.narrow[...] += sent * (given.mac[...] * (left_step * given.mask[...]))

        if given.mac is not None:
            pl.when(jnp.max(given.mask[...]) > 0)(send_residual)  # none of an image's tokens may be served

    def write_side(self, side: Any) -> None:
        """Write what the side groups and the branches have of ``side``."""
        plan = self.plan
        side[...] = jnp.zeros(side.shape, side.dtype)  # between the parts lie the columns that meet padding
        if plan.sides:
            self.write_groups(side)
        if plan.rank:
            side[:, plan.at : plan.at + plan.rank] = self.kept.narrow[...].T[:, : plan.rank].astype(side.dtype)

    def write_groups(self, side: Any) -> None:
        """Pick, transform and round the side groups."""
        plan, where = self.plan, self.given.side_perm[...]
        lane = jax.lax.broadcasted_iota(jnp.int32, (where.shape[0], SOUGHT), 1)
        found = jnp.zeros((where.shape[0], plan.tokens), jnp.float32)
        for start in range(plan.side_start, plan.lanes, SOUGHT):
            size = min(SOUGHT, plan.lanes - start)
            ones = jnp.where(lane[:, :size] == where - start, 1.0, 0.0).astype(jnp.bfloat16)
            found += dot(ones, self.kept.turned[start : start + size, :], self.interpret)
        first = 0
        for group, given in zip(plan.sides, self.given.sides, strict=True):
            x = self.dot(given.p[...], found[first : first + given.p.shape[0]])
            first += given.p.shape[0]
            step = step_of(_absmax(_further((_zeros(plan.tokens), _zeros(plan.tokens)), x), given.clip), group.bits)
            decoded = _codes(x, step, group.bits).astype(jnp.float32) * step
            side[:, group.at : group.at + group.size] = decoded.T[:, : group.size].astype(side.dtype)

    def dot(self, a: Array, b: Array) -> Array:
        """Multiply transforms, in the type in which they are kept."""
        operand = self.kept.picks.dtype
        return dot(a.astype(operand), b.astype(operand), self.interpret)

    def each(self, count: int, unrolled: int, body: Callable[[Any], None]) -> None:
        """Run ``body`` for every index, see `fold`."""

        def one(i: Any, nothing: Any) -> Any:
            body(i)
            return nothing

        self.fold(count, unrolled, one, jnp.zeros((), jnp.int32))

    def fold(self, count: int, unrolled: int, body: Callable[[Any, Any], Any], value: Any) -> Any:
        """Fold ``body`` over indices, ``unrolled`` of them side by side, so that one's products hide the other's latency."""
        unrolled = 1 if self.interpret else unrolled  # where nothing is hidden, and compiling would take long
        rounds = count // unrolled if count > unrolled else 0

        def some(i: Any, value: Any) -> Any:
            for j in range(unrolled):
                value = body(i * unrolled + j, value)
            return value

        value = jax.lax.fori_loop(0, rounds, some, value) if rounds else value
        for i in range(rounds * unrolled, count):
            value = body(i, value)
        return value


# --- arrays of channels x tokens

_Ends = tuple[Float[Array, "8 T"], Float[Array, "8 T"]]  # the largest and the smallest value, 0 among them


def _tile(i: Any) -> Any:
    return pl.ds(pl.multiple_of(i * LANES, LANES), LANES)


def _half(h: int) -> slice:
    return slice(h * LANES, (h + 1) * LANES)


def _zeros(tokens: int) -> Float[Array, "8 T"]:
    return jnp.zeros((ROWS, tokens), jnp.float32)


def _tiles(x: Float[Array, "K T"]) -> list[Float[Array, "8 T"]]:
    return [x[i : i + ROWS] for i in range(0, x.shape[0], ROWS)]


def _tree(function: Callable[[Array, Array], Array], parts: list[Array]) -> Array:
    """Reduce pair by pair: one after the other, each operation would wait for the last."""
    while len(parts) > 1:
        pairs = [function(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def _further(ends: _Ends, x: Float[Array, "K T"]) -> _Ends:
    return jnp.maximum(ends[0], _tree(jnp.maximum, _tiles(x))), jnp.minimum(ends[1], _tree(jnp.minimum, _tiles(x)))


def _absmax(ends: _Ends, clip: Any) -> Float[Array, "1 T"]:
    """See `numerics.clipped_absmax`."""
    high, low = jnp.max(ends[0], axis=0, keepdims=True), -jnp.min(ends[1], axis=0, keepdims=True)
    return jnp.maximum(high, low) if clip is None else jnp.maximum(high * clip[:, 0:1], low * clip[:, 1:2])


def _codes(x: Float[Array, "K T"], step: Float[Array, "1 T"], bits: int) -> Int[Array, "K T"]:
    """Round to the nearest code, ties to even: once `SHIFT` is added, a float's lowest bits hold it."""
    top = 2.0 ** (bits - 1) - 1
    shifted = jnp.clip(x * (1.0 / step), -top - 1, top) + SHIFT
    return jax.lax.bitcast_convert_type(shifted, jnp.int32) - SHIFT_BITS
