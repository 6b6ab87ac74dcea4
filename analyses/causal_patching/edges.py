"""Edge attribution: what every edge would do, from one gradient or from gradients along a line between the runs.

Syed et al. 2023, "Attribution Patching Outperforms Automated Circuit Discovery", arXiv 2310.10348 (EAP); Hanna et al. 2024,
"Have Faith in Faithfulness", arXiv 2403.17806 (EAP-IG, by inputs and by activations).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.causal_patching.attribution import pair_metric
from analyses.causal_patching.corruption import EMBED
from analyses.causal_patching.graph import Sender, reaches, receivers_of
from analyses.causal_patching.grid import capture_values
from analyses.causal_patching.pairs import Direction, Pair
from probes.blocks.rerouting import module_of
from probes.errors import PointError
from probes.gradients import values_and_gradients
from probes.models.protocol import Model
from probes.points import Address
from probes.weights.head_weights import head_weights

Rule = Literal["left", "right", "midpoint", "gauss"]
LinePath = Literal["inputs", "activations"]


@dataclass(frozen=True)
class Line:
    """Where between the corrupted run, 0, and the clean one, 1, gradients are taken, and what lies there.

    With the path `inputs` all token embeddings lie on the line; with `activations` one component's output after the other
    does, everything else being as in the run that is patched: 2 L + 1 times the runs.
    """

    steps: int
    rule: Rule
    path: LinePath

    @property
    def places(self) -> tuple[list[float], list[float]]:
        """(places on the line, weights that sum to 1).

        `left` never visits the clean end and `right` never the corrupted one; `gauss` is exact for metrics that are
        polynomials of degree up to 2 * steps - 1 along the line.
        """
        if self.rule == "gauss":
            places, weights = np.polynomial.legendre.leggauss(self.steps)
            return list((places + 1) / 2), list(weights / 2)
        shift = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[self.rule]
        return [(k + shift) / self.steps for k in range(self.steps)], [1 / self.steps] * self.steps


@dataclass(frozen=True, eq=False)
class ReceiverWeights:
    """The projections of queries, keys and values of every head, float32: [layer, head, d_model, d_head]."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, model: Model) -> ReceiverWeights:
        """Read them from the model.

        Raises:
            PointError: weights that are quantised or not in memory.
        """
        heads = head_weights(model, fold_norm=False)
        group = model.shape.n_heads // model.shape.n_kv_heads
        return cls(heads.w_q, heads.w_k[:, ::group], heads.w_v[:, ::group])


@dataclass(frozen=True, eq=False)
class EdgeAttribution:
    """Gradients at what every receiver reads, of one model."""

    model: Model
    weights: ReceiverWeights
    parallel: bool

    @classmethod
    def of(cls, model: Model) -> EdgeAttribution:
        """Prepare a model.

        Raises:
            PointError: its blocks normalise each sum, or it keeps its weights to itself.
        """
        with module_of(model) as (_, anatomy):
            if anatomy.kind == "post_norm":
                raise PointError(f"{model.ref} normalises each sum, so it has no edges: attribute nodes instead")
            parallel = anatomy.parallel
        return cls(model, ReceiverWeights.of(model), parallel)

    def receiver_gradients(
        self,
        tokens: Sequence[int],
        pair: Pair,
        metric: str,
        outputs: Mapping[Address, Float[Tensor, "step pos d_model"]],
        weights: Sequence[float],
    ) -> Float[Tensor, "receiver pos d_model"]:
        """Return the gradient of the metric at the stream that each receiver reads, before its norm; a weighted sum over steps.

        Args:
            outputs: what components write in place of the run's own, one run each; empty is the run as it is.
            weights: of each run.
        """
        layers = range(self.model.shape.n_layers)
        middle = () if self.parallel else ("resid_mid",)
        points = [
            Address(name, layer) for layer in layers for name in ("resid_pre", *middle, "q", "k", "v", "resid_post")
        ]
        clean = None
        if metric == "kl":
            clean = capture_values(self.model, pair.clean, {Address("logits")})[Address("logits")][-1].clone()
        writes = {address: line.to for address, line in outputs.items()}
        batch = torch.tensor([list(tokens)]).expand(len(weights), -1)
        values, gradients = values_and_gradients(
            self.model, batch, points, pair_metric(pair, metric, clean), writes=writes
        )
        scale = torch.tensor(weights, dtype=torch.float32).view(-1, 1, 1)
        own: list[Tensor] = []
        for layer in layers:
            of = {
                name: gradients[Address(name, layer)].float().cpu()
                for name in ("resid_pre", *middle, "q", "k", "v", "resid_post")
            }
            heads = self._through_norm(layer, values[Address("resid_pre", layer)], of)
            before = of["resid_pre"] - heads.sum(1) if self.parallel else of["resid_mid"]
            mlp = before - of["resid_post"]
            own += [*(heads * scale[..., None]).sum(0), (mlp * scale).sum(0)]
        last = gradients[Address("resid_post", layers[-1])].float().cpu()
        return torch.stack([*own, (last * scale).sum(0)])

    def _through_norm(
        self, layer: int, stream: Tensor, of: Mapping[str, Tensor]
    ) -> Float[Tensor, "step head pos d_model"]:
        """Return the gradients at the stream through each head's queries, keys and values, in the order of the receivers."""
        parts = [
            torch.einsum("bphd,hmd->bhpm", of[name], getattr(self.weights, name)[layer]) for name in ("q", "k", "v")
        ]
        after = torch.cat(parts, dim=1)
        with module_of(self.model) as (_, anatomy), torch.enable_grad():
            if not anatomy.map.path("ln1", layer):
                return after
            norm = anatomy.component("ln1", layer)
            x = stream[:, None].expand(-1, after.shape[1], -1, -1).clone().requires_grad_()
            flat = x.flatten(0, 1)
            (gradient,) = torch.autograd.grad((norm(flat).float() * after.flatten(0, 1).to(flat.device)).sum(), x)
        return gradient.float().cpu()

    def scores(
        self,
        gradients: Float[Tensor, "receiver pos d_model"],
        senders: Sequence[Sender],
        changes: Float[Tensor, "sender pos d_model"],
    ) -> Float[Tensor, "sender receiver"]:
        """Return change times gradient, summed over positions, of each edge; NaN where there is none."""
        table = torch.einsum("spd,rpd->sr", changes, gradients)
        return table.masked_fill(~self.connected(senders), torch.nan)

    def connected(self, senders: Sequence[Sender]) -> Tensor:
        """Return which edges there are, bool [sender, receiver]."""
        receivers = receivers_of(self.model.shape)
        return torch.tensor(
            [[reaches(sender, receiver, self.parallel) for receiver in receivers] for sender in senders]
        )

    def along(
        self, pair: Pair, direction: Direction, metric: str, line: Line | None
    ) -> Iterator[tuple[slice, Float[Tensor, "receiver pos d_model"]]]:
        """Yield (which senders, gradients at what every receiver reads), at the patched run where there is no line.

        Raises:
            PointError: prompts of two lengths, between which there is no line.
        """
        tokens, shape = pair.base(direction), self.model.shape
        if line is None:
            yield slice(None), self.receiver_gradients(tokens, pair, metric, {}, [1.0])
            return
        if len(pair.clean) != len(pair.corrupted):
            raise PointError(
                f"{pair.where}: prompts of {len(pair.clean)} and {len(pair.corrupted)} tokens have no line between them"
            )
        senders = {EMBED: slice(None)}
        if line.path == "activations":
            senders = {EMBED: slice(0, 1)}
            for layer in range(shape.n_layers):
                mlp = (layer + 1) * (shape.n_heads + 1)
                senders |= {Address("attn_out", layer): slice(mlp - shape.n_heads, mlp)}
                senders |= {Address("mlp_out", layer): slice(mlp, mlp + 1)}
        corrupted, clean = (capture_values(self.model, each, set(senders)) for each in (pair.corrupted, pair.clean))
        places, weights = line.places
        for address, rows in senders.items():
            start, end = corrupted[address], clean[address]
            at = torch.tensor(places, dtype=start.dtype, device=start.device).view(-1, 1, 1)
            yield rows, self.receiver_gradients(tokens, pair, metric, {address: start + at * (end - start)}, weights)
