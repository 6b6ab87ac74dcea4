"""The vocabulary of points and the one string form of an address."""

import pytest

from probes.errors import PointError
from probes.points import POINTS, Address, expand

N_LAYERS = 4
EVERY = [Address(name, layer) for name, p in POINTS.items() for layer in (range(N_LAYERS) if p.layered else (None,))]


@pytest.mark.parametrize("address", EVERY, ids=str)
def test_an_address_is_its_string(address: Address) -> None:
    assert Address.parse(str(address)) == address


def test_strings_of_different_addresses_differ() -> None:
    assert len({str(address) for address in EVERY}) == len(EVERY)


def test_the_stream_between_two_blocks_has_one_stored_address() -> None:
    assert Address("resid_pre", 3).canonical == Address("resid_post", 2)
    assert Address("resid_pre", 0).canonical == Address("resid_pre", 0)
    assert all(address.canonical.canonical == address.canonical for address in EVERY)
    assert all(address.canonical == address for address in EVERY if address.point != "resid_pre")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("logits", ["logits"]),
        ("resid_post.*", [f"resid_post.{layer}" for layer in range(N_LAYERS)]),
        ("z.1-2", ["z.1", "z.2"]),
        ("z.2, embed ,z.2", ["z.2", "embed"]),
        (["mlp_post.3", "mlp_post.0-1"], ["mlp_post.3", "mlp_post.0", "mlp_post.1"]),
    ],
)
def test_expand(patterns: str | list[str], expected: list[str]) -> None:
    assert [str(address) for address in expand(patterns, N_LAYERS)] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resid_pots.1", "Did you mean 'resid_post'"),
        ("", "unknown point"),
        ("resid_post", "needs a layer"),
        ("logits.2", "has no layer"),
        ("z.-1", "must be a layer number"),
        ("z.one", "must be a layer number"),
        ("z.", "must be a layer number"),
    ],
)
def test_a_bad_address_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(PointError, match=message):
        Address.parse(text)


def test_a_negative_layer_is_refused() -> None:
    with pytest.raises(PointError, match="negative"):
        Address("z", -1)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("z.4", "legal layers are 0 to 3"),
        ("z.2-9", "legal layers are 0 to 3"),
        ("z.3-1", "name no layer"),
        ("zz.*", "unknown point"),
        ("logits.*", "has no layer"),
        ("", "unknown point"),
    ],
)
def test_a_bad_pattern_is_refused_by_name(patterns: str, message: str) -> None:
    with pytest.raises(PointError, match=message):
        expand(patterns, N_LAYERS)
