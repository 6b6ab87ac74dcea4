"""Path patching: what a sender writes, changed as one input of a receiver sees it, and nowhere else.

Wang et al. 2022, "Interpretability in the Wild", arXiv 2211.00593; Goldowsky-Dill et al. 2023, "Localizing Model Behavior
with Path Patching", arXiv 2304.05969. The receiver's own norm is run again on the changed stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.causal_patching.graph import Edge, Receiver, Sender
from analyses.causal_patching.grid import Sources
from analyses.causal_patching.resumed_grid import ResumedGrid
from probes.blocks.rerouting import module_of
from probes.errors import PointError
from probes.models.protocol import Model, Read, Write
from probes.points import Address

Through = Literal["residual", "mlps"]
KvView = Literal["shared", "query"]
EDGE_ROWS = 64
"""Edges of one receiver's layer that run together, which bounds memory."""


def written_points(n_layers: int) -> set[Address]:
    """Return the points from which what senders write follows."""
    names = ("z", "mlp_out", "attn_out")
    return {Address("resid_pre", 0)} | {Address(name, layer) for name in names for layer in range(n_layers)}


@torch.no_grad()
def sender_changes(
    model: Model, senders: Sequence[Sender], base: Mapping[Address, Tensor], sources: Sources
) -> Float[Tensor, "sender pos d_model"]:
    """Return by how much each sender writes differently in the source run than in the patched one; 0 where nothing corresponds.

    Behind a sandwich norm a head's share is what the norm's output changes when that head alone does.

    Args:
        senders: of any layer.
        base: `written_points` of the patched run, [pos, ...].
        sources: the same of the source run.

    Raises:
        PointError: attention's output is not its output projection and norm, or blocks normalise each sum.
    """
    at = sorted(sources.positions)
    n, width = base[Address("resid_pre", 0)].shape
    out = torch.zeros(len(senders), n, width)
    by_layer: dict[int, list[int]] = defaultdict(list)
    for i, sender in enumerate(senders):
        if sender.head >= 0:
            by_layer[sender.layer].append(i)
        else:
            address = Address("resid_pre", 0) if sender.embed else Address("mlp_out", sender.layer)
            out[i, at] = (sources.given(address, at) - base[address][at]).float().cpu()
    for layer, indices in by_layer.items():
        heads = [senders[i].head for i in indices]
        out[indices] = _head_changes(model, layer, heads, base, sources, at).float().cpu()
    return out


def _head_changes(
    model: Model, layer: int, heads: Sequence[int], base: Mapping[Address, Tensor], sources: Sources, at: Sequence[int]
) -> Tensor:
    z, address = base[Address("z", layer)], Address("z", layer)
    with module_of(model) as (_, anatomy):
        if anatomy.kind == "post_norm":
            raise PointError(
                f"{model.ref} normalises each sum, so what a head writes is not part of a stream: patch nodes instead"
            )
        parts = [anatomy.component("attn.o", layer)]
        if anatomy.map.path("ln1_post", layer):
            parts.append(anatomy.component("ln1_post", layer))

        def added(rows: Tensor) -> Tensor:
            rows = rows.flatten(-2)
            for part in parts:
                rows = part(rows)
            return rows

        whole = base[Address("attn_out", layer)]
        own = added(z[None])[0]
        if float((own - whole).abs().max()) > 1e-3 * max(1.0, float(whole.abs().max())):
            raise PointError(
                f"{model.ref}: attn_out.{layer} is not the output projection of z, so heads cannot be told apart"
            )
        changed = z.expand(len(heads), *z.shape).clone()
        rows = torch.arange(len(heads))
        given = sources.given(address, at).to(z)
        changed[rows[:, None], torch.tensor(at)[None], torch.tensor(heads)[:, None]] = given[:, heads].transpose(0, 1)
        return added(changed) - own


@dataclass(frozen=True, eq=False)
class PathGrid:
    """A causal run whose edges can be patched."""

    model: Model
    grid: ResumedGrid
    parallel: bool
    """Whether attention and MLP read the same stream."""
    through: Through = "residual"
    """`residual`: the direct edge. `mlps`: MLPs on the way are run again, heads stay as they are."""

    @torch.no_grad()
    def last_rows(
        self, edges: Sequence[tuple[Sender, Receiver]], changes: Mapping[Sender, Float[Tensor, "pos d_model"]]
    ) -> Float[Tensor, "edge d_model"]:
        """Return what leaves the last block at the last position under each edge.

        Args:
            edges: each with a receiver that reads what the sender writes.
            changes: of each sender, over the whole prompt.
        """
        last = self.grid.unpatched.expand(len(edges), -1).clone()
        by_layer: dict[int, list[int]] = defaultdict(list)
        for i, (_, receiver) in enumerate(edges):
            by_layer[receiver.layer].append(i)
        for layer, indices in by_layer.items():
            shared = [i for i in indices if not edges[i][1].alone]
            for k in range(0, len(shared), EDGE_ROWS):
                part = shared[k : k + EDGE_ROWS]
                own = [edges[i] for i in part]
                delta = torch.stack([changes[sender][self.grid.base.start :] for sender, _ in own]).to(last)
                last[part] = self.together(layer, [[edge] for edge in own], delta)
            for i in (i for i in indices if edges[i][1].alone):
                sender, receiver = edges[i]
                delta = changes[sender][None, self.grid.base.start :].to(last)
                last[i] = self.per_query(receiver, self._along(layer, [[edges[i]]], delta))[0]
        return last

    @torch.no_grad()
    def together(
        self, layer: int, rows: Sequence[Sequence[Edge]], delta: Float[Tensor, "row suffix d_model"]
    ) -> Float[Tensor, "row d_model"]:
        """Return last rows where the receivers of each row, all of one layer, see the stream changed by `delta`.

        Changes of several senders add, so that a row of them is one run.
        """
        base = self.grid.base
        delta = self._along(layer, rows, delta)
        if layer == self.model.shape.n_layers:
            return base.entering[-1][-1] + delta[:, -1]
        seen = self._seen(layer, delta)
        receivers = [(row, receiver) for row, edges in enumerate(rows) for _, receiver in edges]
        entering = base.entering[layer].expand(len(rows), -1, -1)
        leaving = base.through(layer, entering, self._writes(layer, receivers, seen))
        return base.resume([layer + 1] * len(rows), leaving).last

    @torch.no_grad()
    def per_query(self, receiver: Receiver, delta: Float[Tensor, "row suffix d_model"]) -> Float[Tensor, "row d_model"]:
        """Return last rows where one query head sees the changed key or value and the others of its group the old one.

        No model computes that: it is a counterfactual that separates heads that share a key.
        """
        base, layer = self.grid.base, receiver.layer
        entering = base.entering[layer].expand(len(delta), -1, -1)
        group = self.model.shape.n_heads // self.model.shape.n_kv_heads
        rows = [(row, Receiver(layer, receiver.input, receiver.head // group)) for row in range(len(delta))]
        kept: list[Tensor] = []
        z = Address("z", layer)
        base.through(
            layer, entering, self._writes(layer, rows, self._seen(layer, delta)), {z: lambda t: kept.append(t.clone())}
        )

        def write(tensor: Tensor) -> Tensor:
            out = tensor.clone()
            out[:, :, receiver.head] = kept[0][:, :, receiver.head]
            return out

        return base.resume([layer + 1] * len(delta), base.through(layer, entering, {z: write})).last

    def _seen(self, layer: int, delta: Tensor) -> dict[str, Tensor]:
        """Return queries, keys, values and the MLP's output of a block, [row, suffix, ...], where they read a changed stream."""
        base = self.grid.base
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Read:
            return lambda tensor: seen.__setitem__(name, tensor.clone())

        entering = base.entering[layer] + delta
        reads = {Address(name, layer): keep(name) for name in "qkv"}
        if self.parallel:
            base.through(layer, entering, {}, {**reads, Address("mlp_out", layer): keep("mlp_out")})
            return seen
        base.through(layer, entering, {}, reads)
        middle: dict[Address, Write] = {Address("resid_mid", layer): lambda tensor: tensor + delta}
        same = base.entering[layer].expand(len(delta), -1, -1)
        base.through(layer, same, middle, {Address("mlp_out", layer): keep("mlp_out")})
        return seen

    def _writes(
        self, layer: int, receivers: Sequence[tuple[int, Receiver]], seen: Mapping[str, Tensor]
    ) -> dict[Address, Write]:
        by_input: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for row, receiver in receivers:
            by_input[receiver.input].append((row, receiver.head))

        def write(name: str, point: str) -> Write:
            def put(tensor: Tensor) -> Tensor:
                out = tensor.clone()
                rows, heads = torch.tensor(by_input[name], device=tensor.device).T
                if name == "mlp":
                    out[rows] = seen[point][rows].to(out)
                else:
                    out[rows, :, heads] = seen[point][rows, :, heads].to(out)
                return out

            return put

        points = {name: "mlp_out" if name == "mlp" else name for name in by_input}
        return {Address(point, layer): write(name, point) for name, point in points.items()}

    def _along(self, layer: int, rows: Sequence[Sequence[Edge]], delta: Tensor) -> Tensor:
        """Return the change that reaches a layer when the MLPs between a row's sender and it are run again."""
        if self.through == "residual":
            return delta
        delta = delta.clone()
        first = torch.tensor([
            min(sender.layer + (sender.head < 0 or self.parallel) for sender, _ in edges) for edges in rows
        ])  # fmt: skip
        for between in range(int(first.clamp_min(0).min()), layer):
            active = first <= between
            plain = self._seen(between, torch.zeros_like(delta[:1]))["mlp_out"]
            delta[active] += (self._seen(between, delta[active])["mlp_out"] - plain).to(delta)
        return delta
