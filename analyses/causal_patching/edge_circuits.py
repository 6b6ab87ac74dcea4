"""Circuits of edges: every receiver reads what its edges inside the circuit bring, and the baseline along all others.

As circuits are evaluated by Hanna et al. 2024, "Have Faith in Faithfulness", arXiv 2403.17806, and Mueller et al. 2025,
"MIB", arXiv 2504.13151; here many circuits pass each block together, and nothing before the first change runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.causal_patching.ablation import EMBEDDED, Ablated
from probes.anatomy import Anatomy
from probes.blocks.rerouting import module_of
from probes.errors import PointError
from probes.models.protocol import Model, Read, Write
from probes.points import Address
from probes.weights.composition import Heads
from probes.weights.head_weights import head_weights

CHANGE_BYTES = 2**27
"""Bytes of what all senders of circuits that run together write, which bounds memory."""


def edge_weights(model: Model) -> Heads:
    """Return the projections by which heads read and write the stream.

    Raises:
        PointError: a model in which what heads write does not add up in the stream, or whose weights are out of reach.
    """
    with module_of(model) as (_, anatomy):
        if anatomy.kind == "post_norm" or anatomy.map.path("ln1_post", 0):
            raise PointError(
                f"{model.ref} normalises what its heads write together, so no circuit of edges adds up: try --circuit nodes"
            )
    return head_weights(model, fold_norm=False)


@dataclass(frozen=True, eq=False)
class EdgeCircuits:
    """A clean run in which edges can be set to what they carry in the baseline."""

    model: Model
    run: Ablated
    weights: Heads
    """As `edge_weights`."""

    @torch.no_grad()
    def last_rows(self, keep: Bool[Tensor, "row sender receiver"]) -> Float[Tensor, "row d_model"]:
        """Return what leaves the last block at the last position with every edge outside each row's circuit ablated.

        Args:
            keep: senders and receivers in the order of `graph.senders_of` and `graph.receivers_of`.
        """
        embedded = self.run.given[EMBEDDED]
        at_once = max(1, CHANGE_BYTES // (keep.shape[1] * embedded.numel() * embedded.element_size()))
        with module_of(self.model) as (_, anatomy):
            return torch.cat([_Pass(self, part, anatomy).last_rows() for part in torch.split(keep, at_once)])


class _Pass:
    """Circuits that pass the blocks together."""

    def __init__(self, circuits: EdgeCircuits, keep: Tensor, anatomy: Anatomy) -> None:
        self.base, self.given, self.weights = circuits.run.base, circuits.run.given, circuits.weights
        self.shape, self.anatomy = circuits.model.shape, anatomy
        stream = self.given[EMBEDDED]
        self.mask = keep.to(stream).transpose(1, 2)
        # By how much each sender writes more than its baseline, [row, sender, pos * d_model].
        self.changes = stream.new_zeros(len(keep), keep.shape[1], stream.numel())
        self.changes[:, 0] = (self.base.entering[0] - stream).flatten()
        self.written = 1

    def last_rows(self) -> Tensor:
        """Run every block; return what leaves the last at the last position, [row, d_model]."""
        stream = self.given[EMBEDDED]
        for layer in range(self.shape.n_layers):
            stream = self._block(layer, stream)
        more = self.mask[:, -1:] @ self.changes[..., -stream.shape[-1] :]
        return stream[-1] + more[:, 0]

    def _block(self, layer: int, stream: Tensor) -> Tensor:
        """Run a block into which `stream` [pos, d_model] goes where every node writes its baseline; return what then leaves it."""
        z_point, mlp_point = Address("z", layer), Address("mlp_out", layer)
        middle = stream + self.anatomy.component("attn.o", layer)(self.given[z_point].flatten(-2))
        first = layer * (self.shape.n_heads + 2 * self.shape.n_kv_heads + 1)
        mlp = first + self.shape.n_heads + 2 * self.shape.n_kv_heads
        writes = self._written(layer, stream, self._seen(stream, first, mlp))
        entering = self.base.entering[layer].expand(len(self.mask), -1, -1)
        outputs: list[Tensor] = []
        if self.anatomy.parallel:
            seen = self._seen(stream, mlp, mlp + 1)[:, 0]
            self.base.through(layer, entering, writes, {z_point: self._heads(layer)})
            self.base.through(layer, seen, {}, {mlp_point: lambda t: outputs.append(t.clone())})
        else:
            # The MLP also reads its own block's heads, which by then have written.
            writes[Address("resid_mid", layer)] = lambda t: self._seen(middle, mlp, mlp + 1)[:, 0].to(t)
            reads: dict[Address, Read] = {z_point: self._heads(layer), mlp_point: lambda t: outputs.append(t.clone())}
            self.base.through(layer, entering, writes, reads)
        self._write((outputs[0] - self.given[mlp_point]).flatten(1)[:, None])
        return middle + self.given[mlp_point]

    def _seen(self, stream: Tensor, first: int, last: int) -> Float[Tensor, "row receiver pos d_model"]:
        """Return what receivers `first` to `last` read where the baseline alone would give them `stream`."""
        more = self.mask[:, first:last, : self.written] @ self.changes[:, : self.written]
        return stream + more.view(*more.shape[:2], *stream.shape)

    def _write(self, changes: Float[Tensor, "row sender pos_d_model"]) -> None:
        self.changes[:, self.written : self.written + changes.shape[1]] = changes
        self.written += changes.shape[1]

    def _heads(self, layer: int) -> Read:
        def read(z: Tensor) -> None:
            more = z - self.given[Address("z", layer)]
            wrote = torch.einsum("rphk,hkd->rhpd", more, self.weights.w_o[layer].to(more))
            self._write(wrote.flatten(2))

        return read

    def _written(
        self, layer: int, stream: Tensor, seen: Float[Tensor, "row receiver pos d_model"]
    ) -> dict[Address, Write]:
        """Return writes of a block's queries, keys and values, each head's from the stream that it reads."""
        plain: dict[str, Tensor] = {}
        reads: dict[Address, Read] = {
            Address(name, layer): lambda t, name=name: plain.__setitem__(name, t.clone())  # type: ignore[misc]
            for name in "qkv"
        }
        self.base.through(layer, stream[None], {}, reads)
        norm = self.anatomy.component("ln1", layer) if self.anatomy.map.path("ln1", layer) else torch.nn.Identity()
        # Differences, so that no projection's bias is needed.
        more = norm(seen.flatten(0, 1)).view_as(seen) - norm(stream[None])
        n, n_kv = self.shape.n_heads, self.shape.n_kv_heads
        w_q, w_k, w_v = (of[layer].to(more) for of in (self.weights.w_q, self.weights.w_k, self.weights.w_v))
        parts = zip("qkv", more.split((n, n_kv, n_kv), dim=1), (w_q, w_k[:: n // n_kv], w_v[:: n // n_kv]), strict=True)
        projected = {name: plain[name] + torch.einsum("rhpd,hdk->rphk", part, w) for name, part, w in parts}
        return {Address(name, layer): lambda t, name=name: projected[name].to(t) for name in "qkv"}  # type: ignore[misc]
