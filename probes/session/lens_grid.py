"""Every layer's and position's reading of a run, compared with the same place of another run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.edits.programs import Step
from probes.lenses import logit
from probes.lenses.divergence import Distributions
from probes.lenses.protocol import Lens, LensRead
from probes.models.protocol import Model
from probes.session.open_prompt import Run

TOP = 5
"""Tokens kept of each cell."""
MOST_LOGITS = 100_000_000
"""Places times tokens of a clean run whose distributions are kept: 400 MB in float32."""


@dataclass(frozen=True, eq=False)
class LensGrid:
    """What the lens reads after each step, at each position."""

    steps: tuple[Step, ...]
    """[step], the blocks that each step runs."""
    top_ids: Int[Tensor, "step pos top"]
    top_logprobs: Float[Tensor, "step pos top"]
    """In nats."""
    entropy_bits: Float[Tensor, "step pos"]
    norms: Float[Tensor, "step pos"]
    """Length of the residual stream."""
    watched: Float[Tensor, "step pos token"]
    """Log-probabilities of the watched tokens, in nats."""
    ranks: Int[Tensor, "step pos token"]
    """How many tokens are more probable than each watched one."""
    kl: Float[Tensor, "step pos"]
    """KL(reference's cell || this cell), in nats; 0 without a reference, or where the block did not run in it."""
    changed: Bool[Tensor, "step pos"]
    """Where the residual stream is not the reference's, to the last bit."""


@torch.no_grad()
def read_grid(
    model: Model,
    run: Run,
    ids: Sequence[int],
    lens: Lens,
    reference: tuple[Run, LensGrid] | None = None,
    known: Distributions | None = None,
) -> LensGrid:
    """Read a run through a lens.

    Args:
        model: the model.
        run: what is read.
        ids: tokens that are watched.
        lens: how rows are read.
        reference: a run to compare with, and its grid; cells that are the same are taken from it.
        known: what the lens reads in it, where that is known; see `read_and_keep`.
    """
    rows = run.streams[1:]
    steps, positions = rows.shape[:2]
    same_step = {step: i for i, step in enumerate(reference[0].steps)} if reference else {}
    partner = torch.tensor([same_step.get(step, -1) for step in run.steps], dtype=torch.long)
    changed = torch.ones(steps, positions, dtype=torch.bool)
    if reference:
        has = partner >= 0
        changed[has] = (rows[has] != reference[0].streams[1:][partner[has]]).any(-1).cpu()
    grid = _empty(run.steps, positions, len(ids), changed)
    if reference:
        whole = reference[1]
        for name in ("top_ids", "top_logprobs", "entropy_bits", "norms", "watched", "ranks"):
            getattr(grid, name)[partner >= 0] = getattr(whole, name)[partner[partner >= 0]]
    at = changed.nonzero()
    if not len(at):
        return grid
    step, position = at.T
    stream = torch.cat(
        [lens.readable(rows[s][changed[s]].float(), max(run.steps[s])) for s in range(steps) if changed[s].any()]
    )
    compared = (partner[step] >= 0) if reference else torch.zeros(len(step), dtype=torch.bool)
    # A step that the reference does not have is compared with its first row, and that number left out.
    row_of = compared.cumsum(0).sub(1).clamp_min(0)
    before: Tensor | Distributions | None = None
    if reference and bool(compared.any()):
        if known is None:
            streams = reference[0].streams[1:].float()
            moved = [s for s in range(steps) if partner[s] >= 0 and changed[s].any()]
            places = [(streams[partner[s]][changed[s]], int(partner[s])) for s in moved]
            before = torch.cat([lens.readable(part, max(reference[0].steps[s])) for part, s in places])
        else:
            before, row_of = known, (partner[step] * positions + position).clamp_min(0)
    read = logit.read(
        stream, model.unembedding(), ids=torch.tensor(list(ids), dtype=torch.long), top_k=TOP, reference=before,
        reference_of=None if before is None else row_of, ranks=bool(ids),
    )  # fmt: skip
    _fill(grid, read, rows, (step, position))
    if before is not None:
        grid.kl[step[compared], position[compared]] = read.kl.cpu()[compared]
    return grid


@torch.no_grad()
def read_and_keep(model: Model, run: Run, ids: Sequence[int], lens: Lens) -> tuple[LensGrid, Distributions | None]:
    """Return what `read_grid` does of a run, and its distributions, to compare with; None where they are more than `MOST_LOGITS`."""
    rows, unembedding = run.streams[1:], model.unembedding()
    if rows.shape[0] * rows.shape[1] * unembedding.weight.shape[0] > MOST_LOGITS:
        return read_grid(model, run, ids, lens), None
    readable = torch.cat([lens.readable(r.float(), max(step)) for r, step in zip(rows, run.steps, strict=True)])
    watched = torch.tensor(list(ids), dtype=torch.long)
    read, known = logit.read_whole(readable, unembedding, ids=watched, top_k=TOP, ranks=bool(ids))
    changed = torch.ones(rows.shape[:2], dtype=torch.bool)
    grid = _empty(run.steps, rows.shape[1], len(ids), changed)
    step, position = changed.nonzero().T
    _fill(grid, read, rows, (step, position))
    return grid, known


def _fill(grid: LensGrid, read: LensRead, rows: Tensor, at: tuple[Tensor, Tensor]) -> None:
    """Write what was read of some places into a grid."""
    step, position = at
    grid.top_ids[step, position], grid.top_logprobs[step, position] = read.top_ids.cpu(), read.top_logprobs.cpu()
    grid.entropy_bits[step, position] = read.entropy_bits.cpu()
    grid.norms[step, position] = rows[step, position].float().norm(dim=-1).cpu()
    if read.logprobs.shape[1]:
        grid.watched[step, position], grid.ranks[step, position] = read.logprobs.cpu(), read.ranks.cpu()


def _empty(steps: tuple[Step, ...], positions: int, tokens: int, changed: Tensor) -> LensGrid:
    place = (len(steps), positions)
    return LensGrid(
        steps,
        torch.zeros(*place, TOP, dtype=torch.long),
        torch.zeros(*place, TOP),
        torch.zeros(place),
        torch.zeros(place),
        torch.zeros(*place, tokens),
        torch.zeros(*place, tokens, dtype=torch.long),
        torch.zeros(place),
        changed,
    )
