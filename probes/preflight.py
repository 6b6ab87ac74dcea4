"""What a capture will cost, before it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from probes.capture import PACKET_BYTES, axis_sizes, batch_tokens_of, row_size
from probes.models.base import Model, Shape
from probes.needs import CapturePlan


@dataclass(frozen=True)
class Estimate:
    """The cost of a plan; seconds and memory are estimates, the rest is exact."""

    forwards: int
    tokens: int
    rows: int
    bytes: int
    held: int
    seconds: float
    peak_bytes: int

    def lines(self) -> list[str]:
        """The estimate as a user reads it."""
        return [
            f"forwards           {self.forwards:,} prompts, {self.tokens:,} tokens",
            f"rows to capture    {self.rows:,} ({human(self.bytes)})",
            f"already held       {self.held:,} (prompt, feature) pairs",
            f"estimated time     {self.seconds:.1f} s",
            f"estimated memory   {human(self.peak_bytes)} at the peak",
        ]


def human(size: float) -> str:
    """A size in bytes with a unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def block_parameters(shape: Shape) -> int:
    """Weights of one block's attention and gated MLP."""
    attention = shape.d_model * shape.d_head * (2 * shape.n_heads + 2 * shape.n_kv_heads)
    return attention + 3 * shape.d_model * shape.d_mlp


def measured_speed(model: Model, seconds: float = 0.3) -> float:
    """Multiply-adds per second of this device on this model's MLP shape, measured for about `seconds`."""
    dtype = getattr(torch, model.context.dtype)
    left = torch.randn(256, model.shape.d_model, device=model.device).to(dtype)
    right = torch.randn(model.shape.d_model, model.shape.d_mlp, device=model.device).to(dtype)
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or done < 2:
        (left @ right).float().sum().item()
        done += 1
    return done * left.numel() * model.shape.d_mlp / elapsed


def estimate(model: Model, plans: Sequence[CapturePlan]) -> Estimate:
    """The cost of `plans` on this model and this machine."""
    width, size, shape = axis_sizes(model), row_size(model), model.shape
    tokens, captured = sum(plan.tokens for plan in plans), sum(plan.bytes(width, size) for plan in plans)
    block = block_parameters(shape)
    weights = (shape.n_layers * block + 2 * shape.d_vocab * shape.d_model) * size
    activations = batch_tokens_of(model) * size * (4 * shape.d_model + 3 * shape.d_mlp)
    return Estimate(
        forwards=sum(plan.forwards for plan in plans),
        tokens=tokens,
        rows=sum(plan.rows for plan in plans),
        bytes=captured,
        held=sum(plan.held for plan in plans),
        seconds=tokens * shape.n_layers * block / measured_speed(model) if tokens else 0.0,
        peak_bytes=weights + activations + min(captured, 3 * PACKET_BYTES),
    )
