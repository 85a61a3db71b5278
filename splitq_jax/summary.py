"""What a quantized tree holds: bits, groups, ranks and bytes of every site."""

from dataclasses import dataclass

import jax

from splitq_jax.errors import InputError
from splitq_jax.linear import SplitWeight, stored_bits
from splitq_jax.quantization import Params, kernels
from splitq_jax.site import TrainableSplit


@dataclass(frozen=True)
class SiteSummary:
    """What a quantized site holds.

    Attributes:
      path: its place in the tree.
      shape: ``(D, N)``.
      bits: (weight, activation) of the main group.
      group_size: channels of the main group that share a weight's scale.
      groups: channels of the main, the text and the vision group.
      ranks: of CWS and MAC.
      stored_bytes: codes, scales, transforms, branches, permutation.
      effective_bits: the same in bits a weight.
    """

    path: str
    shape: tuple[int, int]
    bits: tuple[int, int]
    group_size: int
    groups: tuple[int, ...]
    ranks: tuple[int, int]
    stored_bytes: int
    effective_bits: float


def summarize(params: Params) -> list[SiteSummary]:
    """Describe every quantized site; ``effective_bits`` counts codes, scales, transforms, branches and the permutation per weight.

    Raises:
      InputError: a site that was prepared and not frozen.
    """
    rows = []
    for path, leaf in kernels(params).items():
        if isinstance(leaf, TrainableSplit):
            raise InputError(f"{path}: is prepared and not frozen; freeze the tree with the recipe that prepared it")
        if isinstance(leaf, SplitWeight):
            main, bits = leaf.groups[0], stored_bits(leaf)
            gates = (None, None) if leaf.branches is None else (leaf.branches.cws, leaf.branches.mac)
            ranks = tuple(0 if gate is None else gate.shape[0] for gate in gates)
            rows.append(
                SiteSummary(
                    path,
                    leaf.shape,
                    (main.w.bits, main.a_bits),
                    main.w.group,
                    tuple(g.w.rows for g in leaf.groups),
                    (ranks[0], ranks[1]),
                    bits // 8,
                    bits / (leaf.shape[0] * leaf.shape[1]),
                )
            )
    return rows


def effective_bits(params: Params) -> float:
    """Return the stored bits per weight over all quantized sites; NaN where there is none."""
    rows = summarize(params)
    weights = sum(r.shape[0] * r.shape[1] for r in rows)
    return 8 * sum(r.stored_bytes for r in rows) / weights if weights else float("nan")


def stored_bytes(params: Params) -> int:
    """Return the bytes of the whole tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
