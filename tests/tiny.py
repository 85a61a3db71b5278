"""A tiny random LLaVA with planted outliers, and calibration batches for it."""

import jax
import jax.numpy as jnp
import numpy as np

from splitq_jax.mocd import SplitSize
from splitq_jax.models.llava import Llava, LlavaConfig

IMAGE, VOCAB, WIDTH = 90, 96, 32
SPLIT = SplitSize(rate=0.06, align=2)
CONFIG = {
    "model_type": "llava",
    "image_token_index": IMAGE,
    "vision_feature_layer": -1,
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    },
    "text_config": {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "tie_word_embeddings": True,
}


def model_and_params(seed=0):
    model = Llava(LlavaConfig.from_hf(CONFIG))
    batch = {k: batches(1, seed)[0][k] for k in ("input_ids", "pixel_values")}
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **batch))["params"]
    rng = np.random.default_rng(seed)

    def leaf(path, spec):
        value = rng.standard_normal(spec.shape)
        if path[-1].key == "kernel":
            value *= 0.6 / np.sqrt(spec.shape[0])
        elif path[-1].key == "scale":  # some channels are large after every norm
            value = np.where(np.arange(spec.shape[0]) % 9 == 2, 8.0, 1.0) * rng.uniform(0.5, 1.5, spec.shape)
        else:
            value *= 0.3
        return jnp.asarray(value, jnp.float32)

    return model, jax.tree_util.tree_map_with_path(leaf, shapes)


def batches(count, seed=0, rows=4, length=14):
    """Rows of: two text tokens, four image placeholders, text; the last row of a batch is padded at its end."""
    rng = np.random.default_rng(seed + 100)
    out = []
    for _ in range(count):
        ids = rng.integers(1, IMAGE, (rows, length)).astype(np.int32)
        ids[:, 2:6] = IMAGE
        mask = np.ones((rows, length), bool)
        mask[-1, -3:] = False
        pixels = rng.standard_normal((rows, 3, 8, 8)).astype(np.float32)
        out.append({"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})
    return out


def merged(count):
    """Return the batches as one."""
    return [{k: np.concatenate([b[k] for b in batches(count)]) for k in batches(1)[0]}]


def intermediates(model, params, batch):
    """Return what the layers read, and the embedded tokens."""

    @jax.jit
    def run(p, b):
        _, state = model.apply({"params": p}, **b, mutable=["inputs"])
        return state, model.apply({"params": p}, **b, method="embed")

    return run(params, batch)
