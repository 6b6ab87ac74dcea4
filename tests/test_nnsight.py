"""The nnsight backend: conformance."""

from __future__ import annotations

from typing import ClassVar

from conformance import Conformance
from torch import nn

from probes.models.backends.nnsight import NnsightModel
from probes.models.protocol import Model


class TestNnsight(Conformance):
    leaves: ClassVar[frozenset[str]] = frozenset({"__nnsight__", "forward"})

    def load(self, module: nn.Module, family: str) -> Model:
        return NnsightModel(module, ref=family, weights="digest")
