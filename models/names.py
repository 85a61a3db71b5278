"""Where a parameter tree's leaves come from: tables of Hugging Face's tensor names, and what all families' tables share.

A leaf is one tensor or several fused: q, k, v side by side, gate beside up. Hugging Face's linear layers are (out, in), ours are
(in, out); a patch convolution (D, C, p, p) or (D, C, t, p, p) is a matrix (C t p p, D).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import numpy as np
from jaxtyping import Float

from splitq_jax.models.decoder import DecoderConfig
from splitq_jax.models.vision import VisionConfig

Kind = Literal["linear", "plain"]


@dataclass(frozen=True)
class Source:
    """Where a leaf comes from.

    Attributes:
      names: tensors, fused along the outputs.
      shapes: of each, as they lie in the files.
      kind: ``linear`` is flattened to (out, in) and transposed, ``plain`` is taken as it is.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: Kind

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's."""
        first = self.shapes[0]
        if not first:
            return ()
        rows = sum(shape[0] for shape in self.shapes)
        return (rows, *first[1:]) if self.kind == "plain" else (prod(first[1:]), rows)

    def put(self, leaf: Float[np.ndarray, "..."], tensor: int, start: int, rows: Float[np.ndarray, "..."]) -> None:
        """Write rows of one of the tensors, from row ``start`` on, where they belong in the leaf."""
        at = start + sum(shape[0] for shape in self.shapes[:tensor])
        if self.kind == "plain":
            np.atleast_1d(leaf)[at : at + len(rows)] = rows
        else:
            leaf[:, at : at + len(rows)] = rows.reshape(len(rows), -1).T

    def part(self, leaf: Float[np.ndarray, "..."]) -> dict[str, Float[np.ndarray, "..."]]:
        """Undo `put`: the tensors by name."""
        ends = np.cumsum([shape[0] for shape in self.shapes])[:-1]
        whole = leaf.T if self.kind == "linear" else leaf
        parts = [whole] if len(self.names) == 1 else np.split(whole, ends)
        return {n: p.reshape(s) for n, s, p in zip(self.names, self.shapes, parts, strict=True)}


@dataclass(frozen=True)
class Spelling:
    """How a family's tensors are named in files.

    Attributes:
      rules: patterns and replacements, applied in order: every spelling that is met becomes the table's, which is the one that
        transformers writes.
      unused: tensors that lie in the files and are read by nothing.
      head: the language model's head, which repeats the embedding where they are tied.
      embedding: the embedding's name.
    """

    rules: tuple[tuple[str, str], ...] = ()
    unused: str = r".*\.rotary_emb\.inv_freq"
    head: str = "lm_head.weight"
    embedding: str = "model.language_model.embed_tokens.weight"

    def canonical(self, name: str) -> str:
        """Return a tensor's name in the table's spelling."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name


@dataclass
class Table:
    """Collects a family's sources.

    Attributes:
      sources: by the leaf's path.
    """

    sources: dict[str, Source] = field(default_factory=dict)

    def plain(self, path: str, name: str, shape: tuple[int, ...]) -> None:
        """Take a tensor as it is."""
        self.sources[path] = Source((name,), (shape,), "plain")

    def linear(self, path: str, names: Sequence[str], inputs: int, outputs: Sequence[int], bias: bool = False) -> None:
        """Fuse linear layers that read the same input."""
        weights = tuple(f"{n}.weight" for n in names)
        self.sources[f"{path}/kernel"] = Source(weights, tuple((o, inputs) for o in outputs), "linear")
        if bias:
            self.sources[f"{path}/bias"] = Source(tuple(f"{n}.bias" for n in names), tuple((o,) for o in outputs), "plain")

    def norm(self, path: str, name: str, width: int, bias: bool = False) -> None:
        """Take a norm."""
        self.plain(f"{path}/scale", f"{name}.weight", (width,))
        if bias:
            self.plain(f"{path}/bias", f"{name}.bias", (width,))

    def patch(self, path: str, name: str, shape: tuple[int, ...]) -> None:
        """Flatten a patch convolution (D, C, *p) to (C prod(p), D)."""
        self.sources[path] = Source((name,), (shape,), "linear")

    def decoder(self, c: DecoderConfig, tied: bool, prefix: str = "model.language_model", head: str = "lm_head") -> None:
        """Take a decoder of the Llama, Qwen or Gemma families."""
        width, columns = c.hidden_size, c.layer_columns
        self.plain("decoder/embed/embedding", f"{prefix}.embed_tokens.weight", (c.vocab_size, width))
        for i in range(c.num_layers):
            to, source = f"decoder/blocks_{i}", f"{prefix}.layers.{i}"
            self.norm(f"{to}/norm_attn", f"{source}.input_layernorm", width)
            qkv = [f"{source}.self_attn.{n}_proj" for n in "qkv"]
            self.linear(f"{to}/qkv", qkv, width, columns["qkv"], c.attention_bias)
            if c.qk_norm:
                for n in "qk":
                    self.norm(f"{to}/norm_{n}", f"{source}.self_attn.{n}_norm", c.head_dim)
            self.linear(f"{to}/o", [f"{source}.self_attn.o_proj"], columns["qkv"][0], columns["o"], c.output_bias)
            if c.gemma:
                self.norm(f"{to}/norm_attn_out", f"{source}.post_attention_layernorm", width)
                self.norm(f"{to}/norm_mlp", f"{source}.pre_feedforward_layernorm", width)
                self.norm(f"{to}/norm_mlp_out", f"{source}.post_feedforward_layernorm", width)
            else:
                self.norm(f"{to}/norm_mlp", f"{source}.post_attention_layernorm", width)
            gate_up = [f"{source}.mlp.{n}_proj" for n in ("gate", "up")]
            self.linear(f"{to}/gate_up", gate_up, width, columns["gate_up"], c.mlp_bias)
            self.linear(f"{to}/down", [f"{source}.mlp.down_proj"], c.intermediate_size, columns["down"], c.mlp_bias)
        self.norm("decoder/norm", f"{prefix}.norm", width)
        if not tied:
            self.linear("decoder/head", [head], width, [c.vocab_size])

    def tower(self, c: VisionConfig, depth: int, prefix: str, path: str = "vision", last_norm: bool = False) -> None:
        """Take a CLIP or SigLIP tower's first ``depth`` blocks."""
        width, p = c.hidden_size, c.patch_size
        embeddings = f"{prefix}.embeddings"
        self.patch(f"{path}/patch", f"{embeddings}.patch_embedding.weight", (width, c.num_channels, p, p))
        self.plain(f"{path}/position", f"{embeddings}.position_embedding.weight", (c.num_tokens, width))
        if c.is_clip:
            self.plain(f"{path}/class", f"{embeddings}.class_embedding", (width,))
            self.norm(f"{path}/norm_pre", f"{prefix}.pre_layrnorm", width, True)  # Hugging Face's spelling
        else:
            self.plain(f"{path}/patch_bias", f"{embeddings}.patch_embedding.bias", (width,))
        for i in range(depth):
            to, source = f"{path}/blocks_{i}", f"{prefix}.encoder.layers.{i}"
            self.norm(f"{to}/norm_attn", f"{source}.layer_norm1", width, True)
            self.linear(f"{to}/qkv", [f"{source}.self_attn.{n}_proj" for n in "qkv"], width, (width,) * 3, True)
            self.linear(f"{to}/o", [f"{source}.self_attn.out_proj"], width, [width], True)
            self.norm(f"{to}/norm_mlp", f"{source}.layer_norm2", width, True)
            self.linear(f"{to}/fc1", [f"{source}.mlp.fc1"], width, [c.intermediate_size], True)
            self.linear(f"{to}/fc2", [f"{source}.mlp.fc2"], c.intermediate_size, [width], True)
        if last_norm:
            self.norm(f"{path}/norm_post", f"{prefix}.post_layernorm", width, True)


def parameters(sources: dict[str, Source]) -> int:
    """Count a table's parameters."""
    return sum(prod(shape) for source in sources.values() for shape in source.shapes)
