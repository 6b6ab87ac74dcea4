"""Direct logit attribution of every head against the effect that leaving the head out directly has.

Attribution holds the final norm's divisor at its clean value; the effect computes it anew (Baroni et al. 2025,
arXiv 2507.02559). The target is the token that comes next. Everything in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.norm_removal.measured import Measured
from analyses.results.per_prompt import PerPrompt, resampled
from analyses.results.statistics import percentiles
from probes.anatomy.constant_norm import ConstantNorm
from probes.edits.weights import matrix
from probes.norms import NormParts, parts_of
from probes.points import Address


@dataclass(frozen=True, eq=False)
class ReadOut:
    """The final norm and the unembedding's rows of one target a row, in float64, before any softcap."""

    gain: Tensor
    """[d_model] or a scalar."""
    bias: Tensor
    """[d_model] or a scalar."""
    centred: bool
    eps: float | None
    """None where the norm's divisor is constant, and so in the gain."""
    weight: Tensor
    """[rows, d_model], of each row's target."""
    offset: Tensor
    """[rows], the unembedding's bias of the target."""

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest 1"]:
        """Return the norm's divisor."""
        if self.eps is None:
            return x.new_ones(*x.shape[:-1], 1)
        return (self._centre(x).square().mean(-1, keepdim=True) + self.eps).sqrt()

    def logit(self, stream: Float[Tensor, "row *rest d_model"]) -> Float[Tensor, row * rest]:
        """Return each row's target logit of a stream."""
        normed = self._centre(stream) / self.scale(stream) * self.gain + self.bias
        return self._dot(normed) + self._spread(self.offset, stream)

    def attribution(self, component: Tensor, scale: Tensor) -> Tensor:
        """Return what components [rows, ..., d_model] of a stream add to the target logit at a given divisor, [rows, ...].

        Over components that sum to the stream they sum to the logit less `constant`.
        """
        return self._dot(self._centre(component) / scale * self.gain)

    def constant(self) -> Float[Tensor, " row"]:
        """Return the part of the target logit that comes from the norm's and the unembedding's bias, not from components."""
        return self._dot(self.bias.expand_as(self.weight)) + self.offset

    def effect(
        self, stream: Float[Tensor, "row d_model"], component: Float[Tensor, "row n d_model"]
    ) -> Float[Tensor, "row n"]:
        """Return the target logit less that of the stream without each component."""
        without = stream[:, None] - component
        if self.eps is None:
            return self.attribution(component, component.new_ones(()))
        return self.logit(stream)[:, None] - self.logit(without)

    def _dot(self, x: Tensor) -> Tensor:
        return torch.einsum("r...d,rd->r...", x, self.weight)

    def _spread(self, values: Tensor, like: Tensor) -> Tensor:
        return values.view(-1, *[1] * (like.ndim - 2))


def read_out(measured: Measured, targets: Int[Tensor, " rows"]) -> ReadOut:
    """Return the read-out of targets [rows]."""
    own = measured.unembedding
    weight = own.weight[targets.to(own.weight.device)].double()
    offset = torch.zeros(len(targets), dtype=torch.float64, device=weight.device)
    if own.bias is not None:
        offset = own.bias[targets.to(own.bias.device)].double()
    path = measured.anatomy.map.path("ln_final")
    one, zero = weight.new_ones(()), weight.new_zeros(())
    if path is None:
        return ReadOut(one, zero, False, None, weight, offset)
    norm = measured.anatomy.map.module.get_submodule(path)
    if isinstance(norm, torch.nn.Identity):
        return ReadOut(one, zero, False, None, weight, offset)
    if isinstance(norm, ConstantNorm):
        bias = zero if norm.bias is None else norm.bias.detach().double()
        return ReadOut(norm.weight.detach().double(), bias, norm.centred, None, weight, offset)
    parts = parts_of(norm, weight.shape[1], float(measured.anatomy.map.sizes.eps))
    bias = zero if parts.bias is None else parts.bias.detach().double()
    return ReadOut(parts.gain.detach().double().to(weight.device), bias, parts.centred, parts.eps, weight, offset)


class HeadOutputs:
    """The map from z to what each head of a layer adds to the stream, value biases included.

    Where what attention adds is normalised first, that norm's divisor is held at its clean value.
    """

    def __init__(self, measured: Measured, layer: int) -> None:
        anatomy = measured.anatomy
        shape = measured.model.shape
        projection = anatomy.component("attn.o", layer)
        weight, rows = matrix(projection, shape.n_heads * shape.d_head)
        inputs_first = (weight if rows else weight.T).detach().double()
        self.weight = inputs_first.view(shape.n_heads, shape.d_head, -1)
        bias = getattr(projection, "bias", None)
        self.bias = bias.detach().double() if isinstance(bias, Tensor) else None
        path = anatomy.map.path("ln1_post", layer)
        self.post = anatomy.map.module.get_submodule(path) if path else None
        self.parts: NormParts | None = None
        if self.post is not None and not isinstance(self.post, ConstantNorm | torch.nn.Identity):
            self.parts = parts_of(self.post, inputs_first.shape[1], float(anatomy.map.sizes.eps))

    @torch.no_grad()
    def __call__(self, z: Float[Tensor, "row head d_head"]) -> Float[Tensor, "row head d_model"]:
        """Return what each head adds, float64."""
        out = torch.einsum("rhk,hkd->rhd", z.double().to(self.weight.device), self.weight)
        if self.parts is not None:
            whole = out.sum(1, keepdim=True)
            whole = whole if self.bias is None else whole + self.bias
            scale = (whole.square().mean(-1, keepdim=True) + self.parts.eps).sqrt()
            return out / scale * self.parts.gain.double().to(out.device)
        if isinstance(self.post, ConstantNorm):
            return out * self.post.weight.double()
        return out


@torch.no_grad()
def attribution_tables(measured: Measured, layers: Sequence[int], seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (`attribution_error` per head of `layers`, `attribution_total` over all of them), with intervals over prompts.

    nmae is mean|attribution - effect| / mean|effect| over the counted positions, the target being the next token.
    """
    heads = measured.model.shape.n_heads
    n = len(layers) * heads
    wrong, size, signed = measured.column(n), measured.column(n), measured.column(n)
    for part in measured.parts():
        if not part.counted.any():
            continue
        stream = part.stream[-1][part.counted].double()
        out = read_out(measured, part.targets)
        scale = out.scale(stream)[:, None]
        for index, layer in enumerate(layers):
            z = rows_of(measured, Address("z", layer), part.batch.indices, part.counted)
            written = HeadOutputs(measured, layer)(z)
            effect, attribution = out.effect(stream, written), out.attribution(written, scale)
            for head in range(heads):
                column = index * heads + head
                wrong.add(column, part.prompts, (attribution - effect)[:, head].abs())
                size.add(column, part.prompts, effect[:, head].abs())
                signed.add(column, part.prompts, effect[:, head])
    return _tables(wrong, size, signed, layers, seed)


def rows_of(measured: Measured, address: Address, prompts: Sequence[int], counted: Tensor) -> Tensor:
    """Return the stored rows of the counted positions, [n, ...], in the order of `counted` [batch, pos]."""
    stored = measured.activations.get(address)
    device = measured.model.device
    return torch.cat([stored[i][counted[row, : len(stored[i])]] for row, i in enumerate(prompts)]).to(device)


def _tables(
    wrong: PerPrompt, size: PerPrompt, signed: PerPrompt, layers: Sequence[int], seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    errors, sizes = resampled(wrong, seed), resampled(size, seed)
    heads = wrong.sums.shape[1] // len(layers)
    low, high = percentiles(errors / sizes, wrong.prompts())
    table = pd.DataFrame(
        {
            "layer": np.repeat(layers, heads),
            "head": np.tile(np.arange(heads), len(layers)),
            "nmae": (wrong.mean() / size.mean()).numpy(),
            "ci_low": low,
            "ci_high": high,
            "effect": signed.mean().numpy(),
            "effect_size": size.mean().numpy(),
            "tokens": int(wrong.counts[:, 0].sum()),
        }
    )
    total_low, total_high = percentiles(errors.sum(1) / sizes.sum(1), wrong.prompts().max())
    total = {
        "nmae": float(wrong.mean().sum() / size.mean().sum()),
        "ci_low": float(total_low),
        "ci_high": float(total_high),
        "heads": len(table),
        "tokens": int(wrong.counts[:, 0].sum()),
    }
    return table, pd.DataFrame([total])
