"""Circuits of heads and MLPs: every node outside one writes what the baseline does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.causal_patching.ablation import Ablated
from probes.models.protocol import Write
from probes.points import Address

ROWS = 32
"""Circuits that run together, which bounds memory."""


@dataclass(frozen=True, eq=False)
class NodeCircuits:
    """A clean run in which nodes can be set to what they write in the baseline."""

    run: Ablated

    @torch.no_grad()
    def last_rows(self, keep: Bool[Tensor, "row layer unit"]) -> Float[Tensor, "row d_model"]:
        """Return what leaves the last block at the last position with every node outside each row's circuit ablated.

        Rows that ablate nothing before a block start there.

        Args:
            keep: heads, and last the MLP, of every layer.
        """
        n_layers = keep.shape[1]
        # The first layer that ablates something; 0 where argmax finds none, which is right but not fast.
        first = (~keep.all(-1)).int().argmax(1)
        last = self.run.base.entering[-1][-1].expand(len(keep), -1).clone()
        for rows in torch.split(first.argsort(stable=True), ROWS):
            begin = int(first[rows].min())
            writes: dict[Address, Write] = {}
            for layer in range(begin, n_layers):
                for address, kept in (
                    (Address("z", layer), keep[rows, layer, :-1]), (Address("mlp_out", layer), keep[rows, layer, -1]),
                ):  # fmt: skip
                    if not kept.all():
                        writes[address] = self._write(address, kept)
            last[rows] = self.run.base.edited(begin, len(rows), writes)
        return last

    def _write(self, address: Address, keep: Tensor) -> Write:
        def put(tensor: Tensor) -> Tensor:
            mask = keep[:, None, ..., None].to(tensor.device)
            return torch.where(mask, tensor, self.run.given[address].to(tensor))

        return put
