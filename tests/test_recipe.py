import pytest

from splitq_jax import recipes
from splitq_jax.errors import InputError
from splitq_jax.recipe import Recipe


@pytest.mark.parametrize(
    "changes",
    [
        *({"cws_start": float("nan")}, {"smooth": (float("nan"), 1.0)}, {"smooth": 0.5}, {"clip": "no"}, {"seed": 1.5}),
        *({"clusters": 2.5}, {"split": 0.02}, {"sites": ()}, {"sites": ""}),
    ],
    ids=str,
)
def test_fields_of_another_kind_are_refused(changes):
    (name,) = changes
    with pytest.raises(InputError, match=f"recipe: {name}"):
        recipes.splitq("w4a4").replace(**changes)
    assert recipes.splitq("w4a4").replace(sites="decoder/*").sites == recipes.splitq("w4a4").replace(sites=["decoder/*"]).sites


def test_gptq_rounds_all_of_a_site_or_nothing():
    """What it repairs in one group would otherwise be lost in silence."""
    for scheme, bits in (("w4a4", 16), ("w16a4", 4)):
        with pytest.raises(InputError, match=f"{scheme} with side_bits={bits} leaves some float"):
            recipes.splitq(scheme).replace(rounding="gptq", side_bits=bits)
    assert recipes.splitq("w16a4").replace(rounding="gptq").side == (16, 4)


def test_bits_and_ranks_follow_from_the_scheme():
    assert recipes.splitq("w4a2").rates == (0.03, 0.05) and recipes.splitq("w2a4").rates == (0.02, 0.03)
    assert recipes.splitq("w2a3").side == (4, 4) and recipes.splitq("w3a3").replace(side_bits=0).side == (3, 3)
    assert recipes.splitq("w4a4").replace(side_bits=8).side == (8, 8)
    assert recipes.splitq("w4a16").replace(side_bits=8).side == (8, 16)  # floats stay floats


def test_one_modality_has_neither_split_nor_branches():
    tower = recipes.splitq("w3a3").replace(vision="w4a8").for_vision()
    assert (tower.scheme, tower.select, tower.cws, tower.mac) == ("w4a8", "none", "off", "off")


@pytest.mark.parametrize("scheme", ["w0a4", "w17a4", "w4a17", "w4a1", "w4", "4x4", "w5a4"])
def test_unsupported_bits_are_refused(scheme):
    with pytest.raises(InputError, match="scheme"):
        Recipe(scheme)
