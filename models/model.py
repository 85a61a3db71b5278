"""What all families share: the vision-language model around a decoder, and the checks of its input."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.errors import InputError
from splitq_jax.models.decoder import Block, Context, DecoderConfig, causal_mask
from splitq_jax.models.names import Source, Spelling

Params = dict[str, Any]


@struct.dataclass
class Hidden:
    """Embedded tokens at the door of the decoder."""

    x: Float[Array, "B L D"]
    context: Context


class FamilyConfig:
    """What every family's frozen config has: ``text``, ``image_token_id`` and what follows from them."""

    text: DecoderConfig
    image_token_id: int

    @property
    def num_layers(self) -> int:
        """Decoder blocks."""
        return self.text.num_layers

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Tokens that features of images (and videos) replace."""
        return (self.image_token_id,)


class VisionLanguageModel(nn.Module):
    """A vision tower whose features take the places of placeholders among the tokens of a decoder.

    Apply it to a float or a quantized parameter tree. A family gives: ``setup`` (with ``self.decoder``), `from_hf`, `table`, `features`,
    `example` and, where its pictures have no fixed size, `prepare`.

    Attributes:
      config: the family's; it has ``text`` (a `DecoderConfig`), ``placeholders`` (token ids) and ``tied``.
      spelling: how tensors are named in the family's files.
    """

    config: Any
    spelling: ClassVar[Spelling] = Spelling()

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "VisionLanguageModel":
        """Return the model of a ``config.json``.

        Raises:
          InputError: parts that are not supported.
        """
        raise NotImplementedError

    @nn.nowrap
    def table(self) -> dict[str, Source]:
        """Return the source of every leaf, by its path."""
        raise NotImplementedError

    @nn.nowrap
    def is_unused(self, name: str) -> bool:
        """Say whether a tensor, canonically named, lies in the files and is read by nothing."""
        return re.fullmatch(self.spelling.unused, name) is not None

    @nn.nowrap
    def unread(self) -> dict[str, Float[np.ndarray, "..."]]:
        """Return the tensors that transformers has and the model never reads, for an export.

        Raises:
          InputError: they are lost.
        """
        return {}

    @nn.nowrap
    def block(self, i: int = 0) -> Block:
        """Return decoder block ``i``'s module, to be applied to that block's parameters."""
        return Block(self.config.text, self.config.text.layer_kinds[i], parent=None)

    @nn.nowrap
    def prepare(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Check a batch of host arrays, as the processor gives it, and return what the traced model takes.

        Raises:
          InputError: what `check` refuses.
        """
        self.check(batch)
        return {name: np.asarray(value) for name, value in batch.items() if value is not None}

    @nn.nowrap
    def check_length(self, length: int) -> None:
        """Check the length of the rows, new tokens included.

        Raises:
          InputError: longer than the rotary embedding goes.
        """
        longest = self.config.text.longest
        if longest is not None and length > longest:
            raise InputError(f"{length} tokens: the dynamic rotary embedding is supported up to max_position_embeddings, {longest}")

    @nn.nowrap
    def check(self, batch: Mapping[str, Any]) -> None:
        """Check tokens and masks before they are traced; families check their pictures.

        Raises:
          InputError: arrays of another type or shape; token ids outside the vocabulary; rows that are too long.
        """
        ids = np.asarray(batch.get("input_ids", ()))
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"input_ids: {ids.dtype}{list(ids.shape)}; expected integers (samples, length)")
        self.check_length(ids.shape[1])
        for name in ("attention_mask", "positions", "segments"):
            shape = np.shape(batch[name])[:2] if batch.get(name) is not None else ids.shape
            if shape != ids.shape:
                raise InputError(f"{name}: shape {np.shape(batch[name])}; expected that of input_ids, {ids.shape}")
        outside = ids[~np.isin(ids, self.config.placeholders) & ((ids < 0) | (ids >= self.config.text.vocab_size))]
        if outside.size:
            raise InputError(f"input_ids: token id {outside[0]}; the vocabulary has {self.config.text.vocab_size}")

    def features(self, *args: Any, **vision: Any) -> list[Float[Array, "M D"]]:
        """Return the projected image tokens, one row a placeholder in the order of the placeholders.

        The rows after the first list are added to the tokens after the first blocks (``deepstack``).
        """
        raise NotImplementedError

    def mask(
        self, is_image: Bool[Array, "B L"], valid: Bool[Array, "B L"], segments: Int[Array, "B L"] | None
    ) -> Bool[Array, "B K L L"]:
        """Return which keys a query may see."""
        return causal_mask(valid, segments, self.config.text.window)

    def embed(
        self,
        input_ids: Int[Array, "B L"],
        attention_mask: Bool[Array, "B L"] | None = None,
        positions: Int[Array, "B L *A"] | None = None,
        segments: Int[Array, "B L"] | None = None,
        **vision: Array | None,
    ) -> Hidden:
        """Embed tokens and put the image features, in order, where the placeholders are.

        Args:
          input_ids: tokens, a placeholder for each image feature.
          attention_mask: False for padding; None for no padding.
          positions: of the rotary embedding; None: counted over the tokens that are not padding.
          segments: 0 for a shared prefix, s >= 1 for independent continuations of it.
          vision: what `features` takes; None, or no rows, where there is no image.
        """
        ids = jnp.asarray(input_ids)
        is_image = jnp.isin(ids, jnp.asarray(self.config.placeholders, ids.dtype))
        valid = jnp.ones(ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
        x = self.decoder.embed_tokens(jnp.where(is_image, 0, ids))
        deepstack = None
        given = {name: jnp.asarray(value) for name, value in vision.items() if value is not None}
        if given and all(value.size for value in given.values()):
            first, *later = (_place(rows.astype(x.dtype), is_image) for rows in self.features(**given))
            x = jnp.where(is_image[..., None], first, x)
            if later:
                deepstack = jnp.where(is_image[..., None, None], jnp.stack(later, axis=2), 0)
        mask = self.mask(is_image, valid, None if segments is None else jnp.asarray(segments))
        if positions is None:  # the number of tokens before it that a token may see
            seen = jnp.cumsum(valid, axis=1) if segments is None else jnp.sum(causal_mask(valid, segments)[:, 0], axis=-1)
            positions = jnp.maximum(seen.astype(jnp.int32) - 1, 0)
        positions = jnp.asarray(positions)
        axes = self.config.text.ropes[0].axes
        if positions.ndim == 2:
            positions = jnp.broadcast_to(positions[..., None], (*positions.shape, axes))
        return Hidden(x, Context(positions, mask, valid & ~is_image, valid, deepstack))

    def embed_text(self, input_ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Embed tokens of the vocabulary; a placeholder that the model wrote itself is no image."""
        x: Float[Array, "B L D"] = self.decoder.embed_tokens(jnp.asarray(input_ids))
        return x

    def unembed(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Return the logits of hidden states after the last block."""
        logits: Float[Array, "*B V"] = self.decoder.unembed(x)
        return logits

    def __call__(self, input_ids: Int[Array, "B L"], **batch: Array | None) -> Float[Array, "B L V"]:
        """Return logits; see `embed` for the arguments."""
        hidden = self.embed(input_ids, **batch)
        logits: Float[Array, "B L V"] = self.decoder(hidden.x, hidden.context)
        return logits


class FixedImages(VisionLanguageModel):
    """A family whose images all have the size of the tower and take ``config.tokens_per_image`` placeholders ``image_token_id``."""

    @nn.nowrap
    def check(self, batch: Mapping[str, Any]) -> None:
        """Check a batch of host arrays before it is traced.

        Raises:
          InputError: what `VisionLanguageModel.check` refuses; pixel values that are not finite or of another size; another number of
            image placeholders than of image features; an image whose placeholders are not all in one sample.
        """
        super().check(batch)
        c, pixels = self.config, batch.get("pixel_values")
        if pixels is not None:
            check_pixels(pixels, ("images", c.vision.num_channels, c.vision.image_size, c.vision.image_size), "pixel_values")
        count = 0 if pixels is None else len(pixels)
        placed = (np.asarray(batch["input_ids"]) == c.image_token_id).sum(axis=1)
        if placed.sum() != count * c.tokens_per_image or (placed % c.tokens_per_image).any():
            found = ", ".join(map(str, placed[:8]))
            raise InputError(
                f"input_ids: {found} image placeholders a sample with {count} images in all; an image takes {c.tokens_per_image}"
            )


def _place(rows: Float[Array, "M D"], is_image: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
    """Spread rows over the placeholders, in order."""
    slot = jnp.cumsum(is_image.reshape(-1).astype(jnp.int32)) - 1
    return rows[jnp.clip(slot, 0, rows.shape[0] - 1)].reshape(*is_image.shape, -1)


def check_pixels(pixels: Any, shape: tuple[int | str, ...], what: str) -> None:
    """Check pixel values.

    Raises:
      InputError: another shape than ``shape``, where a word stands for any size; no floats; entries that are not finite.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim != len(shape) or any(isinstance(s, int) and s != n for n, s in zip(pixels.shape, shape, strict=True)):
        raise InputError(f"{what}: shape {pixels.shape}; expected ({', '.join(map(str, shape))})")
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise InputError(f"{what}: {pixels.dtype}; expected the floats that the image processor makes")
    if not np.isfinite(pixels).all():
        raise InputError(f"{what}: not finite; check the images")
