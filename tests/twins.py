"""A random model of transformers and ours with its weights, and what they must agree on."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from splitq_jax import models

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def randomize(hf: Any, scale: float = 0.15) -> Any:
    """Biases and norms are random too, which transformers starts at 0 and 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(torch.randn(parameter.shape) * scale)
    return hf.eval()


def load(hf: Any, folder: Path) -> tuple[Any, Any]:
    hf.save_pretrained(folder)
    return models.load(folder)


def padded(rows: list[list[int]], padding: list[int], side: str = "left") -> dict[str, np.ndarray]:
    """Put rows and so many tokens of padding into a batch."""
    width = max(len(r) + p for r, p in zip(rows, padding, strict=True))
    put = (lambda r, fill: [fill] * (width - len(r)) + r) if side == "left" else (lambda r, fill: r + [fill] * (width - len(r)))
    ids = np.array([put(r, 0) for r in rows])
    return {"input_ids": ids, "attention_mask": np.array([put([1] * len(r), 0) for r in rows])}


def tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {k: torch.tensor(v) if v.dtype == np.float32 else torch.tensor(v).long() for k, v in batch.items()}


@partial(jax.jit, static_argnums=0)
def _forward(model: Any, params: Any, prepared: dict[str, jax.Array]) -> jax.Array:
    out: jax.Array = model.apply({"params": params}, **prepared)
    return out


def logits(model: Any, params: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(_forward(model, params, model.prepare(batch)))


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def assert_same_logits(hf: Any, model: Any, params: Any, batch: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        theirs = hf(**tensors(batch)).logits.numpy()
    mask = batch["attention_mask"].astype(bool)
    assert_close(logits(model, params, batch)[mask], theirs[mask], tolerance)


def assert_same_answers(hf: Any, model: Any, params: Any, batch: dict[str, np.ndarray], count: int = 32) -> None:
    theirs = hf.generate(**tensors(batch), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs = theirs.numpy()[:, batch["input_ids"].shape[1] :]
    assert theirs.shape[1] == count and len(np.unique(theirs)) > 3
    np.testing.assert_array_equal(np.stack(models.generate(model, params, batch, count)), theirs)
