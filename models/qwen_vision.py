"""The vision tower of the Qwen-VL families: patches of any grid, rotary positions, attention a frame or a window, patch mergers.

Pictures of many sizes become one array of static shape: a row a frame (an image is one), padded to the longest; where there are windows,
a frame's patches lie window after window, each padded to a full one, so that attention in windows is a reshape.

    frame of 2 x 3 features, windows of 2 x 2:   a b | c        a b d e | c . f . | . . . .
                                                 d e | f        window 0  window 1  padding to the longest frame
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.errors import InputError
from splitq_jax.models.layers import LARGEST_NUMBER, LayerNorm, Linear, RMSNorm, activation, attend, check_sizes
from splitq_jax.models.rope import Rope, rotate

EPS = 1e-6  # of all norms


@dataclass(frozen=True)
class QwenVisionConfig:
    """Sizes of the tower, from ``vision_config`` in ``config.json``.

    Attributes:
      merge_size: patches along a side that make one feature.
      out_size: width of a feature, the decoder's.
      gated: RMS norms and a gated MLP (Qwen2.5-VL) instead of layer norms and two layers.
      window_size: pixels along a window's side; None where all blocks attend to the whole frame.
      full_blocks: blocks that do so although there are windows.
      num_positions: of a learned table that is resampled to each grid (Qwen3-VL); None for no table and no bias of the patches.
      deepstack: blocks whose outputs are features too, each with a merger of its own.
    """

    num_channels: int
    temporal_patch_size: int
    patch_size: int
    merge_size: int
    hidden_size: int
    intermediate_size: int
    out_size: int
    num_layers: int
    num_heads: int
    hidden_act: str
    rope_theta: float
    gated: bool = False
    window_size: int | None = None
    full_blocks: tuple[int, ...] = ()
    num_positions: int | None = None
    deepstack: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = ("num_channels", "temporal_patch_size", "patch_size", "merge_size", "hidden_size", "intermediate_size", "out_size")
        check_sizes("vision_config", **{n: getattr(self, n) for n in (*names, "num_layers", "num_heads")})
        activation(self.hidden_act)
        if self.hidden_size % (4 * self.num_heads):
            raise InputError(
                f"config.json: vision width {self.hidden_size} with {self.num_heads} heads; rows and columns need a head size of a multiple of 4"
            )
        if type(self.rope_theta) not in {int, float} or not 0 < self.rope_theta < LARGEST_NUMBER:
            raise InputError(f"config.json: vision rope_theta {self.rope_theta!r}; expected a positive number")
        if self.window == 0:
            raise InputError(f"config.json: vision window_size {self.window_size} is smaller than a feature")
        if self.num_positions is not None:
            check_sizes("vision_config", num_position_embeddings=self.num_positions)
        blocks = set(self.deepstack)
        if len(blocks) != len(self.deepstack) or not blocks <= set(range(self.num_layers)):
            raise InputError(
                f"config.json: deepstack_visual_indexes {list(self.deepstack)}; expected distinct blocks of {self.num_layers}"
            )

    @classmethod
    def from_hf(cls, c: dict[str, Any], **sizes: Any) -> "QwenVisionConfig":
        """Read what all families spell alike; ``sizes`` are the rest.

        Raises:
          InputError: a rotary embedding or sizes that are not supported.
        """
        rope = c.get("rope_parameters") or {}
        if rope.get("rope_type") != "axial" or rope.keys() - {"rope_type", "rope_theta"} or c.get("head_dim") is not None:
            raise InputError(f"config.json: vision rope_parameters {rope}, head_dim {c.get('head_dim')}; expected axial, none")
        return cls(
            num_channels=c["in_channels"],
            temporal_patch_size=c["temporal_patch_size"],
            patch_size=c["patch_size"],
            merge_size=c["spatial_merge_size"],
            num_layers=c["depth"],
            num_heads=c["num_heads"],
            hidden_act=c["hidden_act"],
            rope_theta=rope["rope_theta"],
            **sizes,
        )

    @property
    def window(self) -> int | None:
        """Features along a window's side."""
        return None if self.window_size is None else max(self.window_size, 0) // self.merge_size // self.patch_size

    @property
    def patch_inputs(self) -> int:
        """Numbers of a patch."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def unit(self) -> int:
        """Patches of a feature."""
        return self.merge_size**2

    @property
    def mlp(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Inputs, and outputs of the layers that are fused, of the MLP's two sites."""
        width, inner = self.hidden_size, self.intermediate_size
        if self.gated:
            return {"gate_up": (width, (inner, inner)), "down": (inner, (width,))}
        return {"fc1": (width, (inner,)), "fc2": (inner, (width,))}


def arrange(c: QwenVisionConfig, pixels: Float[np.ndarray, "P D"], grids: Int[np.ndarray, "N 3"]) -> dict[str, np.ndarray]:
    """Lay patches out as the tower takes them.

    Args:
      c: the tower's config.
      pixels: patches in the order of the image processor: picture, frame, and in a frame feature after feature.
      grids: of each picture: frames, rows and columns of patches.

    Returns:
      ``patches`` (F, T, D), ``places`` (F, T, 2) row and column, ``real`` (F, T) what is no padding, with a table of positions
      ``taps`` and ``tap_weights`` (F, T, 4), and ``order``: where the feature of each unit of ``pixels`` is among all (F T / unit).
    """
    m, side = c.merge_size, c.window
    slots, places, extents, frames, longest, count = [], [], [], [], 0, 0
    inner, group = np.arange(c.unit), 1 if side is None else side**2
    for t, h, w in grids.tolist():
        row, column = np.divmod(np.arange(h // m * (w // m)), w // m)
        unit = np.arange(row.size)
        if side is not None:
            across = -(-(w // m) // side)  # windows
            unit = (row // side * across + column // side) * side**2 + row % side * side + column % side
        longest = max(longest, -(-(unit.max() + 1) // group))
        slots.append(np.tile((unit[:, None] * c.unit + inner).reshape(-1), t))
        place = np.stack([row[:, None] * m + inner // m, column[:, None] * m + inner % m], axis=-1).reshape(-1, 2)
        places.append(np.tile(place, (t, 1)))
        extents.append(np.tile([[h, w]], (t * h * w, 1)))
        frames.append(np.repeat(np.arange(count, count + t), h * w))
        count += t
    shape = roomy(count), roomy(int(longest)) * group * c.unit
    flat = np.concatenate(frames) * shape[1] + np.concatenate(slots)

    def spread(values: np.ndarray) -> np.ndarray:
        out = np.zeros((shape[0] * shape[1], *values.shape[1:]), values.dtype)
        out[flat] = values
        return out.reshape(*shape, *values.shape[1:])

    place = np.concatenate(places)
    out = {
        "patches": spread(np.asarray(pixels, np.float32)),
        "places": spread(place.astype(np.int32)),
        "real": spread(np.ones(flat.shape, bool)),
        "order": (flat[:: c.unit] // c.unit).astype(np.int32),
    }
    if c.num_positions is not None:
        taps, weights = _resample(place, np.concatenate(extents), int(c.num_positions**0.5))
        out |= {"taps": spread(taps), "tap_weights": spread(weights)}
    return out


def roomy(n: int) -> int:
    """Round a count up to four binary digits, so that pictures of many sizes share few shapes, each compiled once."""
    step = 1 << max(n.bit_length() - 4, 0)
    return -(-n // step) * step


def _resample(
    place: Int[np.ndarray, "P 2"], extent: Int[np.ndarray, "P 2"], side: int
) -> tuple[Int[np.ndarray, "P 4"], Float[np.ndarray, "P 4"]]:
    """Return the entries of a square table around each patch and their bilinear weights; the corners of grid and table coincide."""
    where = place.astype(np.float32) * np.float32(side - 1) / np.maximum(extent - 1, 1).astype(np.float32)
    low = np.floor(where)
    near = np.clip(low[..., None] + np.arange(2), 0, side - 1).astype(np.int32)  # P 2 2
    high = where - low
    weights = np.stack([1 - high, high], axis=-1)
    taps = near[:, 0, :, None] * side + near[:, 1, None, :]
    return taps.reshape(-1, 4), (weights[:, 0, :, None] * weights[:, 1, None, :]).reshape(-1, 4).astype(np.float32)


class QwenVisionBlock(nn.Module):
    """A pre-norm block with the sites ``qkv``, ``o`` and ``fc1``, ``fc2`` or ``gate_up``, ``down``."""

    config: QwenVisionConfig
    windowed: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "F T D"], angles: Float[Array, "F T d_2"], real: Bool[Array, "F T"]
    ) -> Float[Array, "F T D"]:
        """Map the patches of F frames."""
        c = self.config

        def site(name: str, h: Array, width: int) -> Array:
            # padding is zero, so that it counts for nothing where inputs are collected
            out: Array = Linear(width, use_bias=True, name=name)(jnp.where(real[..., None], h, 0))
            return out

        norm = RMSNorm if c.gated else LayerNorm
        qkv = site("qkv", norm(EPS, name="norm_attn")(x), 3 * c.hidden_size)
        q, k, v = (a.reshape(*a.shape[:2], c.num_heads, -1) for a in jnp.split(qkv, 3, axis=-1))
        q, k = rotate(q, angles), rotate(k, angles)
        span = c.window**2 * c.unit if self.windowed and c.window is not None else x.shape[1]
        q, k, v = (a.reshape(-1, span, *a.shape[2:]) for a in (q, k, v))
        h = attend(q, k, v, real.reshape(-1, 1, 1, span))
        x = x + site("o", h.reshape(x.shape), c.hidden_size)
        h = norm(EPS, name="norm_mlp")(x)
        first, last = c.mlp
        h = site(first, h, sum(c.mlp[first][1]))
        gate, *up = jnp.split(h, 2, axis=-1) if c.gated else [h]
        h = activation(c.hidden_act)(gate)
        return x + site(last, h * up[0] if up else h, c.hidden_size)


class QwenVisionTower(nn.Module):
    """Patch embedding and blocks."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "F T C"],
        places: Int[Array, "F T 2"],
        real: Bool[Array, "F T"],
        taps: Int[Array, "F T 4"] | None = None,
        tap_weights: Float[Array, "F T 4"] | None = None,
    ) -> list[Float[Array, "F T D"]]:
        """Return the hidden states after the last block, and after each deepstack block."""
        c = self.config
        kernel = self.param("patch", nn.initializers.normal(0.02), (c.patch_inputs, c.hidden_size))
        x = patches.astype(kernel.dtype) @ kernel
        if taps is not None and tap_weights is not None and c.num_positions is not None:
            x = x + self.param("patch_bias", nn.initializers.zeros, (c.hidden_size,)).astype(x.dtype).reshape(1, 1, -1)
            table = self.param("position", nn.initializers.normal(0.02), (c.num_positions, c.hidden_size))
            x = x + jnp.einsum("ftk,ftkd->ftd", tap_weights, table[taps].astype(jnp.float32)).astype(x.dtype)
        rope = Rope("default", (("rope_theta", c.rope_theta),))
        frequencies = jnp.asarray(rope.frequencies(c.hidden_size // c.num_heads // 2)).reshape(1, 1, 1, -1)
        angles = (places[..., None].astype(jnp.float32) * frequencies).reshape(*real.shape, -1)  # rows, then columns
        stack = []
        for i in range(c.num_layers):
            windowed = c.window is not None and i not in c.full_blocks
            x = QwenVisionBlock(c, windowed, name=f"blocks_{i}")(x, angles, real)
            if i in c.deepstack:
                stack.append(x)
        return [x, *stack]


class QwenMerger(nn.Module):
    """A norm and two layers that make one feature of each unit of patches; ``late`` takes the norm over the unit (deepstack)."""

    config: QwenVisionConfig
    late: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "F T V"]) -> Float[Array, "M D"]:
        """Return all features, frame after frame."""
        c = self.config
        width = c.unit * c.hidden_size
        norm = (RMSNorm if c.gated else LayerNorm)(EPS, name="norm")
        x = norm(x.reshape(-1, width)) if self.late else norm(x).reshape(-1, width)
        h = activation("gelu")(Linear(width, use_bias=True, name="fc1")(x))
        out: Float[Array, "M D"] = Linear(c.out_size, use_bias=True, name="fc2")(h)
        return out
