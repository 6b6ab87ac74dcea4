"""How a loaded model shows itself, in a terminal and in a notebook; the same for every backend."""

from __future__ import annotations

import torch

from probes.html_card import Fold, card, count
from probes.models.protocol import Context, Faithfulness, Shape


class Displayed:
    """Gives a model of the `Model` protocol its `repr` and its notebook card."""

    ref: str
    shape: Shape
    context: Context
    device: torch.device
    faithfulness: Faithfulness
    revision: str | None

    def __repr__(self) -> str:
        where = f"{self.context.backend}, {self.context.dtype}, {self.context.attention}, {self.device}"
        sizes = f"{count(self.shape.n_layers, 'layer')} of {self.shape.d_model}"
        return f"{type(self).__name__}({self.ref!r}: {self.shape.architecture}, {sizes}; {where}; {self._checked})"

    @property
    def _checked(self) -> str:
        identities = self.faithfulness.identities
        failing = sum(not identity.holds for identity in identities)
        return (
            f"{failing} of {len(identities)} identities FAIL"
            if failing
            else f"{count(len(identities), 'identity holds', 'identities hold')}"
        )

    def _repr_html_(self) -> str:
        shape, context, stamp = self.shape, self.context, self.faithfulness
        shared = "" if shape.n_kv_heads == shape.n_heads else f" on {shape.n_kv_heads} for keys and values"
        facts = {
            "depth and width": f"{count(shape.n_layers, 'layer')}, stream {shape.d_model}, MLP {shape.d_mlp}",
            "attention": f"{shape.n_heads} heads of {shape.d_head}{shared}, {'causal' if shape.causal else 'both ways'}",
            "tokens": f"{shape.d_vocab:,} in the vocabulary, {shape.n_ctx:,} in the context",
            "run by": f"{context.backend}, {context.dtype}, {context.attention} attention, on {self.device}",
            "weights": f"{context.weights}{f', revision {self.revision}' if self.revision else ''}",
            "checked": self._checked,
        }
        checks = [
            (i.name, f"{i.error:.1e}", f"{i.tolerance:.0e}", "yes" if i.holds else "NO") for i in stamp.identities
        ]
        refused = list(stamp.refused.items())
        folds = [
            Fold("Identities checked on a forward pass at loading", ("identity", "relative error", "tolerance", "holds"), checks),
            Fold(f"What it refuses ({len(refused)})", ("point", "reason"), refused),
        ]  # fmt: skip
        return card(self.ref, shape.architecture, facts, folds)
