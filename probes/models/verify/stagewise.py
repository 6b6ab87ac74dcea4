"""The evidence of a model whose blocks are in memory one at a time, gathered block by block."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.anatomy import Anatomy
from probes.blocks.single_block import SingleBlockRunner
from probes.hooks.attention_probabilities import Attended
from probes.hooks.forward_hooks import ForwardHooks, Stop
from probes.models.verify.recording import Call, Evidence, attention_of, checked_sites, record


@dataclass(eq=False)
class StagewiseEvidence:
    """Runs a check's tokens through one block after another, and keeps what passes the sites.

    The rows run in reverse, and are put right in what is kept: where the stages go on inside a plain forward, anything
    that a block leaves behind for the next beside the stream is that of other tokens, and shows.
    """

    module: nn.Module
    anatomy: Anatomy
    runner: SingleBlockRunner
    call: Call
    tokens: Int[Tensor, "batch pos"]
    _entering: Tensor | None = None
    _raw: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _attended: dict[int, Attended] | str = field(default_factory=dict)

    def stage(self, layer: int) -> None:
        """Run block `layer`, whose weights are in place, or what follows the blocks."""
        sites = {key: site for key, site in checked_sites(self.anatomy).items() if self._stage_of(key[0]) == layer}
        leaving: list[Tensor] = []

        def through(tokens: Tensor, hooks: ForwardHooks | None = None) -> Tensor:
            with self.runner.only(layer, self._entering) as left, suppress(Stop):
                self.call(tokens, hooks)
            leaving.append(left[0] if left else torch.empty(0))
            return leaving[-1]

        tokens = self.tokens.flip(0)
        self._raw |= {key: tensor.flip(0) for key, tensor in record(sites, through, tokens).items()}
        if layer < self.anatomy.n_layers and not isinstance(self._attended, str):
            of_layer = attention_of(self.module, self.anatomy, through, tokens, [layer])
            self._attended = of_layer if isinstance(of_layer, str) else self._attended | _in_order(of_layer)
        self._entering = leaving[0]

    def evidence(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Evidence:
        """Return what was kept of all stages, with the `logits` of a plain forward."""
        return Evidence(logits, self._raw, self._attended)

    def _stage_of(self, path: str) -> int:
        for layer in range(self.anatomy.n_layers):
            block = self.anatomy.map.path("block", layer)
            if path == block or path.startswith(f"{block}."):
                return layer
        return 0 if path == self.anatomy.map.path("embed") else self.anatomy.n_layers


def _in_order(attended: dict[int, Attended]) -> dict[int, Attended]:
    return {
        layer: Attended(a.query.flip(0), a.key.flip(0), a.value.flip(0), a.pattern.flip(0))
        for layer, a in attended.items()
    }
