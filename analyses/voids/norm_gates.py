"""The void rule as an edit: blocks judged by the norm of their step, or skipped, while they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.edits import Edit
from probes.models.protocol import Shape, Write
from probes.points import Address

Delta = Literal["norm_diff", "rel_norm_diff", "norm_of_diff", "cosine"]
"""How a block's step is measured: ||h'||-||h||, (||h'||-||h||)/||h||, ||h'-h||, or 1-cos(h', h)."""


def step_size(
    before: Float[Tensor, "*rows d_model"], after: Float[Tensor, "*rows d_model"], delta: Delta
) -> Float[Tensor, "*rows"]:
    """The size of the step from `before` to `after`, [..., d_model] -> [...], in float32."""
    h, g = before.float(), after.float()
    if delta == "norm_of_diff":
        return torch.linalg.vector_norm(g - h, dim=-1)
    if delta == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(g, h, dim=-1)
    before_norm = torch.linalg.vector_norm(h, dim=-1)
    change = torch.linalg.vector_norm(g, dim=-1) - before_norm
    return change / before_norm if delta == "rel_norm_diff" else change


RELEASED_NAMES = {"early_exit": "readout", "skip": "mask"}
"""What a mode is called in the keys of stores and in the column `variant`, as they have always been."""


class RunningGate:
    """The L2 rule along depth: a block is active iff its step reaches alpha times the range of earlier steps.

    Shemiranifar 2025, "Void in Language Models" (arXiv 2505.14467), as released.
    """

    def __init__(self, alpha: float | Tensor, first_layers: Literal["released", "always_active"] = "released") -> None:
        self.alpha, self.first_layers = alpha, first_layers
        self.layer = 0
        self.high = self.low = torch.zeros(())

    def step(
        self, size: Float[Tensor, "*rows"], threshold0: Float[Tensor, "*rows"] | None = None
    ) -> tuple[Bool[Tensor, "*rows"], Float[Tensor, "*rows"]]:
        """(active, threshold) of the next block, each of `size`'s shape; `threshold0` replaces block 0's zero."""
        if self.layer == 0:
            threshold = torch.zeros_like(size) if threshold0 is None else threshold0
            self.high = self.low = size
        else:
            threshold = self.alpha * (self.high - self.low)
            self.high, self.low = torch.maximum(self.high, size), torch.minimum(self.low, size)
        active = size >= threshold
        if self.first_layers == "always_active" and self.layer < 2:
            active = torch.ones_like(active)
        self.layer += 1
        return active, threshold


@dataclass
class GateRecord:
    """What a gate did in one forward, one entry per block, each [batch, pos]."""

    norms: list[Tensor]
    steps: list[Tensor]
    thresholds: list[Tensor]
    active: list[Tensor]


@dataclass(frozen=True)
class NormGate(Edit):
    """Blocks judged by the L2 rule while they run.

    `skip` gives a void block's input to the next block, per token, so thresholds follow the masked stream (the step
    a void block would have made still enters the range). `early_exit` changes the last block's output only: to the
    output of the last active block, or the embedding where none is.
    """

    alpha: float
    mode: Literal["skip", "early_exit"] = "skip"
    delta: Delta = "norm_diff"
    first_layers: Literal["released", "always_active"] = "released"

    def text(self) -> str:
        """The edit as a store's key names it."""
        return f"norm_gate({self.alpha!r},{RELEASED_NAMES[self.mode]},{self.delta},{self.first_layers})"

    def writes(self, shape: Shape, lengths: Sequence[int] | None = None) -> Mapping[Address, Write]:
        """Fresh writes for one forward; see `recorded` to also learn what the gate did."""
        return self.recorded(shape)[0]

    def recorded(self, shape: Shape) -> tuple[Mapping[Address, Write], GateRecord]:
        """Fresh writes for one forward, and the record they will fill."""
        record = GateRecord([], [], [], [])
        gate = RunningGate(self.alpha, self.first_layers)
        stream: dict[str, Tensor] = {}

        def enter(hidden: Tensor) -> Tensor:
            stream["in"] = stream["kept"] = hidden
            record.norms.append(hidden.float().norm(dim=-1))
            return hidden

        def leave(hidden: Tensor) -> Tensor:
            size = step_size(stream["in"], hidden, self.delta)
            active, threshold = gate.step(size)
            stream["kept"] = torch.where(active[..., None], hidden, stream["kept"])
            passed = stream["kept"] if self.mode == "skip" or gate.layer == shape.n_layers else hidden
            stream["in"] = passed
            for entries, value in zip(
                (record.norms, record.steps, record.thresholds, record.active),
                (passed.float().norm(dim=-1), size, threshold, active),
                strict=True,
            ):
                entries.append(value)
            return passed

        writes: dict[Address, Write] = {Address("resid_post", layer): leave for layer in range(shape.n_layers)}
        return {Address("resid_pre", 0): enter, **writes}, record


@dataclass(frozen=True)
class RandomGate(Edit):
    """Control for `NormGate(skip)`: each block is skipped per token at a given rate, independent of the stream."""

    void_rates: tuple[float, ...]
    """Per layer, the share of tokens for which the block is skipped."""
    seed: int = 0

    def text(self) -> str:
        """The edit as a store's key names it."""
        return f"random_gate({','.join(f'{rate:.6g}' for rate in self.void_rates)},{self.seed})"

    def writes(self, shape: Shape, lengths: Sequence[int] | None = None) -> Mapping[Address, Write]:
        """Fresh writes for one forward; raises ValueError where the rates are not one per layer."""
        if len(self.void_rates) != shape.n_layers:
            raise ValueError(f"{len(self.void_rates)} void rates for {shape.n_layers} layers")
        generator = torch.Generator().manual_seed(self.seed)
        stream: dict[str, Tensor] = {}

        def enter(hidden: Tensor) -> Tensor:
            stream["in"] = hidden
            return hidden

        def leave(rate: float) -> Write:
            def write(hidden: Tensor) -> Tensor:
                void = torch.rand(hidden.shape[:-1], generator=generator).to(hidden.device) < rate
                stream["in"] = torch.where(void[..., None], stream["in"], hidden)
                return stream["in"]

            return write

        blocks = {Address("resid_post", layer): leave(rate) for layer, rate in enumerate(self.void_rates)}
        return {Address("resid_pre", 0): enter, **blocks}
