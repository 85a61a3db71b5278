"""`Recipe`: every choice that quantization depends on, and the named recipes, SplitQ's and its baselines'."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal, get_args

from splitq_jax.acc import BRANCHES, Branch
from splitq_jax.errors import InputError
from splitq_jax.mocd import SELECTORS, Selector, SplitSize
from splitq_jax.numerics import ACTIVATION_BITS, FLOAT_BITS, WEIGHT_BITS, check_bits

TransformKind = Literal["kron", "none", "diag", "hadamard", "dense"]
MacTokens = Literal["text", "vision", "both"]
Rounding = Literal["nearest", "gptq"]


@dataclass(frozen=True)
class Recipe:
    """How sites are quantized. The defaults are SplitQ's (arXiv 2605.19929), the fields the axes that its ablation varies.

    Attributes:
      scheme: ``wXaY``: X-bit weights, Y-bit activations; 16 is not quantized.
      method: the recipe's name, in tables.
      select: how side channels are chosen.
      clusters: k of MOCD's k-means.
      split: size of the side groups.
      group_size: channels of the main group that share a weight's scale, in the decoder, for activations that stay floats (``w4a16`` with groups
        of 128); by default all do.
      side_bits: bits of side groups, branches and MAC's residual; by default ``max(4, bits)``; 0 for the main group's. 3-bit codes are stored in
        pieces of 32 rows, so narrow side groups are no smaller with 3 than with 4.
      transform: of every group: ``kron``, FlatQuant's Kronecker pair; ``diag``, SmoothQuant's scales; ``hadamard``, QuaRot's rotation;
        ``dense``, one full matrix; ``none``.
      smooth: exponents (weight, activation) of the start of ``d``.
      clip: whether clipping factors are learned (LWC and LAC).
      lwc_start: LWC's factors at the start; by default those that round a Gaussian of the group's width best, as LAC's. FlatQuant's is 0.982,
        which the few steps of a light training hardly move.
      cws: cross-modal weight smoothing, the branch that takes a low-rank part out of the weight.
      mac: modality-specific activation compensation, the branch that sends the activations' residual on.
      cws_rate: CWS's rank as a share of ``min(D_m, N)``; by default 2 %, at 2-bit activations 3 %.
      mac_rate: MAC's rank as a share of ``min(D_m, N)``; by default 3 %, at 2-bit activations 5 %.
      mac_tokens: the tokens that MAC serves.
      svd_per: one SVD a site or one a layer.
      cws_start: start of the diagonal of CWS's gate (``free``: the scale of V). 0 is a branch that is not there yet; at 1 its 4-bit factors
        lose more than it saves in the main weight.
      mac_start: start of MAC's gate, whose best is near 1: light training does not take it there from 0, where it would be MOCD + CWS.
      rounding: how weights are rounded: ``nearest``, or ``gptq``, which repairs each row's error in the rows after it, over all groups of a
        site, and what CWS's factors lose by their own rounding too (needs the statistics' Gram matrices).
      train: whether transforms, clips and gates are trained block by block.
      vision: the vision tower's scheme, or ``float``. It has one modality, so it gets neither split nor branches.
      sites: patterns of the layers of the decoder's blocks that are quantized; one that matches nothing is an error.
      seed: of random factors and random channels.

    Raises:
      InputError: for bits, names or rates outside what is supported.
    """

    scheme: str
    method: str = "splitq"
    select: Selector = "mocd"
    clusters: int = 3
    split: SplitSize = field(default_factory=SplitSize)
    group_size: int | None = None
    side_bits: int | None = None
    transform: TransformKind = "kron"
    smooth: tuple[float, float] = (0.7, 0.3)
    clip: bool = True
    lwc_start: float | None = None
    cws: Branch = "gated"
    mac: Branch = "gated"
    cws_rate: float | None = None
    mac_rate: float | None = None
    mac_tokens: MacTokens = "text"
    svd_per: Literal["site", "layer"] = "site"
    cws_start: float = 0.0
    mac_start: float = 1.0
    rounding: Rounding = "nearest"
    train: bool = True
    vision: str = "float"
    sites: tuple[str, ...] = ("decoder/blocks_*/*",)
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        for name, scheme in (("scheme", self.scheme), *([] if self.vision == "float" else [("vision", self.vision)])):
            w_bits, a_bits = parse_scheme(scheme)
            check_bits(w_bits, WEIGHT_BITS, f"{name} {scheme!r}, weights")
            check_bits(a_bits, ACTIVATION_BITS, f"{name} {scheme!r}, activations")
        if self.group_size is not None and (self.group_size < 1 or self.main_bits[1] < FLOAT_BITS):
            raise InputError(
                f"recipe: group_size={self.group_size} with {self.scheme}; expected at least 1, and activations that stay floats "
                "(w4a16): products of codes with codes have one scale a column"
            )
        if self.side_bits not in (None, 0):
            check_bits(self.side_bits, WEIGHT_BITS, "side_bits")
        for name, value, allowed in (
            ("select", self.select, SELECTORS),
            ("transform", self.transform, get_args(TransformKind)),
            ("cws", self.cws, BRANCHES),
            ("mac", self.mac, BRANCHES),
            ("mac_tokens", self.mac_tokens, get_args(MacTokens)),
            ("svd_per", self.svd_per, ("site", "layer")),
            ("rounding", self.rounding, get_args(Rounding)),
        ):
            if value not in allowed:
                raise InputError(f"recipe: {name}={value!r}; expected one of {', '.join(allowed)}")
        if self.rounding == "gptq" and (self.main_bits[0] < FLOAT_BITS) != (self.side[0] < FLOAT_BITS):
            raise InputError(
                f"recipe: gptq rounds all groups of a site or none; {self.scheme} with side_bits={self.side_bits} leaves some float"
            )
        if self.lwc_start is not None and not 0 < self.lwc_start < 1:
            raise InputError(f"recipe: lwc_start={self.lwc_start}; expected a factor in (0, 1)")
        if self.clusters < 1:
            raise InputError(f"recipe: clusters={self.clusters}; expected at least 1")
        for name, rate in (("cws_rate", self.cws_rate), ("mac_rate", self.mac_rate)):
            if rate is not None and not 0 < rate <= 1:
                raise InputError(f"recipe: {name}={rate}; expected a share in (0, 1]; switch a branch off with 'off'")

    def _check_types(self) -> None:
        # flags come with their types, Python's callers with any
        if isinstance(self.sites, str | list):
            object.__setattr__(self, "sites", (self.sites,) if isinstance(self.sites, str) else tuple(self.sites))
        numbers = {"cws_start": self.cws_start, "mac_start": self.mac_start}
        for i, power in enumerate(self.smooth if isinstance(self.smooth, tuple) else ()):
            numbers[f"smooth[{i}]"] = power
        wrong: list[tuple[str, object, str]] = []
        wrong += [(n, v, "a finite number") for n, v in numbers.items() if not (isinstance(v, Real) and math.isfinite(v))]
        for name, kind, wanted in (
            ("seed", Integral, "a whole number"),
            ("clusters", Integral, "a whole number"),
            ("clip", bool, "True or False"),
            ("train", bool, "True or False"),
            ("split", SplitSize, "a SplitSize"),
            ("smooth", tuple, "two exponents"),
            ("sites", tuple, "patterns"),
        ):
            if not isinstance(getattr(self, name), kind):
                wrong.append((name, getattr(self, name), wanted))
        if not self.sites or "" in self.sites:
            wrong.append(("sites", self.sites, "at least one pattern"))
        if wrong:
            name, value, wanted = wrong[0]
            raise InputError(f"recipe: {name}={value!r}; expected {wanted}")

    @property
    def main_bits(self) -> tuple[int, int]:
        """(weight, activation) bits of the main group."""
        return parse_scheme(self.scheme)

    @property
    def side(self) -> tuple[int, int]:
        """(weight, activation) bits of the side groups and of the branches."""
        w_bits, a_bits = self.main_bits
        if self.side_bits is None:
            return max(4, w_bits), max(4, a_bits)
        if self.side_bits == 0:
            return w_bits, a_bits
        # weight-only schemes keep float activations in the side groups, too
        return self.side_bits, FLOAT_BITS if a_bits >= FLOAT_BITS else self.side_bits

    @property
    def has_diagonal(self) -> bool:
        """Whether transforms scale channels, by what calibration saw of them; these are the ones that are learned."""
        return self.transform in {"kron", "diag", "dense"}

    @property
    def rates(self) -> tuple[float, float]:
        """Rank rates of (CWS, MAC)."""
        cws, mac = (0.03, 0.05) if self.main_bits[1] == 2 else (0.02, 0.03)
        return self.cws_rate or cws, self.mac_rate or mac

    def for_vision(self) -> "Recipe":
        """Return the recipe of the vision tower's sites."""
        off = {"group_size": None, "select": "none", "cws": "off", "mac": "off"}
        return self.replace(scheme=self.vision, sites=("vision/blocks_*/*",), **off)

    def replace(self, **changes: object) -> "Recipe":
        """Return a copy with fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def parse_scheme(scheme: str) -> tuple[int, int]:
    """Return (weight bits, activation bits) of ``wXaY``.

    Raises:
      InputError: for anything else.
    """
    match = re.fullmatch(r"w(\d{1,3})a(\d{1,3})", scheme.lower())
    if match is None:
        raise InputError(f"scheme {scheme!r}: expected wXaY, for example w4a4")
    return int(match[1]), int(match[2])


def rtn(scheme: str) -> Recipe:
    """Round to nearest: no transform, no split, nothing learned."""
    return Recipe(scheme, "rtn", select="none", transform="none", clip=False, cws="off", mac="off", train=False)


def gptq(scheme: str) -> Recipe:
    """GPTQ (arXiv 2210.17323) on the plain weight."""
    return rtn(scheme).replace(method="gptq", rounding="gptq")


def smoothquant(scheme: str) -> Recipe:
    """SmoothQuant (arXiv 2211.10438), alpha = 0.5."""
    return rtn(scheme).replace(method="smoothquant", transform="diag", smooth=(0.5, 0.5))


def quarot(scheme: str) -> Recipe:
    """QuaRot's online rotation at every site (arXiv 2404.00456): Hadamard factors, nothing learned."""
    return rtn(scheme).replace(method="quarot", transform="hadamard")


def flatquant(scheme: str) -> Recipe:
    """FlatQuant (arXiv 2410.09426): SplitQ without the split and without the branches."""
    return Recipe(scheme, "flatquant", select="none", cws="off", mac="off")


def random_channels(scheme: str) -> Recipe:
    """FlatQuant on three groups with randomly chosen side channels: the control for MOCD's choice."""
    return Recipe(scheme, "random-channels", select="random", cws="off", mac="off")


def mocd(scheme: str) -> Recipe:
    """SplitQ without ACC."""
    return Recipe(scheme, "mocd", cws="off", mac="off")


def mocd_cws(scheme: str) -> Recipe:
    """SplitQ without MAC."""
    return Recipe(scheme, "mocd-cws", mac="off")


def splitq(scheme: str) -> Recipe:
    """SplitQ: MOCD, CWS and MAC, gated."""
    return Recipe(scheme, "splitq")


def splitq_fixed(scheme: str) -> Recipe:
    """SplitQ with ``G = I`` in both branches."""
    return Recipe(scheme, "splitq-fixed", cws="fixed", mac="fixed")


METHODS = {
    f.__name__.replace("_", "-"): f
    for f in (rtn, gptq, smoothquant, quarot, flatquant, random_channels, mocd, mocd_cws, splitq, splitq_fixed)
}


def named(method: str, scheme: str) -> Recipe:
    """Return a recipe by its name on the command line.

    Raises:
      InputError: unknown method.
    """
    if method not in METHODS:
        raise InputError(f"--method {method!r}: expected one of {', '.join(METHODS)}")
    return METHODS[method](scheme)
