"""The relevant part of a batch of sources, carried through a model's blocks by the rules."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from probes.decomposition import rules as rule
from probes.decomposition.attention import Rotation
from probes.decomposition.block_operations import BlockOperations, Dense, ModelOperations
from probes.decomposition.nodes import Baseline, Kind, Placing, Source, first_layer, first_position, placings
from probes.decomposition.rules import Attending, Linear, Norm, Rules, Scoring
from probes.decomposition.trace import Trace
from probes.points import Address

Visit = Callable[[Tensor, Tensor, Tensor], None]
"""Receives the relevant part [source, pos, ...] of the sources that have begun, the first of the batch, the total
[pos, ...] and the positions [pos] that both stand at."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A traced prompt, its attention recomputed in working precision."""

    trace: Trace
    patterns: Sequence[Tensor]
    """Per layer, [head, query, key]."""
    scorings: Sequence[Scoring]
    entering: Sequence[Tensor]
    """Per layer, the input [pos, d_model] of the query, key and value projections."""
    received: Sequence[Attending]
    """Per layer, queries, keys and values as attention received them."""
    rotations: Sequence[Rotation]
    """Per layer; empty where the prompt was prepared for frozen attention only."""


class Walk:
    """One batch of sources on one prompt; each joins at its own first layer, before which nothing of it is relevant.

    Args:
        batch: sources in order of their first layer.
        baseline: what the sources' activations are compared to; None declares them relevant as they are.
        visits: what is done at each address that the walk passes; it ends after the last.
        restart: begin each source at its layer and all at the earliest position, instead of at block 0 and position 0.
    """

    def __init__(
        self,
        operations: ModelOperations,
        prompt: Prepared,
        batch: Sequence[Source],
        rules: Rules,
        baseline: Baseline | None,
        visits: Mapping[Address, Visit],
        restart: bool = True,
    ) -> None:
        self.operations, self.prompt = operations, prompt
        self.rules, self.baseline, self.visits = rules, baseline, visits
        self.n = len(prompt.trace.tokens)
        self.batch, self.placed = batch, placings(batch, self.n)
        start = min(first_position(source) for source in batch) if restart and operations.causal else 0
        self.at = torch.arange(start, self.n)
        self.keep: Tensor | None = None
        """Positions carried on after the attention of the last block; None for all."""
        self.last = max(address.layer or 0 for address in visits)
        self.starts = [first_layer(source) if restart else 0 for source in batch]

    @torch.no_grad()
    def run(self) -> Float[Tensor, "source pos d_model"]:
        """Carry the relevant part to the last address; returns what it is there."""
        self.at = self.at.to(self.total("block", "in", 0).device)
        stream = self.total("block", "in", 0)
        rel = stream.new_zeros(0, *stream.shape)
        for layer in range(min(self.last, self.starts[0]), self.last + 1):
            joining = self._begun(layer) - len(rel)
            rel = self._block(layer, torch.cat((rel, rel.new_zeros(joining, *rel.shape[1:]))) if joining else rel)
        return rel

    def _begun(self, layer: int) -> int:
        """Return how many sources, the first of the batch, have begun in `layer` or before."""
        return bisect_right(self.starts, layer)

    def total(self, component: str, side: str, layer: int) -> Float[Tensor, "pos *width"]:
        """Return the model's own activation at the positions the walk is at."""
        whole = self.prompt.trace.get(component, side, layer)
        return whole if len(self.at) == self.n else whole[self.at]

    def _visit(self, point: str, layer: int, rel: Tensor, total: Callable[[], Tensor]) -> None:
        if visit := self.visits.get(Address(point, layer)):
            visit(rel, total(), self.at)

    def _visited(self, layer: int, *points: str) -> bool:
        return any(Address(point, layer) in self.visits for point in points)

    def _declare(self, kind: Kind, layer: int, rel: Tensor, total: Tensor) -> Tensor:
        """Return `rel` with the sources of this kind and layer declared relevant."""
        placing = self.placed.get((kind, layer))
        if placing is None:
            return rel
        value = total
        if self.baseline is not None:
            value = total - self.baseline.at(kind, layer)[self.at].to(total)
        rows, positions, heads = _moved(placing, self.at)
        rel = rel.clone()
        if kind == "head":
            rel[rows, positions, heads] = value[positions, heads]
        else:
            rel[rows, positions] = value[positions]
        return rel

    def _linear(self, rel: Tensor, linear: Linear, total: Tensor) -> Tensor:
        return rule.linear(rel, linear, total, self.rules)

    def _norm(self, name: str, norm: Norm | None, layer: int, rel: Tensor) -> Tensor:
        return rel if norm is None else rule.norm(rel, norm, self.total(name, "in", layer), self.rules)

    def _block(self, layer: int, rel: Tensor) -> Tensor:
        block = self.operations.blocks[layer]
        kind = self.operations.kind
        rel = self._declare("token", layer, rel, self.total("block", "in", layer))
        self._visit("resid_pre", layer, rel, lambda: self.total("block", "in", layer))
        entering, before = rel, self.at
        attended = self._attention(block, layer, entering)
        if len(self.at) != len(before):
            entering = entering[:, self.at - before[0]]
        if kind == "post_norm":
            mid = self._norm("ln1", block.ln1, layer, entering + attended)
            added = self._mlp(block, layer, mid)
            out = self._norm("ln2", block.ln2, layer, mid + added)
        elif kind == "parallel":
            name, norm = ("ln2", block.ln2) if block.ln2 is not None else ("ln1", block.ln1)
            out = entering + attended + self._mlp(block, layer, self._norm(name, norm, layer, entering))
        else:
            mid = entering + attended
            self._visit("resid_mid", layer, mid, lambda: self.total("block", "in", layer) + self._attn_added(layer))
            out = mid + self._mlp(block, layer, self._norm("ln2", block.ln2, layer, mid))
        out = rule.dominate(out, self.total("block", "out", layer), self.rules)
        self._visit("resid_post", layer, out, lambda: self.total("block", "out", layer))
        return out

    def _attn_added(self, layer: int) -> Tensor:
        name = "ln1_post" if self.operations.blocks[layer].ln1_post is not None else "attn.o"
        return self.total(name, "out", layer)

    def _attention(self, block: BlockOperations, layer: int, rel: Tensor) -> Tensor:
        """Return what attention adds [source, pos, d_model]; after the last block's, only positions to keep go on."""
        z = self._z(block, layer, rel)
        z = self._declare("head", layer, z, self._z_total(layer))
        self._visit("z", layer, z, lambda: self._z_total(layer))
        if layer == self.last and self.keep is not None and len(self.keep) < len(self.at):
            z, self.at = z[:, self.keep - self.at[0]], self.keep
        added = self._linear(z.flatten(-2), block.o, self._z_total(layer).flatten(-2))
        added = self._norm("ln1_post", block.ln1_post, layer, added)
        self._visit("attn_out", layer, added, lambda: self._attn_added(layer))
        return added

    def _z_total(self, layer: int) -> Tensor:
        return rule.by_heads(self.total("attn.o", "in", layer), self.operations.d_head)

    def _z(self, block: BlockOperations, layer: int, rel: Tensor) -> Tensor:
        """Return the relevant part of the weighted values [source, pos, head, d_head], before sources are declared."""
        if ("token", layer) in self.placed or self._visited(layer, "attn_in", "q", "k", "v"):
            return self._weighted(block, layer, rel)
        # Of sources that begin here at heads or an MLP, nothing is relevant yet.
        before = self._begun(layer - 1)
        queries = self._queries(layer)
        z = rel.new_zeros(len(rel), len(queries), self.operations.n_heads, self.operations.d_head)
        if not before:
            self.at = queries
        else:
            z[:before] = self._weighted(block, layer, rel[:before])
        return z

    def _queries(self, layer: int) -> Tensor:
        """Return the positions whose weighted values are computed."""
        return self.keep if layer == self.last and self.keep is not None and not self._visited(layer, "z") else self.at

    def _weighted(self, block: BlockOperations, layer: int, rel: Tensor) -> Tensor:
        keys, queries = self.at, self._queries(layer)
        normed = self.operations.kind != "post_norm"
        h = self._norm("ln1", block.ln1, layer, rel) if normed else rel
        total = self.prompt.entering[layer][keys]
        self._visit("attn_in", layer, h, lambda: total)
        values = self._projected("v", block.v, layer, h, total)
        own = self.prompt.patterns[layer][:, queries]
        if self.rules.attention != "frozen" or self._visited(layer, "q", "k"):
            q = self._projected("q", block.q, layer, h, total)
            k = self._projected("k", block.k, layer, h, total)
        self.at = queries
        if self.rules.attention == "frozen":
            return rule.mix(own[:, :, keys], values)
        turned_q, turned_k = self._turned(block, layer, q, k, keys)
        relevant = Attending(turned_q[:, queries - keys[0]], turned_k, values)
        scoring = self.prompt.scorings[layer]
        if self.rules.attention == "joint":
            return rule.mix(rule.own_pattern(scoring, relevant, queries), values)
        return rule.attention(scoring, own, relevant, self.prompt.received[layer], queries)

    def _projected(self, name: str, linear: Linear, layer: int, h: Tensor, total: Tensor) -> Tensor:
        d_head = self.operations.d_head
        out = rule.by_heads(self._linear(h, linear, total), d_head)
        self._visit(name, layer, out, lambda: rule.by_heads(linear.total(total), d_head))
        return out

    def _turned(self, block: BlockOperations, layer: int, q: Tensor, k: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return the relevant queries and keys [source, pos, head, d_head] as attention receives them."""
        rotation, entering = self.prompt.rotations[layer], self.prompt.entering[layer][at]
        turned = []
        for states, name, norm, linear in ((q, "query", block.q_norm, block.q), (k, "key", block.k_norm, block.k)):
            if norm is not None:
                states = head_normed(
                    states,
                    norm,
                    linear.total(entering),
                    lambda x, t, norm=norm: rule.norm(x, norm, t, self.rules),  # type: ignore[misc]
                )
            turned.append(rotation.turned(states, name, at))
        return turned[0], turned[1]

    def _mlp(self, block: BlockOperations, layer: int, rel: Tensor) -> Tensor:
        """Return what the MLP adds [source, pos, d_model]."""
        mlp = block.mlp
        if isinstance(mlp, Dense):
            total = self.total("mlp.in", "in", layer)
            self._visit("mlp_in", layer, rel, lambda: total)
            units = self._units(mlp, layer, rel, total)
            self._visit("mlp_post", layer, units, lambda: self.total("mlp.out", "in", layer))
            out = self._linear(units, mlp.out, self.total("mlp.out", "in", layer))
            name = "mlp.out"
        else:
            total, name = self.total("mlp", "in", layer), "mlp"
            self._visit("mlp_in", layer, rel, lambda: total)
            routed = self.prompt.trace.routed[layer]
            out = rule.function(
                lambda x: mlp.apply(x if x.dim() == 3 else x[None], routed, self.at, self.n),
                (rel,), (total,), self.rules, self.total("mlp", "out", layer),
            )  # fmt: skip
            # Experts round differently in batches of different sizes, which must not make nothing into something.
            out = out * (rel != 0).any(-1, keepdim=True)
        out = rule.dominate(out, self.total(name, "out", layer), self.rules)
        out = self._norm("ln2_post", block.ln2_post, layer, out)
        added = self.total("ln2_post" if block.ln2_post is not None else name, "out", layer)
        out = self._declare("mlp", layer, out, added)
        self._visit("mlp_out", layer, out, lambda: added)
        return out

    def _units(self, mlp: Dense, layer: int, rel: Tensor, total: Tensor) -> Tensor:
        """Return the relevant part of the MLP's hidden units [source, pos, d_mlp]."""
        names = ("mlp.in",) if mlp.gate is None else ("mlp.gate", "mlp.in")
        maps = (mlp.up,) if mlp.gate is None else (mlp.gate, mlp.up)
        totals = tuple(self.total(name, "out", layer) for name in names)
        rels = tuple(
            rule.dominate(self._linear(rel, linear, total), t, self.rules)
            for linear, t in zip(maps, totals, strict=True)
        )
        if mlp.gate is not None and self.rules.gate == "frozen":
            return mlp.activation(totals[0]) * rels[1]
        return rule.function(mlp.units, rels, totals, self.rules, self.total("mlp.out", "in", layer))


def head_normed(
    states: Float[Tensor, "*rest pos head d_head"],
    norm: Norm,
    total: Float[Tensor, "pos columns"],
    apply: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, "*rest pos head d_head"]:
    """Apply a norm of queries or keys to states, given totals."""
    width = states.shape[-1] if norm.gain is None else norm.gain.shape[-1]
    if width == states.shape[-1]:
        return apply(states, rule.by_heads(total, width))
    return rule.by_heads(apply(states.flatten(-2), total), states.shape[-1])


def _moved(placing: Placing, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, indices into `at` and heads of the nodes whose position the walk still carries."""
    spots = torch.full((int(max(at.max(), placing.positions.max())) + 1,), -1, dtype=torch.long)
    spots[at.cpu()] = torch.arange(len(at))
    where = spots[placing.positions]
    inside = where >= 0
    return tuple(index[inside].to(at.device) for index in (placing.rows, where, placing.heads))  # type: ignore[return-value]
