"""The TransformerLens backend: conformance."""

from __future__ import annotations

from typing import ClassVar

import pytest
from conformance import Conformance
from families import FAMILIES, make
from reference import REFUSED
from torch import nn

from probes.models.backends.transformer_lens import BridgedMap, TransformerLensModel
from probes.models.protocol import Model
from probes.points import Address


class TestTransformerLens(Conformance):
    families: ClassVar[tuple[str, ...]] = tuple(f for f in FAMILIES if f != "falcon_grouped")
    own_copy: ClassVar[bool] = True

    def load(self, module: nn.Module, family: str) -> Model:
        return TransformerLensModel(module, ref=family, weights="digest")

    @pytest.mark.parametrize("family", families)
    def test_nothing_more_is_refused_than_a_family_lacks(self, family: str) -> None:
        lens = {"lens"} if family in ("bert", "opt_post_norm") else set()
        assert set(self.model(family).faithfulness.refused) == REFUSED.get(family, set()) | lens

    def test_a_point_the_bridge_gives_otherwise_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The planted wrong place: the bridge's queries stand where the model's keys do."""
        plain = BridgedMap._find

        def wrong(self: BridgedMap, component: str, layer: int | None) -> str | None:
            return plain(self, "attn.q" if component == "attn.k" else component, layer)

        monkeypatch.setattr(BridgedMap, "_find", wrong)
        model = self.load(make("llama", num_key_value_heads=4), "llama")
        assert "another tensor than the model itself" in str(model.refusal(Address("k", 1)))
        assert model.refusal(Address("q", 1)) is None
