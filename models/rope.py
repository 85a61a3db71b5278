"""Rotary position embedding (arXiv 2104.09864): what ``rope_parameters`` in ``config.json`` says, and the rotation."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from splitq_jax.errors import InputError
from splitq_jax.models.layers import LARGEST_NUMBER

# the numbers that each type of rotary embedding needs besides rope_theta
NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),  # its factor acts on sequences past max_position_embeddings, which `VisionLanguageModel.check` refuses
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# not read: they only say how long a sequence the model was trained for
IGNORED = {"rope_type", "mrope_section", "mrope_interleaved", "partial_rotary_factor"}


@dataclass(frozen=True)
class Rope:
    """One rotary embedding.

    Attributes:
      kind: ``default``, ``linear``, ``dynamic`` or ``llama3``.
      numbers: its numbers by name, sorted, ``rope_theta`` among them.
      sections: pairs of a head that turn with the temporal, vertical and horizontal position (M-RoPE, arXiv 2409.12191); None where
        a token has one position.
      interleaved: M-RoPE's axes take turns from pair to pair (Qwen3-VL) instead of lying side by side.
    """

    kind: str
    numbers: tuple[tuple[str, float], ...]
    sections: tuple[int, ...] | None = None
    interleaved: bool = False

    @classmethod
    def from_hf(cls, parameters: dict[str, Any], default_theta: float = 10000.0, interleaved: bool = False) -> "Rope":
        """Read ``rope_parameters`` or, in older files, ``rope_scaling``.

        Raises:
          InputError: a type that is not supported; a number that is missing, left over or not positive.
        """
        rope = dict(parameters)
        rope.setdefault("rope_theta", default_theta)
        kind = rope.pop("type", None) or rope.get("rope_type", "default")
        sections = rope.get("mrope_section")
        kind = "default" if kind == "mrope" else kind
        if kind not in list(NUMBERS):
            raise InputError(f"config.json: rope_type {kind!r}; supported are {', '.join(NUMBERS)}")
        if sections is not None and not (
            isinstance(sections, list | tuple) and len(sections) == 3 and all(type(n) is int and n >= 0 for n in sections)
        ):
            raise InputError(f"config.json: mrope_section {sections!r}; expected three counts")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise InputError(
                f"config.json: partial_rotary_factor {rope['partial_rotary_factor']!r}; only whole heads are supported"
            )
        wanted = ("rope_theta", *NUMBERS[kind])
        if rope.keys() - IGNORED != set(wanted) or not all(
            type(rope[n]) in {int, float} and 0 < rope[n] < LARGEST_NUMBER for n in wanted
        ):
            raise InputError(f"config.json: rope_parameters {rope}; a {kind} one has positive numbers {', '.join(wanted)}")
        return cls(
            kind,
            tuple(sorted((n, rope[n]) for n in wanted)),
            None if sections is None else tuple(sections),
            interleaved,
        )

    @property
    def axes(self) -> int:
        """Positions of a token."""
        return 1 if self.sections is None else len(self.sections)

    def frequencies(self, head_dim: int) -> Float[np.ndarray, " d_2"]:
        """Return radians a position, scaled as the type says."""
        n = dict(self.numbers)
        inverse = 1.0 / n["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            inverse = inverse / n["factor"]
        if self.kind == "llama3":
            low, high = n["low_freq_factor"], n["high_freq_factor"]
            turns = n["original_max_position_embeddings"] * inverse / (2 * math.pi)
            smooth = np.clip((turns - low) / (high - low), 0, 1)
            inverse = (1 - smooth) * inverse / n["factor"] + smooth * inverse
        return np.asarray(inverse, np.float32)

    def axis_of_pair(self, head_dim: int) -> Int[np.ndarray, " d_2"]:
        """Return which of a token's positions turns each pair of a head.

        Raises:
          InputError: sections that do not add up to half a head.
        """
        axis = np.zeros(head_dim // 2, np.int32)
        if self.sections is None:
            return axis
        if self.interleaved:
            for i in (1, 2):  # t h w t h w ... t t
                axis[i : 3 * self.sections[i] : 3] = i
            return axis
        if sum(self.sections) != head_dim // 2:
            raise InputError(f"config.json: mrope_section {list(self.sections)} does not add up to {head_dim // 2}, half a head")
        return np.repeat(np.arange(3, dtype=np.int32), self.sections)

    def angles(self, positions: Int[Array, "B L A"], head_dim: int) -> Float[Array, "B L d_2"]:
        """Return the angle of every pair at every token."""
        where = jnp.asarray(self.axis_of_pair(head_dim))
        turns = positions.astype(jnp.float32)[..., where]  # B L d/2
        return turns * jnp.asarray(self.frequencies(head_dim)).reshape(1, 1, -1)


def rotate(x: Float[Array, "B L H d"], angles: Float[Array, "B L d_2"]) -> Float[Array, "B L H d"]:
    """Turn each pair, the two halves of a head being the two coordinates (Llama's layout)."""
    cos, sin = (f(angles)[:, :, None, :] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
