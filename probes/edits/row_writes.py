"""What edits do to the rows of a point: which rows are taken, and the arithmetic on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from probes.edits.positions import At, chosen
from probes.errors import OptionError
from probes.models.protocol import Write

NewRows = Callable[[Tensor, tuple[Tensor, ...], Tensor, Sequence[int]], Tensor]
"""Returns new rows as `PointEdit.new_rows` does."""


def row_write(positions: At, heads: tuple[int, ...] | None, new_rows: NewRows, lengths: Sequence[int] | None) -> Write:
    """Return the write that changes rows of prompts of these unpadded lengths; None means no padding."""

    def write(tensor: Tensor) -> Tensor:
        spans = lengths if lengths is not None else [tensor.shape[1]] * tensor.shape[0]
        places = [chosen(n, positions) for n in spans]
        rows = torch.cat([torch.full_like(at, row) for row, at in enumerate(places)])
        order = torch.cat([torch.arange(len(at)) for at in places]).to(tensor.device)
        index: tuple[Tensor, ...] = (rows.to(tensor.device), torch.cat(places).to(tensor.device))
        if heads is not None:
            index = (index[0][:, None], index[1][:, None], torch.tensor(heads, device=tensor.device)[None])
        out = tensor.clone()
        out[index] = new_rows(tensor, index, order, spans).to(tensor.dtype)
        return out

    return write


def prompt_means(tensor: Float[Tensor, "batch pos ..."], spans: Sequence[int]) -> Float[Tensor, "batch ..."]:
    """Return each prompt's mean over its positions, the first left out where there are more."""
    return torch.stack([tensor[row, min(1, n - 1) : n].mean(0) for row, n in enumerate(spans)])


def recombined(
    rows: Float[Tensor, "... width"],
    read: Float[Tensor, "m width"],
    write: Float[Tensor, "m width"],
    keep: float,
    offset: Sequence[float],
) -> Float[Tensor, "... width"]:
    """Return rows of which the coefficients c along `read` became keep * c + offset, by adding the difference times `write`."""
    x = rows.float()
    read, write = (matrix.to(x.device, torch.float32) for matrix in (read, write))
    change = (keep - 1) * (x @ read.T)
    if offset:
        change = change + torch.tensor(offset, device=x.device)
    return (x + change @ write).to(rows.dtype)


def independent(directions: Float[Tensor, "m width"]) -> Float[Tensor, "m width"]:
    """Return orthonormal rows that span the same.

    Raises:
        OptionError: directions that are not linearly independent.
    """
    basis, triangle = torch.linalg.qr(directions.detach().double().cpu().T)
    if (triangle.diagonal().abs() < 1e-9 * triangle.abs().max()).any():
        raise OptionError("the directions to project out are linearly dependent: give a basis of their span")
    return basis.T.float()
