"""Rows of several questions behind one image: where they are split, and what a window sees in them."""

import jax.numpy as jnp
import numpy as np
import pytest

from splitq_jax.errors import InputError
from splitq_jax.eval.easy_vqa import Example, Prompt, pack, split
from splitq_jax.models.decoder import causal_mask


def test_a_prompt_is_split_behind_its_last_placeholder() -> None:
    asked, told = [5, 9, 9, 6, 9, 7, 8], [5, 9, 9, 6, 9, 7, 8, 1, 2, 3, 4]
    assert split(asked, told, [9], [3, 2]) == Prompt((5, 9, 9, 6, 9), (7, 8), (1, 2))
    for given, message in (
        ((asked, told, [10], [3]), "0 image placeholders"),
        ((asked, [5, 9, *told], [9], [3]), "does not begin with"),
        ((asked, told, [9], [5]), "does not end with"),
    ):
        with pytest.raises(InputError, match=message):
            split(*given)


def test_images_of_several_lengths_share_a_batch() -> None:
    """Images 0 and 1 take 2 and 4 tokens; the spare row repeats the first, with its image."""
    data = [Example(i, i % 2, i % 2, "", "") for i in range(4)]
    shown: list[list[int]] = []

    def vision(images: list[int]) -> dict[str, np.ndarray]:
        shown.append(images)
        return {"tiles": np.array(images)}

    (batch,) = pack(data, lambda e: Prompt((9,) * (2 + 2 * e.image), (5,), (e.number, 3)), vision, batch_size=3, lengths=(11,))
    assert shown == [[0, 1, 0]] and batch["tiles"].tolist() == [0, 1, 0]
    assert batch["input_ids"].tolist() == [
        [9, 9, 5, 0, 3, 5, 2, 3, 0, 0, 0],
        [9, 9, 9, 9, 5, 1, 3, 5, 3, 3, 0],
        [9, 9, 5, 0, 3, 5, 2, 3, 0, 0, 0],
    ]
    assert batch["segments"][1].tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0]
    assert batch["positions"][1].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 0]
    assert batch["attention_mask"].sum(axis=1).tolist() == [8, 10, 8]
    assert (batch["targets"][2] == -1).all() and (batch["targets"][1] >= 0).sum() == 4


def test_a_window_counts_from_the_prefix_on() -> None:
    """The second continuation lies behind the first and sees what it would see without it."""
    segments = jnp.array([[0, 0, 0, 1, 1, 2, 2]])
    packed = np.asarray(causal_mask(jnp.ones((1, 7), bool), segments, window=3))[0]
    alone = np.asarray(causal_mask(jnp.ones((1, 5), bool), None, window=3))[0]
    for places in ([0, 1, 2, 3, 4], [0, 1, 2, 5, 6]):
        np.testing.assert_array_equal(packed[:, places][:, :, places], alone)
    assert not packed[:, 5:, 3:5].any() and alone[1].astype(int).tolist()[3:] == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
