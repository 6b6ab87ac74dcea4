"""Attribution patching: what cells would do, from one gradient, with exact softmax changes for queries and keys.

Nanda 2023, "Attribution patching"; Kramár et al. 2024, "AtP*: An efficient and scalable method for localizing LLM behaviour
to components", arXiv 2403.00745, for the treatment of queries and keys and for dropping gradients block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from analyses.causal_patching.cells import EVERYWHERE, Cell
from analyses.causal_patching.grid import Sources, capture_values
from analyses.causal_patching.metrics import metrics_of
from analyses.causal_patching.opened import first_patched
from analyses.causal_patching.pairs import Direction, Pair
from probes.blocks.rerouting import module_of
from probes.decomposition.attention import capture_attention_inputs
from probes.gradients import values_and_gradients
from probes.hooks.attention_probabilities import Attended, attention_scores, grouped, probabilities
from probes.models.protocol import Model
from probes.points import Address

Method = Literal["atp", "atp_star"]
Gradients = Mapping[Address, Tensor]
"""Gradients of a metric at points of one run, [pos, ...]."""


def pair_metric(
    pair: Pair, name: str, clean: Float[Tensor, " d_vocab"] | None = None
) -> Callable[[Float[Tensor, "row d_vocab"]], Float[Tensor, " row"]]:
    """Return one metric of a pair as a function of last logits; `kl` needs the clean run's."""
    ids = torch.tensor(pair.ids)

    def metric(logits: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1)
        kl = logprobs.new_zeros(len(logits))
        if clean is not None:
            reference = clean.to(logits).log_softmax(-1)
            kl = (reference.exp() * (reference - logprobs)).sum(-1)
        return metrics_of((name,), logprobs[:, ids.to(logits.device)], len(pair.answers), kl, detached=False)[:, 0]

    return metric


@dataclass(frozen=True, eq=False)
class Attributed:
    """A pair in one direction, ready to be attributed: values of both runs and gradients of the patched one."""

    model: Model
    pair: Pair
    direction: Direction
    metric: str

    @property
    def tokens(self) -> Tensor:
        """The patched run's tokens, [1, pos]."""
        return torch.tensor([self.pair.base(self.direction)])

    def scores(self, cells: Sequence[Cell], method: Method) -> Float[Tensor, " cell"]:
        """Return what each cell would change in the metric, as patching does; its size alone for `atp_star`.

        `atp`: the gradient at the patched run times the change. `atp_star`: the same with the true change of the softmax for
        queries and keys, its absolute value averaged over runs in which one block after the other passes no gradient.
        """
        points = {Address(cell.component, layer) for cell in cells for layer in cell.layers}
        points |= {Address("z", address.layer) for address in points if address.point in ("q", "k", "pattern")}
        source = capture_values(self.model, self.pair.source(self.direction), points)
        sources = Sources(source, self.pair.sources(self.direction))
        if method == "atp":
            return self._first_order(cells, sources, *self._gradients(points, None))
        attention = self._attention() if any(cell.component in ("q", "k") for cell in cells) else {}
        n = self.model.shape.n_layers
        total = torch.zeros(len(cells))
        for block in range(n):
            values, gradients = self._gradients(points, block)
            total += self._fixed(cells, sources, values, gradients, attention).abs()
        return total / max(1, n - 1)

    def with_fix(self, cells: Sequence[Cell]) -> Float[Tensor, " cell"]:
        """Return signed scores with the true change of the softmax for queries and keys, no gradient dropped."""
        points = {Address(cell.component, layer) for cell in cells for layer in cell.layers}
        points |= {Address("z", address.layer) for address in points if address.point in ("q", "k")}
        source = capture_values(self.model, self.pair.source(self.direction), points)
        sources = Sources(source, self.pair.sources(self.direction))
        return self._fixed(cells, sources, *self._gradients(points, None), self._attention())

    def _gradients(self, points: set[Address], stopped: int | None) -> tuple[Gradients, Gradients]:
        clean = None
        if self.metric == "kl":
            clean = capture_values(self.model, self.pair.clean, {Address("logits")})[Address("logits")][-1].clone()
        metric = pair_metric(self.pair, self.metric, clean)
        values, gradients = values_and_gradients(self.model, self.tokens, points, metric, stopped_block=stopped)
        return {a: t[0].float() for a, t in values.items()}, {a: t[0].float() for a, t in gradients.items()}

    def _first_order(self, cells: Sequence[Cell], sources: Sources, values: Gradients, gradients: Gradients) -> Tensor:
        terms: dict[Address, Tensor] = {}
        for address in {Address(cell.component, layer) for cell in cells for layer in cell.layers}:
            products = torch.zeros_like(values[address])
            at = sorted(sources.positions)
            if address.point == "pattern":
                products = (sources.values[address].float() - values[address]) * gradients[address]
                terms[address] = products.sum(-1).T
                continue
            products[at] = (sources.given(address, at).float() - values[address][at]) * gradients[address][at]
            terms[address] = products.sum(-1)
        return self._summed(cells, terms)

    def _fixed(
        self,
        cells: Sequence[Cell],
        sources: Sources,
        values: Gradients,
        gradients: Gradients,
        attention: Mapping[int, AttentionPair],
    ) -> Tensor:
        plain = self._first_order(cells, sources, values, gradients)
        terms: dict[Address, Tensor] = {}
        for cell in cells:
            for layer in cell.layers:
                address = Address(cell.component, layer)
                if cell.component in ("q", "k") and address not in terms:
                    change = attention[layer].queries if cell.component == "q" else attention[layer].keys
                    terms[address] = change(gradients[Address("z", layer)])
        fixed = [i for i, cell in enumerate(cells) if cell.component in ("q", "k")]
        if fixed:
            plain[fixed] = self._summed([cells[i] for i in fixed], terms)
        return plain

    def _summed(self, cells: Sequence[Cell], terms: Mapping[Address, Tensor]) -> Tensor:
        """Return the sum of each cell's terms, of [pos] or [pos, head] at each point."""
        start = first_patched(self.pair, self.direction, self.model.shape.causal)
        out = torch.zeros(len(cells))
        for i, cell in enumerate(cells):
            at = slice(start, None) if cell.position == EVERYWHERE else slice(cell.position, cell.position + 1)
            for layer in cell.layers:
                part = terms[Address(cell.component, layer)][at]
                out[i] += (part if cell.head < 0 else part[:, cell.head]).sum().cpu()
        return out

    def _attention(self) -> dict[int, AttentionPair]:
        """Return the attention of both runs, which have to be of one length, by layer.

        Where a norm runs over the queries or keys of all heads together, a head's are those that all of them would give.
        """
        layers = tuple(range(self.model.shape.n_layers))
        runs: list[dict[int, Attended]] = []
        with module_of(self.model) as (module, anatomy), torch.no_grad():
            modules = [anatomy.component("attn", layer) for layer in layers]
            for tokens in (self.pair.base(self.direction), self.pair.source(self.direction)):
                with capture_attention_inputs(module, anatomy, layers) as attended:
                    module(input_ids=torch.tensor([tokens], device=self.model.device), use_cache=False)
                runs.append(dict(attended))
        return {
            layer: AttentionPair(modules[layer], runs[0][layer], runs[1][layer], self.model.shape.n_kv_heads)
            for layer in layers
        }


@dataclass(frozen=True, eq=False)
class AttentionPair:
    """One layer's attention in the patched run and in the source run."""

    module: nn.Module
    base: Attended
    source: Attended
    n_kv_heads: int

    def _of_pattern(self, z: Float[Tensor, "pos head d_head"]) -> Float[Tensor, "head query key"]:
        """Return the gradient at the pattern from that at z: that of each value weighed."""
        values = grouped(self.base.value, z.shape[1])[0].float()
        return torch.einsum("qhd,hkd->hqk", z, values)

    def queries(self, z: Float[Tensor, "pos head d_head"]) -> Float[Tensor, "pos head"]:
        """Return the first-order effect of each query's own, exact change of the pattern, from the gradient at z."""
        patterns = [
            probabilities(self.module, run.query, self.base.key, self.base.mask, **self.base.arguments)[0]
            for run in (self.source, self.base)
        ]
        return ((patterns[0] - patterns[1]) * self._of_pattern(z)).sum(-1).T

    def keys(self, z: Float[Tensor, "pos head d_head"]) -> Float[Tensor, "pos kv_head"]:
        """Return the first-order effect of each key's own, exact change of every later query's pattern, from the gradient at z.

        With p the pattern and d the change of the score of one key, its probability becomes p e^d / (1 + p (e^d - 1)), and
        all others shrink by the same divisor.
        """
        base, given = self.base, self.base.arguments
        pattern = probabilities(self.module, base.query, base.key, base.mask, **given)[0]
        after, before = (attention_scores(self.module, base.query, run.key, **given)[0] for run in (self.source, base))
        # Through logarithms, so that a large change of a score neither overflows nor meets a zero.
        divisor = torch.logaddexp(torch.log1p(-pattern.clamp_max(1)), pattern.log() + (after - before))
        weight = -torch.expm1(-divisor)
        gradient = self._of_pattern(z)
        mean = (pattern * gradient).sum(-1, keepdim=True)
        effects = (weight * (gradient - mean)).sum(1)
        return effects.reshape(self.n_kv_heads, -1, effects.shape[-1]).sum(1).T
