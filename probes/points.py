"""The vocabulary: one table of readable points, and the address of a point at a layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from probes.errors import PointError, shown, unknown


@dataclass(frozen=True)
class Point:
    """A named tensor of a transformer that can be read."""

    name: str
    layered: bool
    """Whether it exists once per block (and so needs a layer)."""
    dims: tuple[str, ...]
    """Axes without the batch."""
    meaning: str


_PER_LAYER = (
    ("resid_pre", ("pos", "d_model"), "the residual stream entering the block"),
    ("resid_mid", ("pos", "d_model"), "the residual stream between attention and MLP"),
    ("resid_post", ("pos", "d_model"), "the residual stream leaving the block"),
    ("attn_out", ("pos", "d_model"), "what attention adds to the stream, after a sandwich norm where there is one"),
    ("mlp_out", ("pos", "d_model"), "what the MLP adds to the stream, after a sandwich norm where there is one"),
    ("attn_in", ("pos", "d_model"), "the input of the query, key and value projections, after the norm"),
    ("mlp_in", ("pos", "d_model"), "the input of the MLP, after the norm"),
    ("q", ("pos", "head", "d_head"), "queries as projected, before q/k norm and rotary embedding"),
    ("k", ("pos", "kv_head", "d_head"), "keys as projected, before q/k norm and rotary embedding"),
    ("v", ("pos", "kv_head", "d_head"), "values as projected"),
    ("z", ("pos", "head", "d_head"), "attention-weighted values of each head, before the output projection"),
    ("pattern", ("head", "query", "key"), "attention probabilities"),
    ("mlp_post", ("pos", "d_mlp"), "the MLP's hidden activations, the input of its output projection"),
    ("attn_scale", ("pos",), "the divisor of the norm before attention"),
    ("mlp_scale", ("pos",), "the divisor of the norm before the MLP"),
)
_GLOBAL = (
    ("embed", ("pos", "d_model"), "token embeddings, before position embeddings are added"),
    ("final_scale", ("pos",), "the divisor of the final norm"),
    ("final_norm", ("pos", "d_model"), "the residual stream after the final norm"),
    ("logits", ("pos", "d_vocab"), "the model's own next-token logits"),
)

_LAYER = r"\d{1,9}"

POINTS: dict[str, Point] = {
    **{name: Point(name, True, dims, meaning) for name, dims, meaning in _PER_LAYER},
    **{name: Point(name, False, dims, meaning) for name, dims, meaning in _GLOBAL},
}
"""Every readable point by name."""


@dataclass(frozen=True, order=True)
class Address:
    """A point at a layer; its one string form is `resid_post.3`, or `logits` for a point without layer.

    Raises:
        PointError: an unknown point, a missing or superfluous layer, or a negative one.
    """

    point: str
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise PointError(unknown("point", self.point, POINTS))
        if POINTS[self.point].layered and self.layer is None:
            raise PointError(f"point {self.point!r} needs a layer: write {self.point}.0 or {self.point}.*")
        if not POINTS[self.point].layered and self.layer is not None:
            raise PointError(f"point {self.point!r} has no layer: write {self.point}, not {self.point}.{self.layer}")
        if self.layer is not None and self.layer < 0:
            raise PointError(f"layer {self.layer} of {self.point!r} is negative; layers count from 0")

    def __str__(self) -> str:
        return self.point if self.layer is None else f"{self.point}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return the address whose string form is `text`."""
        point, dot, layer = text.partition(".")
        if dot and not re.fullmatch(_LAYER, layer):
            raise PointError(f"address {shown(text)}: the part after the dot must be a layer number")
        return cls(point, int(layer) if dot else None)

    @property
    def canonical(self) -> Address:
        """The address under which rows are stored: `resid_pre[l+1]` is `resid_post[l]`."""
        if self.point == "resid_pre" and self.layer:
            return Address("resid_post", self.layer - 1)
        return self


def expand(patterns: str | Iterable[str], n_layers: int) -> tuple[Address, ...]:
    """Return the addresses named by patterns such as `resid_post.*`, `z.0-3`, `logits`, comma-separated or listed.

    Raises:
        PointError: no text, an unknown point or a layer outside `0..n_layers-1`.
    """
    parts = patterns.split(",") if isinstance(patterns, str) else patterns
    if not isinstance(parts, Iterable) or not all(isinstance(part, str) for part in parts):
        raise PointError(f"points {shown(patterns)} are no text: give one such as 'resid_post.*', or several of them")
    addresses: dict[Address, None] = {}
    for part in (p.strip() for p in parts):
        point, _, layers = part.partition(".")
        span = re.fullmatch(f"({_LAYER})-({_LAYER})", layers)
        if layers == "*":
            named = [Address(point, layer) for layer in range(n_layers)]
        elif span:
            named = [Address(point, layer) for layer in range(int(span[1]), min(int(span[2]), n_layers) + 1)]
        else:
            named = [Address.parse(part)]
        if not named:
            raise PointError(f"points {shown(part)} name no layer: write the lower layer first")
        for address in named:
            if address.layer is not None and address.layer >= n_layers:
                raise PointError(
                    f"layer {address.layer} of {shown(part)} is outside this model: legal layers are 0 to {n_layers - 1}"
                )
            addresses[address] = None
    return tuple(addresses)


def every_address(n_layers: int) -> list[Address]:
    """Return every point of a model, at every layer where it has layers."""
    return [
        Address(name, layer)
        for name, point in POINTS.items()
        for layer in (range(n_layers) if point.layered else (None,))
    ]


def stage_of(address: Address, n_layers: int) -> int:
    """Return the block during whose call an address is read or written; `n_layers` for what follows the blocks."""
    if address.layer is not None:
        return address.layer
    return 0 if address.point == "embed" else n_layers
