"""Block-wise training of what a recipe leaves to learn (arXiv 2605.19929, sec. 3.4, with FlatQuant's optimizer settings).

Teacher and student read the float input of the block; the loss is the error of the block's output, divided by its own detached
value. Samples are shared over the ``data`` axis; the gradient is the mean over it.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
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
    forward,
    merge,
    on_all,
    pad_rows,
    place,
    sharded,
)
from splitq_jax.calib.run import Run, fingerprint
from splitq_jax.errors import InputError
from splitq_jax.numerics import in_float32
from splitq_jax.output import counter
from splitq_jax.processes import check_alike
from splitq_jax.quantization import kernels, replace_kernels
from splitq_jax.sharding import on_host
from splitq_jax.site import TrainableSplit, learnable, round_weights, with_learnable

Loss = Literal["mse", "mae", "balanced", "token"]


@dataclass(frozen=True)
class FitConfig:
    """How blocks are trained; the defaults are the full recipe.

    Attributes:
      epochs: passes over the calibration samples.
      steps: a bound on the steps a block, or None; the schedule ends there.
      batch_size: samples a step.
      transform_lr: learning rate of the transforms.
      clip_lr: learning rate of clips and gates.
      weight_decay: AdamW's.
      final_lr: the cosine schedule's end, as a share of its start.
      loss: ``mse``; ``mae``; ``balanced``: vision and text weigh alike (after MBQ, arXiv 2412.19509); ``token``: each token's error is
        divided by what the block adds to that token, so that massive tokens do not dominate.
      epsilon: AdamW's. Gradients are of a loss of 1; those far below it are rounding noise, which a small epsilon blows up to whole steps.
      seed: of the order of the samples.
    """

    epochs: int = 15
    steps: int | None = None
    batch_size: int = 4
    transform_lr: float = 5e-3
    clip_lr: float = 5e-2
    weight_decay: float = 1e-2
    final_lr: float = 1e-3
    loss: Loss = "mse"
    epsilon: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise InputError(f"loss {self.loss!r}: expected one of {', '.join(get_args(Loss))}")
        if min(self.epochs, self.batch_size, 1 if self.steps is None else self.steps) < 1:
            raise InputError(f"epochs {self.epochs}, steps {self.steps}, batch_size {self.batch_size}: each must be at least 1")


FULL = FitConfig()
EFFORTS = {"light": FitConfig(steps=16), "full": FULL}


@dataclass(frozen=True)
class BlockError:
    """Relative output error ``sum |e|^2 / sum |y - x|^2`` of one block before and after training, on `fit`'s ``held_out``."""

    path: str
    before: float
    after: float


@in_float32
def fit(
    model: Any,
    params: Params,
    prepared: Params,
    batches: Iterable[Batch],
    config: FitConfig = FULL,
    *,
    held_out: Iterable[Batch] | None = (),
    run: Run | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> tuple[Params, list[BlockError]]:
    """Train the `TrainableSplit` leaves of ``prepared``, block by block, in order; each block is on the devices while its turn lasts.

    Args:
      model: the Flax model.
      params: its float parameters (the teacher).
      prepared: `prepare`'s tree (the student).
      batches: calibration batches, all of one length.
      config: optimizer settings.
      held_out: batches for the reported errors; if empty, the samples that the steps reach; None measures none, which takes less time.
      run: where finished blocks are kept, to resume from; None keeps nothing.
      mesh: devices to share the samples (axis ``data``).
      progress: a rich progress bar to add a task to.

    Returns:
      The trained tree and the blocks' errors, none where none are measured.

    Raises:
      InputError: an empty set; batches of different lengths; an error that is not finite; a mesh without the axis ``data``;
        parameters on devices of several processes (`jax.distributed`), or processes with other samples, channels or settings.
    """
    mesh, batches = checked(mesh), list(batches)
    # the weights may differ in the last bit between unlike hosts; channels and what is counted may not
    counted = [leaf for leaf in jax.tree.leaves(prepared) if not jnp.issubdtype(leaf.dtype, jnp.floating)]
    check_alike("calibration samples, channels or settings", lambda: fingerprint(batches, counted, config))
    data = merge(list(embed(model, params, batches)))
    samples, orders = data.x.shape[0], _orders(data.x.shape[0], config)
    used, places = np.unique(orders, return_inverse=True)  # few steps do not reach all samples: the rest need not pass the blocks
    data, orders = take(data, used), list(places.reshape(len(orders), -1))
    measured, held = held_out is not None, list(held_out or ())
    test = merge(list(embed(model, params, held))) if held else None
    depth = model.config.num_layers
    count_step = counter(progress, "training blocks", depth * len(orders))
    errors = []
    for i in range(depth):
        teacher, untrained = on_all(mesh, block_params(params, i)), block_params(prepared, i)
        sites = {k: v for k, v in kernels(untrained).items() if isinstance(v, TrainableSplit)}
        without_grams = replace_kernels(untrained, {n: dataclasses.replace(site, gram=None) for n, site in sites.items()})
        start = {n: learnable(site) for n, site in sites.items()}
        advance = forward(model.block(i), mesh)
        step, optimizer, measure = _functions(model.block(i), mesh, config, samples)
        (y,) = advance(teacher, [data])
        (y_test,) = advance(teacher, [test]) if test is not None else (None,)
        probe, probe_y = (data, y) if test is None or y_test is None else (test, y_test)
        # on the mesh from the start: arrays placed otherwise would be compiled for apart
        student, theta = on_all(mesh, (without_grams, start))
        kept = None if run is None else run.load(i, theta)
        if kept is None or (measured and not np.isfinite(kept[1][1])):
            before = after_training = measure(student, theta, probe, probe_y) if measured else np.nan
            if jax.tree.leaves(theta):
                state = on_all(mesh, optimizer.init(theta))
                for order in orders:
                    part, target = pad_rows(take(data, order), mesh.size), pad_rows(take(y, order), mesh.size)
                    theta, state = step(student, theta, state, *place(mesh, (part.x, target.x, part.context)))
                    count_step()
                after_training = measure(student, theta, probe, probe_y) if measured else np.nan
                finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(theta))
                if not finite or (measured and not np.isfinite(after_training)):
                    raise InputError(f"{block_name(i)}: training diverged (error {after_training}); lower the learning rates")
                if run is not None:
                    run.save(i, theta, (before, after_training))
            kept = theta, (before, after_training)
        else:
            for _ in orders:
                count_step()
        theta, (before, after_training) = kept
        if measured:
            errors.append(BlockError(block_name(i), before, after_training))
        theta = jax.tree.map(_where_it_was, theta, start)
        trained = replace_kernels(untrained, {n: with_learnable(site, theta[n]) for n, site in sites.items()})
        prepared = {**prepared, "decoder": {**prepared["decoder"], f"blocks_{i}": trained}}
        data, test = after(i, y), None if y_test is None else after(i, y_test)
    return prepared, errors


def _where_it_was(learned: Array, first: Array | np.ndarray) -> Array | np.ndarray:
    value = on_host(learned)  # not from devices to devices, which may be other processes'
    return value if isinstance(first, np.ndarray) else jax.device_put(value, first.sharding)


def take(hidden: Hidden, rows: np.ndarray) -> Hidden:
    """Return some samples of a batch."""
    return Hidden(hidden.x[rows], jax.tree.map(lambda a: a[rows], hidden.context))


def _orders(samples: int, config: FitConfig) -> list[np.ndarray]:
    rng = np.random.default_rng(config.seed)
    size = min(config.batch_size, samples)
    orders = []
    for _ in range(config.epochs):
        order = rng.permutation(samples)
        orders += [order[a : a + size] for a in range(0, samples - size + 1, size)]
    return orders[: config.steps]


def token_weights(loss: Loss, x: Float[Array, "B L D"], y: Float[Array, "B L D"], context: Any) -> Float[Array, "B L 1"]:
    """Return each token's weight in the loss, up to a factor that all share; padding gets 0. Under `jax.shard_map` over ``data``."""
    valid = context.valid.astype(y.dtype)
    if loss == "token":
        valid = valid / jnp.maximum(jnp.sum((y - x) ** 2, axis=-1), 1e-12)
    if loss == "balanced":
        text = valid * context.is_text.astype(y.dtype)
        vision = valid - text
        counts = jax.lax.psum((jnp.sum(text), jnp.sum(vision)), "data")
        valid = text / jnp.maximum(counts[0], 1) + vision / jnp.maximum(counts[1], 1)
    return valid[..., None]


@cache  # what is compiled for one recipe serves all schemes and its seeds
def _functions(block: Any, mesh: Mesh, config: FitConfig, samples: int) -> tuple[Any, Any, Callable[..., float]]:
    steps = len(_orders(samples, config))

    def rate(start: float) -> Any:
        return optax.cosine_decay_schedule(start, steps, alpha=config.final_lr)

    def adamw(start: float) -> Any:
        # one vector for all the small arrays: a fraction of the time to compile
        flat = optax.flatten(optax.adamw(rate(start), eps=config.epsilon, weight_decay=config.weight_decay))

        # a recipe may learn clips and no transforms, or the reverse, and nothing cannot be made a vector
        def init(params: Any) -> Any:
            return flat.init(params) if jax.tree.leaves(params) else optax.EmptyState()

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            return flat.update(updates, state, params) if jax.tree.leaves(updates) else (updates, state)

        return optax.GradientTransformation(init, update)

    optimizer = optax.partition(
        {"transforms": adamw(config.transform_lr), "clips": adamw(config.clip_lr)},
        lambda theta: {n: {k: jax.tree.map(lambda _, k=k: k, v) for k, v in t.items()} for n, t in theta.items()},
    )

    def predict(student: Params, theta: Any, x: Array, context: Any) -> Array:
        sites = kernels(student)
        rounded = replace_kernels(student, {n: round_weights(with_learnable(sites[n], t)) for n, t in theta.items()})

        def one(sample: tuple[Array, Any]) -> Array:
            x, context = jax.tree.map(lambda a: a[None], sample)
            y: Array = block.apply({"params": rounded}, x, context)[0]
            return y

        # one by one: a sample's arithmetic then does not depend on how many share its device, and no code on the edge between two
        # falls otherwise on another mesh
        predicted: Array = jax.lax.map(one, (x, context))
        return predicted

    def total(theta: Any, student: Params, x: Array, y: Array, context: Any) -> Array:
        error = predict(student, theta, x, context) - y
        distance = jnp.abs(error) if config.loss == "mae" else error**2
        return jnp.sum(distance * token_weights(config.loss, x, y, context))

    def update(student: Params, theta: Any, state: Any, x: Array, y: Array, context: Any) -> tuple[Any, Any]:
        # the normalisation by the detached loss cancels every constant factor: sum over the shards, divide by the sum
        value, grads = jax.value_and_grad(total)(theta, student, x, y, context)
        value, grads = jax.lax.psum((value, grads), "data")
        grads = jax.tree.map(lambda g: g / jnp.maximum(value, 1e-30), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its integer step count
            updates, state = optimizer.update(grads, state, theta)
        moved: Any = optax.apply_updates(theta, updates)
        return moved, state

    def errors(student: Params, theta: Any, x: Array, y: Array, context: Any) -> tuple[Array, Array]:
        valid = context.valid[..., None]
        e = jnp.where(valid, predict(student, theta, x, context) - y, 0)
        sums: tuple[Array, Array] = jax.lax.psum((jnp.sum(e**2), jnp.sum(jnp.where(valid, y - x, 0) ** 2)), "data")
        return sums

    rows = P("data")
    step = sharded(update, mesh, (P(), P(), P(), rows, rows, rows), (P(), P()))
    evaluate = sharded(errors, mesh, (P(), P(), rows, rows, rows), (P(), P()))

    def measure(student: Params, theta: Any, hidden: Hidden, y: Hidden) -> float:
        size = 16  # bounded memory; the last part is padded
        sums = np.zeros(2)
        for a in range(0, hidden.x.shape[0], size):
            rows = np.arange(a, min(a + size, hidden.x.shape[0]))
            multiple = -(-size // mesh.size) * mesh.size
            part, target = pad_rows(take(hidden, rows), multiple), pad_rows(take(y, rows), multiple)
            sums += [float(s) for s in evaluate(student, theta, *place(mesh, (part.x, target.x, part.context)))]
        return float(sums[0] / sums[1])

    return step, optimizer, measure
