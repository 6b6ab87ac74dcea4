"""The TransformerLens backend: conformance; and its Jacobian lens beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conformance import Conformance
from families import FAMILIES, make, prompt
from reference import REFUSED
from tiny import native
from torch import nn
from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

from probes.errors import OptionError
from probes.lens_fits.foreign import import_jacobian
from probes.lens_fits.jacobian import Estimator
from probes.lens_fits.jacobian_fit import fit_jacobian
from probes.lenses import logit
from probes.models.backends.transformer_lens import BridgedMap, TransformerLensModel, bridge_over
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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_jacobian_lens_is_that_of_the_library_and_its_file_imports(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps, first ten tokens, and the official file; one whose layers are exchanged is refused."""
    texts, model = [tuple(row) for row in prompt(9, seed=7, rows=3).tolist()], native(family)
    bridge = bridge_over(make(family), None, "tiny")
    monkeypatch.setattr(bridge, "to_tokens", lambda text: torch.tensor([texts[int(text)]]), raising=False)
    options = {"skip_first_positions": 2, "dim_batch": 32, "show_progress": False}
    theirs = JacobianLens.fit(bridge, ["0", "1", "2"], corpus="random tokens", **options)
    ours = fit_jacobian(model, texts, Estimator(2, (0, 1), skip=2, length=9), corpus="random tokens").lens
    rows = torch.randn(6, 32)
    for layer in (0, 1):
        torch.testing.assert_close(theirs.jacobians[layer], ours.maps[layer], atol=1e-5, rtol=1e-4)
        logits = bridge.unembed(bridge.ln_final(theirs.transport(rows, layer)[None]))[0]
        read = logit.read(ours.readable(rows, layer), model.unembedding(), top_k=10)
        assert torch.equal(logits.topk(10).indices, read.top_ids)
    theirs.save(str(tmp_path / "official.pt"))
    imported, _ = import_jacobian(model, tmp_path / "official.pt", texts, target=2, skip=2, length=9)
    torch.testing.assert_close(imported.maps[1], ours.maps[1], atol=2e-3, rtol=2e-3)
    theirs.jacobians = {0: theirs.jacobians[1], 1: theirs.jacobians[0]}
    theirs.save(str(tmp_path / "shifted.pt"))
    with pytest.raises(OptionError, match="counts its layers otherwise"):
        import_jacobian(model, tmp_path / "shifted.pt", texts, target=2, skip=2, length=9)
