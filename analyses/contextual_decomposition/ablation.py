"""Prompts whose heads are set to their baseline, many sets of heads at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from analyses.contextual_decomposition.cases import Case
from probes.blocks.cached_prompt import CachedPrompt
from probes.decomposition import Baseline, Node
from probes.models.protocol import Model, Write
from probes.points import Address

POSITIONS = 1024
"""Rows times positions of one block's forward."""
STREAM_POSITIONS = 32768
"""Rows times positions whose streams are kept at once, which bounds memory."""


class Ablation:
    """A prompt whose heads can be set to their baseline, and a count of the forwards that this replaces.

    Args:
        start: the first position to run; those before it equal their baseline, because every reference begins alike.
    """

    def __init__(self, model: Model, case: Case, baseline: Baseline | None, start: int = 0) -> None:
        self.model, self.case, self.baseline = model, case, baseline
        readable = model.shape.causal and "lens" not in model.faithfulness.refused
        self.cached = CachedPrompt(model, case.tokens, min(start, len(case.tokens) - 1)) if readable else None
        self.start = 0 if self.cached is None else self.cached.start
        self.forwards = 0

    @torch.no_grad()
    def metric(self, keep: Bool[Tensor, "row layer *rest head"]) -> Float[Tensor, " row"]:
        """Return the metric [rows] with each head at its baseline where `keep` is False.

        Each row in which something is ablated counts as one forward. Rows share what they have in common: each set of
        rows that agree up to a block passes it once, and none passes a block before its first ablated head.

        Args:
            keep: [rows, layer, head] or [rows, layer, pos, head].
        """
        keep = keep[:, :, None] if keep.dim() == 3 else keep
        keep = keep if keep.shape[2] == 1 else keep[:, :, self.start :]
        self.forwards += int((~keep.flatten(1).all(1)).sum())
        distinct, row = torch.unique(keep.flatten(1), dim=0, return_inverse=True)
        # Sorted, so rows that agree longest stand together, and a split parts few that could have shared.
        parts = distinct.unflatten(1, keep.shape[1:]).split(self._at_once(STREAM_POSITIONS))
        values = torch.cat([self._plainly(part) if self.cached is None else self._shared(part) for part in parts])
        return values[row]

    def whole(self) -> Float[Tensor, ""]:
        """Return the metric of the prompt as it is, of a model whose blocks can be run by themselves."""
        assert self.cached is not None
        return self.read(self.cached.entering[-1][-1:])[0]

    def read(self, last: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
        """Return the metric of what leaves the last block at the last position."""
        return self.case.metric(self._logits(last)).double().cpu()

    @torch.no_grad()
    def under(self, rows: int, writes: Mapping[Address, Write]) -> Float[Tensor, " row"]:
        """Return the metric of copies of the prompt, run whole under writes."""
        out, tokens = list[Tensor](), torch.tensor([self.case.tokens]).expand(rows, -1)
        if self.cached is None:
            ids = list(self.case.ids)
            self.model.run(tokens, {Address("logits"): lambda t: out.append(t[:, -1, ids].float().clone())}, writes)
            return self.case.metric(out[0]).double().cpu()
        # The logits of every position and token are a good part of a small model's forward.
        end = Address("resid_post", self.model.shape.n_layers - 1)
        self.model.run(tokens, {end: lambda t: out.append(t[:, -1].clone())}, writes)
        return self.read(out[0])

    def _at_once(self, positions: int) -> int:
        return max(1, positions // (len(self.case.tokens) - self.start))

    def _shared(self, keep: Tensor) -> Tensor:
        """Return the metric of distinct rows; those that agree up to a block pass it together."""
        cached = self.cached
        assert cached is not None
        branch = torch.zeros(len(keep), dtype=torch.long)
        streams: list[Tensor] = []
        for layer in range(self.model.shape.n_layers):
            here = torch.cat((branch[:, None], keep[:, layer].flatten(1)), 1)
            branches, branch = torch.unique(here, dim=0, return_inverse=True)
            untouched = (branches[:, 0] == 0) & branches[:, 1:].all(1)
            moving = torch.nonzero(~untouched)[:, 0]
            # Branch 0 is the prompt as it is, which runs nothing.
            number = torch.zeros(len(branches), dtype=torch.long)
            number[moving] = torch.arange(1, len(moving) + 1)
            branch = number[branch]
            entering = [cached.entering[layer], *streams]
            masks = branches[moving, 1:].bool().unflatten(1, keep.shape[2:])
            streams = self._pass(layer, [entering[int(i)] for i in branches[moving, 0]], masks)
        ends = torch.stack([stream[-1] for stream in (cached.entering[-1], *streams)])
        return self.read(ends)[branch]

    def _pass(self, layer: int, entering: Sequence[Tensor], keep: Tensor) -> list[Tensor]:
        """Return what leaves a block, [pos, d_model], for each stream that enters it."""
        assert self.cached is not None
        out: list[Tensor] = []
        for rows in torch.split(torch.arange(len(entering)), self._at_once(POSITIONS)) if entering else ():
            hidden = torch.stack([entering[int(row)] for row in rows])
            mask = keep[rows]
            writes = {} if mask.all() else {Address("z", layer): self._write(layer, mask)}
            out += self.cached.through(layer, hidden, writes).unbind()
        return out

    def _plainly(self, keep: Tensor) -> Tensor:
        """Return the metric of each row by a whole forward, for models whose blocks cannot be run by themselves."""
        values = []
        for part in torch.split(keep, self._at_once(POSITIONS)):
            layers = [layer for layer in range(part.shape[1]) if not part[:, layer].all()]
            writes = {Address("z", layer): self._write(layer, part[:, layer]) for layer in layers}
            values.append(self.under(len(part), writes))
        return torch.cat(values)

    def _write(self, layer: int, keep: Tensor) -> Write:
        def write(z: Tensor) -> Tensor:
            base = torch.zeros_like(z[0]) if self.baseline is None else self.baseline.z[layer, self.start :].to(z)
            return torch.where(keep.to(z.device)[..., None], z, base)

        return write

    def _logits(self, last: Tensor) -> Tensor:
        """Return the logits [rows, ids] of the case's tokens alone."""
        unembedding = self.model.unembedding()
        ids = torch.tensor(self.case.ids, device=unembedding.weight.device)
        hidden = unembedding.norm(last.to(unembedding.weight))
        bias = None if unembedding.bias is None else unembedding.bias[ids]
        out = nn.functional.linear(hidden, unembedding.weight[ids], bias).float()
        return out if unembedding.softcap is None else unembedding.softcap * torch.tanh(out / unembedding.softcap)


def shared_start(tokens: Sequence[int], references: Sequence[Sequence[int]]) -> int:
    """Count the tokens that the prompt and all of its references begin with in common; 0 without references."""
    if not references:
        return 0
    same = [all(other[i] == token for other in references) for i, token in enumerate(tokens)]
    return same.index(False) if False in same else len(tokens)


def without(ablation: Ablation, nodes: Sequence[Node]) -> Float[Tensor, " node"]:
    """Return how much the metric falls when each node alone, a head at all positions or at one, goes to its baseline."""
    shape, n = ablation.model.shape, len(ablation.case.tokens)
    width = 1 if all(node.position < 0 for node in nodes) else n
    keep = torch.ones(len(nodes) + 1, shape.n_layers, width, shape.n_heads, dtype=torch.bool)
    for row, node in enumerate(nodes):
        keep[row, node.layer, slice(None) if node.position < 0 else node.position, node.head] = False
    values = ablation.metric(keep)
    return values[-1] - values[:-1]
