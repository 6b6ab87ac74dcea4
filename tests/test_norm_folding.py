"""From frozen norms to a model without: folded, exported and loaded again it is the same function."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import make, prompt
from tiny import native
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from probes.anatomy import Anatomy
from probes.anatomy.constant_norm import ConstantNorm
from probes.errors import OptionError, PointError
from probes.models import load_model
from probes.models.backends.native import NativeModel
from probes.norms import NormSite, Scale, Switches, absorb, make_constant, make_large_eps, undo_large_eps
from probes.points import Address

TOKENS = prompt(9, rows=2)
FOLDABLE = ("gpt2", "llama", "qwen3", "gemma2", "gemma3", "gpt_neox", "phi", "opt", "falcon_grouped", "olmo2")
EXPORTED = ("gpt2", "llama", "qwen3", "gemma2", "gpt_neox")


def fresh(family: str, **config: object) -> Anatomy:
    """The anatomy of a new module of a family."""
    module = make(family, **config)
    return NativeModel(module, ref=family, weights="x").anatomy


def frozen(anatomy: Anatomy) -> tuple[Switches, Tensor]:
    """Every site frozen at a scale of its own norm, and the logits then."""
    switches = Switches(anatomy)
    for index, norm in enumerate(switches.norms):
        switches.freeze(norm.sites, Scale(1.0 + 0.1 * index))
    with switches.attached(), torch.no_grad():
        return switches, anatomy.map.module(TOKENS).logits


def off(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation of a row of logits relative to its largest."""
    return float(((actual - expected).abs().amax(-1) / expected.abs().amax(-1)).max())


@torch.no_grad()
def logits(module: nn.Module) -> Tensor:
    return module(TOKENS).logits


@pytest.mark.parametrize("family", FOLDABLE)
def test_constant_and_folded_norms_equal_the_frozen_ones(family: str) -> None:
    anatomy = fresh(family)
    switches, expected = frozen(anatomy)
    make_constant(anatomy, switches.on)
    module = anatomy.map.module
    assert off(logits(module), expected) < 1e-5
    absorb(anatomy)
    assert off(logits(module), expected) < 1e-5
    assert not any(isinstance(m, ConstantNorm) or "Norm" in type(m).__name__ for m in module.modules())


def test_folding_unties_the_unembedding_and_gives_it_the_final_norms_bias() -> None:
    anatomy = fresh("gpt2")
    switches, _ = frozen(anatomy)
    make_constant(anatomy, switches.on)
    before = anatomy.component("embed").weight.clone()
    assert anatomy.component("unembed").weight is anatomy.component("embed").weight
    absorb(anatomy)
    assert torch.equal(anatomy.component("embed").weight, before)
    assert anatomy.component("unembed").bias is not None
    assert not anatomy.map.module.config.tie_word_embeddings


def test_folded_weights_computed_by_hand() -> None:
    anatomy = fresh("gpt2")
    scale, d = 1.7, 32
    norm, joint = anatomy.component("ln1", 1), anatomy.component("attn.qkv", 1)
    w, c, g, b = (t.detach().double().clone() for t in (joint.weight, joint.bias, norm.weight, norm.bias))
    make_constant(anatomy, dict.fromkeys(Switches(anatomy).sites, Scale(scale)))
    absorb(anatomy)
    centring = torch.eye(d, dtype=torch.float64) - torch.ones(d, d, dtype=torch.float64) / d
    assert torch.allclose(joint.weight.double(), centring @ torch.diag(g / scale) @ w, atol=1e-6)
    assert torch.allclose(joint.bias.double(), b @ w + c, atol=1e-6)


def test_a_mixture_of_experts_is_made_linear_in_place_but_not_folded() -> None:
    anatomy = fresh("mixtral")
    switches, expected = frozen(anatomy)
    make_constant(anatomy, switches.on)
    assert off(logits(anatomy.map.module), expected) < 1e-5
    with pytest.raises(PointError, match="MixtralSparseMoeBlock, no linear map"):
        absorb(anatomy)
    assert off(logits(anatomy.map.module), expected) < 1e-5


def test_only_constant_scales_can_be_folded() -> None:
    anatomy = fresh("gpt2")
    switches = Switches(anatomy)
    switches.freeze(switches.sites[1:], Scale(1.0))
    with pytest.raises(OptionError, match=r"qk\.0 is not frozen"):
        make_constant(anatomy, switches.on)
    switches.freeze(switches.sites, Scale(1.0, first=4.0))
    with pytest.raises(OptionError, match="differs between positions"):
        make_constant(anatomy, switches.on)
    switches.freeze(switches.sites, Scale(1.0))
    switches.on[NormSite("v", 0)] = Scale(2.0)
    with pytest.raises(OptionError, match="differs between positions or paths"):
        make_constant(anatomy, switches.on)


@pytest.mark.parametrize("family", EXPORTED)
def test_plain_transformers_and_this_loader_agree_with_the_frozen_model(family: str, tmp_path: Path) -> None:
    anatomy = fresh(family)
    switches, expected = frozen(anatomy)
    make_large_eps(anatomy, switches.on)
    anatomy.map.module.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert off(logits(plain), expected) < 1e-5
    assert any("Norm" in type(m).__name__ for m in plain.modules())
    model = load_model(str(tmp_path))
    assert isinstance(model, NativeModel)
    assert off(logits(model.module), expected) < 1e-5
    seen: dict[str, Tensor] = {}
    reads = {
        a: lambda t, a=a: seen.__setitem__(str(a), t.clone())
        for a in (Address("attn_scale", 1), Address("final_scale"))
    }
    model.run(TOKENS, reads)
    assert all(torch.equal(s, torch.ones(2, 9)) for s in seen.values())
    assert model.faithfulness.holds
    assert "final_scale" not in model.faithfulness.refused


def test_the_published_form_is_undone_to_the_published_weights() -> None:
    module = make("gpt2")
    gains = {n: m.weight.detach().clone() for n, m in module.named_modules() if isinstance(m, nn.LayerNorm)}
    for m in module.modules():
        if isinstance(m, nn.LayerNorm):
            with torch.no_grad():
                m.weight.mul_(1e6 / 2.5)
            m.eps = 1e12
    assert undo_large_eps(module) == 7
    for name, gain in gains.items():
        part = module.get_submodule(name)
        assert isinstance(part, ConstantNorm)
        assert torch.allclose(part.weight, gain / 2.5, rtol=1e-6)


def test_an_ordinary_checkpoint_keeps_its_norms() -> None:
    module = make("llama")
    assert undo_large_eps(module) == 0
    assert not any(isinstance(m, ConstantNorm) for m in module.modules())


def test_a_configuration_without_epsilon_is_not_exported() -> None:
    anatomy = fresh("opt")
    with pytest.raises(OptionError, match="states no epsilon"):
        make_large_eps(anatomy, dict.fromkeys(Switches(anatomy).sites, Scale(1.0)))


def test_a_backend_reads_folded_models_too() -> None:
    anatomy = fresh("llama")
    switches, expected = frozen(anatomy)
    make_constant(anatomy, switches.on)
    absorb(anatomy)
    model = NativeModel(anatomy.map.module, ref="folded", weights="y")
    assert model.faithfulness.holds
    assert off(logits(model.module), expected) < 1e-5
    assert model.anatomy.kind == native("llama").anatomy.kind
    assert replace(model.anatomy).n_layers == 3
