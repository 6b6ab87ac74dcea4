"""The same points read on several backends, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from probes.html_card import aligned
from probes.models.protocol import Model
from probes.models.verify.identities import probe_tokens
from probes.models.verify.recording import deviation, kept_copies
from probes.points import POINTS, Address, every_address

READ = "read"
REFUSED = "refused"


@dataclass(frozen=True)
class Parity:
    """One point on every backend."""

    point: str
    cells: Mapping[str, float | str]
    """By backend: the largest deviation from the first one, relative to its largest magnitude, over all layers;
    `read` where there is nothing to compare with; `refused`."""


def parity(models: Mapping[str, Model]) -> list[Parity]:
    """Compare every point on every backend, from one forward each over two short rows of tokens.

    Args:
        models: The same model by backend; the others are compared with the first.
    """
    shape = next(iter(models.values())).shape
    tokens = probe_tokens(shape.d_vocab, shape.n_ctx, None)
    by_backend = {backend: readings(model, tokens) for backend, model in models.items()}
    first = next(iter(by_backend.values()))
    return [
        Parity(point, {backend: _cell(point, seen, first) for backend, seen in by_backend.items()}) for point in POINTS
    ]


def readings(model: Model, tokens: Int[Tensor, "batch pos"]) -> dict[Address, Tensor]:
    """Return every point of `tokens` [batch, pos] that the model gives, on the CPU, from one forward."""
    seen: dict[Address, Tensor] = {}
    given = [address for address in every_address(model.shape.n_layers) if model.refusal(address) is None]
    model.run(tokens, kept_copies(given, seen))
    return seen


def table(rows: Sequence[Parity]) -> list[str]:
    """Return the rows as lines of text, one column a backend."""
    backends = list(rows[0].cells)
    return aligned(("point", *backends), [(row.point, *map(_shown, row.cells.values())) for row in rows])


def _cell(point: str, seen: Mapping[Address, Tensor], first: Mapping[Address, Tensor]) -> float | str:
    addresses = [address for address in seen if address.point == point]
    if not addresses:
        return REFUSED
    common = [address for address in addresses if address in first]
    if seen is first or not common:
        return READ
    return max(deviation(seen[address], first[address]) for address in common)


def _shown(cell: float | str) -> str:
    return cell if isinstance(cell, str) else f"{cell:.0e}"
