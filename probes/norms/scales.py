"""The scales that stand in for a norm's own: given, measured, running, or one for each position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.errors import OptionError


@dataclass(frozen=True, eq=False)
class Rows:
    """Which positions of a batch are not ordinary text, each [batch, pos]."""

    first: Bool[Tensor, "batch pos"]
    """True at position 0."""
    end_of_text: Bool[Tensor, "batch pos"]
    """True where the token ends a text."""

    @classmethod
    def of(cls, tokens: Int[Tensor, "batch pos"], end_of_text: int | None = None) -> Rows:
        """Return the rows of token ids [batch, pos]."""
        first = torch.zeros_like(tokens, dtype=torch.bool)
        first[:, 0] = True
        ends = torch.zeros_like(first) if end_of_text is None else tokens == end_of_text
        return cls(first, ends)

    @property
    def ordinary(self) -> Bool[Tensor, "batch pos"]:
        """True where a position [batch, pos] is neither; all True where none would be."""
        plain = ~self.first & ~self.end_of_text
        return plain if bool(plain.any()) else torch.ones_like(plain)


@dataclass(frozen=True, eq=False)
class Scale:
    """A scale that stands in for a row's own.

    Raises:
        OptionError: a scale that is not a positive number.
    """

    value: float
    """Of ordinary positions."""
    first: float | None = None
    """Of position 0; None where it is an ordinary one."""
    ends_as_first: bool = False
    """Whether tokens that end a text take position 0's scale."""
    positions: Float[Tensor, pos] | None = None
    """[pos], a scale for each position in place of all these."""
    own: bool = False
    """Whether every row keeps its own scale, which changes nothing: the control."""

    def __post_init__(self) -> None:
        for value in (self.value, self.first, *([] if self.positions is None else self.positions.tolist())):
            if value is not None and not 0 < value < float("inf"):
                raise OptionError(f"a frozen scale of {value}: it must be a positive, finite number")

    @property
    def constant(self) -> bool:
        """Whether it is one number for every row, so that the norm is a linear map."""
        return self.first is None and self.positions is None and not self.own

    def at(self, rows: Rows, extra_dims: int = 0) -> Float[Tensor, "batch pos 1 *ones"]:
        """Return the scale of each row, [batch, pos, 1, ...] float32, with as many axes of one after pos as the norm's input has axes there."""
        first = rows.first
        if self.positions is not None:
            if len(self.positions) < first.shape[1]:
                raise OptionError(
                    f"scales for {len(self.positions)} positions, but a sequence has {first.shape[1]}: measure longer ones"
                )
            scales = self.positions.to(first.device).float()[: first.shape[1]].expand(first.shape)
        else:
            scales = torch.full(first.shape, self.value, device=first.device)
            if self.first is not None:
                like_first = first | rows.end_of_text if self.ends_as_first else first
                scales = torch.where(like_first, self.first, scales)
        return scales[(..., *[None] * (1 + extra_dims))]


class RunningScale:
    """Exponential moving averages of a norm's scale, of position 0 and of ordinary positions.

    s <- m s + (1 - m) mean(scale); the first value entered is taken whole.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.value: float | None = None
        self.first: float | None = None

    def enter(self, scale: Float[Tensor, "batch pos"], rows: Rows) -> None:
        """Take in the scales [batch, pos] of one forward pass."""
        self.value = self._moved(self.value, float(scale[rows.ordinary].mean()))
        self.first = self._moved(self.first, float(scale[rows.first].mean()))

    def _moved(self, old: float | None, new: float) -> float:
        return new if old is None else self.momentum * old + (1 - self.momentum) * new
