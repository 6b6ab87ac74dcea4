"""The nnsight backend: conformance."""

from __future__ import annotations

from conformance import Conformance
from families import FAMILIES
from torch import nn

from probes.models.base import Model
from probes.models.nnsight import NnsightModel


class TestNnsight(Conformance):
    def load(self, module: nn.Module, family: str) -> Model:
        return NnsightModel(module, ref=family, weights="digest")
