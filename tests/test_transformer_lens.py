"""The TransformerLens backend: conformance."""

from __future__ import annotations

from typing import ClassVar

from conformance import Conformance
from families import FAMILIES
from torch import nn

from probes.models.base import Model
from probes.models.transformer_lens import TransformerLensModel


class TestTransformerLens(Conformance):
    families: ClassVar[tuple[str, ...]] = tuple(f for f in FAMILIES if f != "falcon_grouped")
    own_copy: ClassVar[bool] = True

    def load(self, module: nn.Module, family: str) -> Model:
        return TransformerLensModel(module, ref=family, weights="digest")
