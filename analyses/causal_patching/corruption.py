"""What makes the corrupted run of a pair: other tokens, or noise on the embeddings of its subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.causal_patching.pairs import Pair
from probes.blocks.rerouting import module_of
from probes.errors import PointError
from probes.models.protocol import Model, Write
from probes.points import Address

EMBED = Address("embed")
SigmaOver = Literal["subjects", "prompts", "vocabulary"]


@dataclass(frozen=True, eq=False)
class Noise:
    """Gaussian noise on token embeddings, as causal tracing adds it (Meng et al. 2022, "ROME", arXiv 2202.05262)."""

    deviation: float
    """Standard deviation of what is added to each element."""
    samples: int
    """Draws for each pair, whose metrics are averaged."""
    seed: int

    def added(self, pair: Pair, width: int) -> Float[Tensor, "sample span d_model"]:
        """Draw what is added to the subject's embeddings; the same seed and pair draw the same."""
        assert pair.span is not None
        seed = int(np.random.SeedSequence((self.seed, pair.index)).generate_state(1)[0])
        size = (self.samples, pair.span[1] - pair.span[0], width)
        return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * self.deviation


def embedding_writes(pair: Pair, added: Float[Tensor, "span d_model"]) -> dict[Address, Write]:
    """Return the write that adds noise to the embeddings of the subject."""
    assert pair.span is not None
    first, last = pair.span

    def write(rows: Tensor) -> Tensor:
        out = rows.clone()
        out[:, first:last] += added.to(out)
        return out

    return {EMBED: write}


@torch.no_grad()
def element_deviation(model: Model, pairs: Sequence[Pair], over: SigmaOver) -> float:
    """Return the standard deviation of all elements of embedding rows.

    Args:
        over: the rows of the subjects' tokens, of all prompts' tokens, or of the whole vocabulary.

    Raises:
        PointError: the backend keeps its module to itself.
    """
    if over == "vocabulary":
        with module_of(model) as (_, anatomy):
            weight = anatomy.component("embed").weight
            if not isinstance(weight, Tensor):
                raise PointError(f"{model.ref} has no one table of embeddings: give --sigma-over subjects")
            return float(weight.float().std())
    tokens = [pair.clean if over == "prompts" or pair.span is None else pair.clean[slice(*pair.span)] for pair in pairs]
    rows: list[Tensor] = []
    for sequence in tokens:
        model.run(torch.tensor([list(sequence)]), {EMBED: lambda t: rows.append(t[0].float().clone())})
    return float(torch.cat(rows).std())


def noisy_runs(pair: Pair, noise: Noise | None, width: int) -> list[Tensor | None]:
    """Return what is added in each corrupted run of a pair; one run of None where its tokens differ."""
    return [None] if noise is None else list(noise.added(pair, width))
