"""The grid of back-patches of one prompt, and the controls that share its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.back_patching.cases import Case
from analyses.interventions import swept
from analyses.tokens import token_text
from probes.blocks.cached_prompt import ROWS, CachedPrompt
from probes.blocks.together import together
from probes.lenses import logit
from probes.models.protocol import Model

Cell = tuple[int, int]
"""(source layer, target layer); target -1 is the embedding."""

Variant = Literal["back_patch", "forward", "other_query", "noise"]
Try = tuple[Sequence[Cell], Float[Tensor, "layer d_model"]]
"""Cells, and the rows of every layer that they bring in from."""


def cells_of(n_layers: int, which: str, stride: int, include_embedding: bool, layers: Sequence[int] = ()) -> list[Cell]:
    """Return the cells of the grid over every `stride`-th layer or over `layers`.

    `upper` has those whose source is above their target, `full` has all.

    Raises:
        OptionError: a layer that the model does not have.
    """
    # Strided sources end in the last layer, from which the most is brought back.
    sources = swept(n_layers, layers, 1) if layers else range(stride - 1, n_layers, stride)
    targets = [*([-1] if include_embedding else []), *swept(n_layers, layers, stride)]
    return [(s, t) for s in sources for t in targets if which == "full" or s > t]


def mirrored(cells: Sequence[Cell], n_layers: int) -> list[Cell]:
    """Return as many forward patches as there are back-patches: source and target exchanged."""
    return [(max(t, 0), s) for s, t in cells if s > t]


@dataclass(frozen=True, eq=False)
class Patched:
    """The next token of a prompt under each cell."""

    cells: tuple[Cell, ...]
    top: Tensor
    """[cells], the most probable next token."""
    logprob: Tensor
    """[cells], of the answer (its likeliest first token), in nats."""
    wrong: Tensor
    """[cells], whether the most probable token is another question's answer."""

    def cut(self, part: slice) -> Patched:
        """Return some of the cells."""
        return Patched(self.cells[part], self.top[part], self.logprob[part], self.wrong[part])

    def success(self, answers: frozenset[int]) -> NDArray[np.bool_]:
        """Return whether the most probable token is one of `answers`, [cells]."""
        return np.isin(self.top.numpy(), list(answers))


@dataclass(frozen=True, eq=False)
class OpenPrompt:
    """A prompt that was run once and can be run on from one of its positions."""

    case: Case
    name: str
    base: CachedPrompt

    @classmethod
    def at(cls, model: Model, case: Case, names: Sequence[str]) -> dict[str, OpenPrompt]:
        """Run the case's prompt once and leave it open at each of these positions."""
        base = CachedPrompt(model, case.tokens, min(case.positions[name] for name in names))
        return {name: cls(case, name, base.narrowed(case.positions[name])) for name in names}

    def sources(self) -> Float[Tensor, "layer d_model"]:
        """Return what leaves each block at the position."""
        return torch.stack([entering[0] for entering in self.base.entering[1:]])

    def rows(
        self, cells: Sequence[Cell], brought: Float[Tensor, "cell d_model"], rescale: bool
    ) -> Float[Tensor, "cell suffix d_model"]:
        """Return what enters the block after each cell's target, from the position to the end of the prompt."""
        entering = torch.stack(self.base.entering[:])
        hidden = entering[torch.tensor([t + 1 for _, t in cells])].clone()
        if rescale:
            norm = hidden[:, 0].float().norm(dim=-1, keepdim=True)
            brought = (brought.float() * norm / brought.float().norm(dim=-1, keepdim=True)).to(brought.dtype)
        hidden[:, 0] = brought
        return hidden

    def patch(self, tries: Sequence[Try], other: frozenset[int], rescale: bool = False) -> list[Patched]:
        """Read the prompt's next token under every cell of each try; `other` is another question's answer.

        Cells of all tries run together, which costs less than one try after the other.
        """
        cells = [cell for some, _ in tries for cell in some]
        brought = torch.cat([brought_in(*each) for each in tries])

        def ends(part: Sequence[int]) -> Tensor:
            some = [cells[i] for i in part]
            return self.base.resume([t + 1 for _, t in some], self.rows(some, brought[list(part)], rescale)).last

        # Neighbouring targets run together, so that each part skips the blocks that none of it needs.
        order = sorted(range(len(cells)), key=lambda i: cells[i][1])
        parts = [order[i : i + ROWS] for i in range(0, len(order), ROWS)]
        last = torch.empty_like(brought)
        last[order] = torch.cat(together(self.base.model, [partial(ends, part) for part in parts]))
        read, until = self._read(cells, last, other), np.cumsum([len(some) for some, _ in tries]).tolist()
        return [read.cut(slice(*ends)) for ends in pairwise([0, *until])]

    def baseline(self) -> Patched:
        """Read the next token of the unpatched prompt, as a grid of one cell."""
        return self._read([(0, 0)], self.base.entering[-1][-1:], frozenset())

    def _read(self, cells: Sequence[Cell], last: Tensor, other: frozenset[int]) -> Patched:
        ids = torch.tensor(sorted(self.case.answers))
        read = logit.read(last, self.base.model.unembedding(), ids=ids, top_k=1)
        top = read.top_ids[:, 0].cpu()
        wrong = torch.isin(top, torch.tensor(sorted(other - self.case.answers), dtype=torch.long))
        return Patched(tuple(cells), top, read.logprobs.amax(-1).cpu(), wrong)

    def continue_cells(
        self, cells: Sequence[Cell], sources: Tensor, first: Tensor, n: int, rescale: bool
    ) -> list[list[int]]:
        """Write greedy continuations of `n` tokens under some cells, their first tokens given."""
        hidden = self.rows(cells, brought_in(cells, sources), rescale)
        resumed = self.base.resume([t + 1 for _, t in cells], hidden, keep=True)
        return self.base.write(resumed, first, n)


def brought_in(cells: Sequence[Cell], sources: Float[Tensor, "layer d_model"]) -> Float[Tensor, "cell d_model"]:
    """Return the row that each cell puts in place of another."""
    return sources[torch.tensor([s for s, _ in cells])]


def noise_like(sources: Float[Tensor, "layer d_model"], seed: int) -> Float[Tensor, "layer d_model"]:
    """Draw Gaussian rows with the norms of `sources`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(sources.shape, generator=generator).to(sources.device)
    return (noise * sources.float().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)).to(sources.dtype)


def frame(
    model: Model, opened: OpenPrompt, variant: Variant, patched: Patched, success: np.ndarray, baseline: float
) -> pd.DataFrame:
    """Return a table with one row per cell."""
    sources, targets = zip(*patched.cells, strict=True)
    return pd.DataFrame(
        {
            "prompt": opened.case.prompt,
            "position": opened.base.start,
            "position_name": opened.name,
            "set": opened.case.set,
            "variant": variant,
            "source_layer": sources,
            "target_layer": targets,
            "token_id": patched.top.numpy(),
            "token": [token_text(model, int(token)) for token in patched.top],
            "answer_logprob": patched.logprob.numpy(),
            "baseline_logprob": baseline,
            "success": success,
            "wrong_answer": patched.wrong.numpy(),
        }
    )
