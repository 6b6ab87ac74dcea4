"""A clean run in which what nodes write can be replaced: by the corrupted run's, by a mean over references, or by zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from analyses.causal_patching.grid import capture_values
from analyses.causal_patching.metrics import RowReader
from analyses.causal_patching.opened import first_patched, resumable
from analyses.causal_patching.pairs import Pair
from analyses.causal_patching.running import Run
from probes.blocks.cached_prompt import CachedPrompt
from probes.errors import PointError, PromptError
from probes.models.protocol import Shape
from probes.points import Address

AblationKind = Literal["counterfactual", "mean", "zero"]
EMBEDDED = Address("resid_pre", 0)


def node_points(shape: Shape) -> set[Address]:
    """Return the points at which the embedding, heads and MLPs say what they write."""
    return {EMBEDDED} | {Address(name, layer) for name in ("z", "mlp_out") for layer in range(shape.n_layers)}


@dataclass(frozen=True, eq=False)
class Ablated:
    """A clean run kept open from the first position at which it can differ from its baseline."""

    base: CachedPrompt
    given: Mapping[Address, Tensor]
    """`node_points` of the baseline from that position on, [pos, ...]."""
    reader: RowReader
    shape: Shape


def ablated(run: Run, pair: Pair, kind: AblationKind) -> Ablated:
    """Open a pair's clean run beside its baseline.

    `counterfactual` is the pair's corrupted run, `mean` the mean over the pair's references, position by position, `zero`
    nothing at all.

    Raises:
        PointError: a model that cannot be resumed from inside the stack.
        PromptError: a mean of a pair that has no references.
    """
    model = run.model
    if not resumable(model):
        raise PointError(f"{model.ref} cannot be resumed from inside the stack, so it has no circuits here")
    start = _start(pair, kind)
    base = CachedPrompt(model, pair.clean, start)
    reader = RowReader(model.unembedding(), pair, run.metrics[:1], base.entering[-1][-1])
    return Ablated(base, _given(run, pair, kind, start), reader, model.shape)


def _start(pair: Pair, kind: AblationKind) -> int:
    if kind == "counterfactual":
        return first_patched(pair, "noise")
    if kind == "zero":
        return 0
    if not pair.references:
        raise PromptError(
            f'{pair.where}: a mean needs "references", prompts of the form and length of the clean one in which the answer is '
            "not determined: give them, or --ablation counterfactual"
        )
    columns = zip(pair.clean, *pair.references, strict=True)
    return next((p for p, tokens in enumerate(columns) if len(set(tokens)) > 1), len(pair.clean) - 1)


def _given(run: Run, pair: Pair, kind: AblationKind, start: int) -> dict[Address, Tensor]:
    points = node_points(run.model.shape)
    if kind == "mean":
        sums: dict[Address, Tensor] = {}
        for tokens in pair.references:
            for address, values in capture_values(run.model, tokens, points).items():
                sums[address] = sums[address] + values if address in sums else values
        return {address: (total / len(pair.references))[start:] for address, total in sums.items()}
    clean = capture_values(run.model, pair.clean, points)
    if kind == "zero":
        return {address: torch.zeros_like(values) for address, values in clean.items()}
    positions = pair.sources("noise")
    corrupted = capture_values(run.model, pair.corrupted, points)
    # A position that corresponds to none of the corrupted prompt stays as it is.
    patched = [position for position in positions if position >= start]
    given = {address: values.clone() for address, values in clean.items()}
    for address, values in given.items():
        values[patched] = corrupted[address][[positions[position] for position in patched]]
    return {address: values[start:] for address, values in given.items()}
