"""The Jacobian lens: rows carried to the last layer by the mean derivative of what they lead to.

Gurnee et al. 2026, "Verbalizable Representations Form a Global Workspace in Language Models", arXiv 2607.15495.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from probes.errors import OptionError
from probes.lenses.card import LensCard

POOLED = frozenset({"corpus", "options", "quality", "tensors", "parents"})
"""Fields in which lenses that are merged may differ; of the options, none but the count of texts may."""


@dataclass(frozen=True, eq=False)
class JacobianLens:
    """The mean Jacobian of the target layer's rows with respect to each layer's: [d_model out, d_model in]."""

    card: LensCard
    maps: Mapping[int, Float[Tensor, "d_model d_model"]]

    def readable(self, rows: Float[Tensor, "row d_model"], layer: int) -> Float[Tensor, "row d_model"]:
        """Carry rows of a layer to the target layer; see `Lens.readable`."""
        if layer >= self.card.target:
            return rows
        if layer not in self.maps:
            legal = ", ".join(map(str, sorted(self.maps)))
            raise OptionError(f"this Jacobian lens was not fitted for layer {layer}: it has {legal}")
        rows = rows.float()
        return rows @ self.maps[layer].to(rows).T

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the file format, by name."""
        return {f"jacobian.{layer}": matrix for layer, matrix in self.maps.items()}

    @classmethod
    def of(cls, card: LensCard, tensors: Mapping[str, Tensor]) -> JacobianLens:
        """Return the lens of a file's tensors."""
        return cls(card, {int(name.partition(".")[2]): matrix.float() for name, matrix in tensors.items()})


def merged(lenses: Sequence[JacobianLens]) -> JacobianLens:
    """Return the lens of all texts of lenses that were fitted on disjoint texts, each weighed by its number of texts.

    Raises:
        OptionError: lenses of different models, methods or options, or with a text in common.
    """
    first = lenses[0].card
    for lens in lenses[1:]:
        differing = [name for name in vars(first) if name not in POOLED and vars(first)[name] != vars(lens.card)[name]]
        differing += [] if lens.card.options == first.options else ["options"]
        if differing:
            raise OptionError(f"lenses differ in {', '.join(differing)}: only lenses fitted alike can be merged")
    members = tuple(member for lens in lenses for member in lens.card.corpus.members)
    if len(set(members)) < len(members):
        raise OptionError("lenses share a text: merge lenses that were fitted on disjoint texts")
    texts = sum(lens.card.corpus.texts for lens in lenses)
    maps = {
        layer: sum(lens.maps[layer].double() * (lens.card.corpus.texts / texts) for lens in lenses).float()  # type: ignore[union-attr]
        for layer in lenses[0].maps
    }
    corpus = replace(
        first.corpus, digest="", texts=texts, tokens=sum(lens.card.corpus.tokens for lens in lenses), members=members
    )
    parents = tuple(lens.card.tensors for lens in lenses)
    return JacobianLens(replace(first, corpus=corpus, quality=(), tensors="", parents=parents), maps)
