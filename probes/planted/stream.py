"""The coordinates of a residual stream, handed out by name."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

CONSTANT = "constant"
"""The feature that is 1 at every token and that nobody writes: thresholds are multiples of it."""
BALANCE = "balance"
"""The coordinate that holds minus the sum of all others, so that centring a stream changes nothing."""


class Stream:
    """A residual stream whose coordinates are given out in a random order; the first is the constant feature.

    Args:
        width: d_model.
        generator: draws the order.
        balanced: whether one coordinate is kept for the balance of LayerNorm hosts.
    """

    def __init__(self, width: int, generator: torch.Generator, *, balanced: bool = False) -> None:
        self.width = width
        self._order = torch.randperm(width, generator=generator).tolist()
        self._slots: dict[str, list[int]] = {}
        self.slot(CONSTANT)
        if balanced:
            self.slot(BALANCE)

    def slot(self, name: str, size: int = 1) -> list[int]:
        """Give out `size` coordinates under a name.

        Raises:
            ValueError: the name is taken, or fewer coordinates are left.
        """
        if name in self._slots or size > len(self._order):
            raise ValueError(f"slot {name!r} of {size}: taken, or only {len(self._order)} coordinates are left")
        self._slots[name], self._order = self._order[:size], self._order[size:]
        return self._slots[name]

    def rest(self, name: str) -> list[int]:
        """Give out under a name all coordinates that are left."""
        return self.slot(name, len(self._order))

    def join(self, name: str, *names: str) -> list[int]:
        """Give a name to slots side by side.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._slots:
            raise ValueError(f"slot {name!r} is taken")
        self._slots[name] = [coordinate for part in names for coordinate in self._slots[part]]
        return self._slots[name]

    @property
    def slots(self) -> dict[str, list[int]]:
        """Coordinates of every slot by name."""
        return {name: list(coordinates) for name, coordinates in self._slots.items()}

    def __getitem__(self, name: str) -> list[int]:
        return self._slots[name]

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def basis(self, name: str) -> Float[Tensor, "size d_model"]:
        """Return one unit vector for each coordinate of a slot."""
        coordinates = self._slots[name]
        vectors = torch.zeros(len(coordinates), self.width)
        vectors[range(len(coordinates)), coordinates] = 1.0
        return vectors

    def vector(self, name: str, index: int = 0, scale: float = 1.0) -> Float[Tensor, "d_model"]:
        """Return `scale` times the unit vector of one coordinate of a slot."""
        return scale * self.basis(name)[index]
