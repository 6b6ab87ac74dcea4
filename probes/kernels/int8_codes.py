"""Rows as int8 codes with a scale and an error of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from probes.reducers import TAIL

LEVELS = 127
"""int8 codes run from -LEVELS to LEVELS."""


@dataclass(frozen=True, eq=False)
class Codes:
    """Rows [n, width] as codes times scale, each value off by at most its row's error."""

    codes: Tensor
    """[n, width] int8."""
    scale: Tensor
    """[n] float32."""
    error: Tensor
    """[n] float32, the largest |row - codes * scale|."""

    @property
    def rows(self) -> Tensor:
        """Return the rows that the codes stand for, [n, width] float32."""
        return self.codes.float() * self.scale[:, None]

    @property
    def packed(self) -> Tensor:
        """Return codes, scale and error side by side, [n, width + 8] int8, as the reducer `int8` keeps them."""
        return torch.cat([self.codes, torch.stack([self.scale, self.error], -1).view(torch.int8)], -1)


def encoded(rows: Float[Tensor, "row width"]) -> Codes:
    """Return float32 rows rounded to the nearest code of their own scale."""
    scale = rows.abs().amax(-1) / LEVELS
    divisor = scale.where(scale > 0, 1)[:, None]
    codes = (rows / divisor + 0.5).floor().clamp(-LEVELS, LEVELS)
    return Codes(codes.to(torch.int8), scale, (rows - codes * scale[:, None]).abs().amax(-1))


def unpacked(packed: Int8[Tensor, "row packed"]) -> Codes:
    """Return the codes that the reducer `int8` packed, width + 8 a row."""
    scale, error = packed[:, -TAIL:].contiguous().view(torch.float32).unbind(-1)
    return Codes(packed[:, :-TAIL], scale, error)
