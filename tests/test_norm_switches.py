"""Frozen norms: true scales change nothing, switches undo themselves, and every switch reaches its own readers alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import make, prompt, shared
from tiny import native
from torch import Tensor, nn

from probes.anatomy import Anatomy
from probes.errors import OptionError, PointError
from probes.norms import NoNormError, NormSite, Rows, RunningScale, Scale, Switches, choose, make_constant, parts_of
from probes.points import Address

FREEZABLE = (
    "gpt2",
    "llama",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt_neox",
    "phi",
    "opt",
    "falcon_grouped",
    "olmo2",
    "mixtral",
)
TOKENS = prompt(9, rows=2)


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module(TOKENS).logits


@pytest.mark.parametrize("family", FREEZABLE)
def test_frozen_at_the_true_scale_each_norm_is_bitwise_itself(family: str) -> None:
    switches, module = Switches(native(family).anatomy), shared(family)
    clean = logits(module)
    with switches.attached():
        assert torch.equal(logits(module), clean)
        for sites in ([site] for site in switches.sites):
            switches.on.clear()
            switches.freeze(sites, Scale(1.0, own=True))
            assert torch.equal(logits(module), clean), sites
        switches.freeze(switches.sites, Scale(1.0, own=True))
        assert torch.equal(logits(module), clean)


@pytest.mark.parametrize("family", FREEZABLE)
def test_every_switch_changes_the_model_and_off_restores_it_bitwise(family: str) -> None:
    switches, module = Switches(native(family).anatomy), shared(family)
    clean = logits(module)
    for site in switches.sites:
        with switches.attached():
            switches.freeze([site], Scale(0.7))
            assert not torch.equal(logits(module), clean), site
            del switches.on[site]
            assert torch.equal(logits(module), clean), site
    switches.freeze(switches.sites, Scale(0.7))
    assert torch.equal(logits(module), clean)
    assert not module._forward_pre_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_queries_keys_and_values_have_switches_of_their_own(family: str) -> None:
    model = native(family)
    switches = Switches(model.anatomy)

    def read() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        reads = {Address(p, 1): lambda t, p=p: tensors.__setitem__(p, t.clone()) for p in ("q", "k", "v", "mlp_in")}
        with torch.no_grad():
            model.run(TOKENS, reads)
        return tensors

    clean = read()
    expected = {"qk.1": {"q", "k"}, "v.1": {"v"}, "mlp.1": {"mlp_in"}}
    for name, moved in expected.items():
        with switches.attached():
            switches.on.clear()
            switches.freeze(choose(switches.sites, [name]), Scale(0.5))
            now = read()
        direct = {p for p in clean if not torch.equal(now[p], clean[p])}
        # What attention adds reaches a sequential block's MLP.
        assert direct - moved <= ({"mlp_in"} if not model.anatomy.parallel else set()), name
        assert moved <= direct, name


def test_a_frozen_norm_is_linear_in_its_input_and_the_norm_is_not() -> None:
    for norm in (nn.LayerNorm(16, eps=0), nn.RMSNorm(16, eps=1e-30)):
        with torch.no_grad():
            norm.weight.normal_()
        parts = parts_of(norm, 16, 0.0)
        x = torch.randn(3, 5, 16)
        assert torch.allclose(norm(3 * x), norm(x), atol=1e-5)
        frozen = parts.divided(x, torch.tensor(0.8))
        bias = 0 if parts.bias is None else parts.bias
        assert torch.allclose(parts.divided(3 * x, torch.tensor(0.8)) - bias, 3 * (frozen - bias), atol=1e-5)
        assert parts.centred == isinstance(norm, nn.LayerNorm)


def test_a_frozen_norm_computed_by_hand() -> None:
    norm = nn.LayerNorm(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 3.0]))
        norm.bias.copy_(torch.tensor([0.5, -1.0]))
    normed = parts_of(norm, 2, 1e-5).divided(torch.tensor([[1.0, 5.0]]), torch.tensor(4.0))
    assert normed.tolist() == [[2 * -2 / 4 + 0.5, 3 * 2 / 4 - 1]]


def test_gemmas_gain_is_one_more_than_its_weight() -> None:
    norm = native("gemma2").component("ln1", 0)
    parts = parts_of(norm, 32, 1e-6)
    assert parts.gain_offset == 1
    assert torch.equal(parts.gain, 1 + norm.weight)


def test_a_module_that_is_no_norm_is_refused() -> None:
    with pytest.raises(PointError, match="GroupNorm is neither"):
        parts_of(nn.GroupNorm(2, 16), 16, 1e-5)


def test_position_0_takes_its_own_scale_and_feature_0_does_not() -> None:
    switches, module = Switches(native("llama").anatomy), shared("llama")
    norm = switches.norm(NormSite("final"))
    seen: dict[str, Tensor] = {}
    handle = norm.parts.norm.register_forward_hook(lambda m, a, out: seen.update(x=a[0], out=out))
    with switches.attached():
        switches.freeze([NormSite("final")], Scale(2.0, first=10.0))
        # The switch's own hook runs later than this one, so the replaced output is read from the unembedding's input.
        reader = module.lm_head.register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))
        logits(module)
    handle.remove()
    reader.remove()
    gain = norm.parts.gain
    assert torch.allclose(seen["out"][:, 0], gain * seen["x"][:, 0] / 10)
    assert torch.allclose(seen["out"][:, 1:], gain * seen["x"][:, 1:] / 2)


def test_scales_by_position_and_by_end_of_text() -> None:
    rows = Rows.of(torch.tensor([[5, 2, 7], [2, 8, 9]]), end_of_text=2)
    assert rows.ordinary.tolist() == [[False, False, True], [False, True, True]]
    assert Scale(2.0, 10.0).at(rows)[..., 0].tolist() == [[10, 2, 2], [10, 2, 2]]
    assert Scale(2.0, 10.0, ends_as_first=True).at(rows)[..., 0].tolist() == [[10, 10, 2], [10, 2, 2]]
    assert Scale(2.0, ends_as_first=True).at(rows)[..., 0].tolist() == [[2, 2, 2], [2, 2, 2]]
    each = Scale(1.0, positions=torch.tensor([3.0, 4.0, 5.0, 6.0]))
    assert each.at(rows)[..., 0].tolist() == [[3, 4, 5], [3, 4, 5]]
    with pytest.raises(OptionError, match="scales for 2 positions"):
        Scale(1.0, positions=torch.tensor([3.0, 4.0])).at(rows)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="positive"):
            Scale(bad)


def test_values_alone_can_take_position_0s_scale_where_a_text_ends() -> None:
    switches, module = Switches(native("gpt2").anatomy, end_of_text=int(TOKENS[0, 3])), shared("gpt2")
    plain = Scale(1.0, 5.0)
    projections = []
    for ends in (False, True):
        with switches.attached():
            switches.on.update({NormSite("qk", 0): plain, NormSite("v", 0): replace(plain, ends_as_first=ends)})
            out: dict[str, Tensor] = {}
            hook = module.transformer.h[0].attn.c_attn.register_forward_hook(lambda m, a, o, out=out: out.update(x=o))
            logits(module)
            hook.remove()
        projections.append(out["x"].split(32, -1))
    moved = [(a - b).abs().amax(-1) > 1e-6 for a, b in zip(*projections, strict=True)]
    assert not moved[0].any()
    assert not moved[1].any()
    assert moved[2][0].nonzero().flatten().tolist() == [3]


def test_the_running_scale_converges_as_one_minus_a_power() -> None:
    rows = Rows.of(torch.zeros(2, 4, dtype=torch.long))
    running = RunningScale(0.9)
    running.enter(torch.full((2, 4), 8.0), rows)
    for _ in range(10):
        running.enter(torch.full((2, 4), 3.0), rows)
    assert running.value == pytest.approx(3 + 5 * 0.9**10)
    running.enter(torch.tensor([[100.0, 3, 3, 3]] * 2), rows)
    assert running.value == pytest.approx(3 + 5 * 0.9**11)
    assert running.first is not None
    assert running.first > 10


def test_running_scales_move_once_a_training_forward_and_never_in_evaluation() -> None:
    module = make("gpt2")
    switches = Switches(
        replace(native("gpt2").anatomy, map=replace(native("gpt2").anatomy.map, module=module, _paths={}))
    )
    seen: list[Tensor] = []
    norm = switches.norm(NormSite("qk", 1))
    switches.watches[norm.path] = lambda n, x, scale: seen.append(scale.detach())
    with switches.attached():
        logits(module)
        assert switches.running[norm.path].value is None
        with pytest.raises(OptionError, match=r"qk\.1 has no measured scale"):
            switches.freeze([NormSite("qk", 1)])
        for parameter in module.modules():
            if isinstance(parameter, nn.Dropout):
                parameter.p = 0.0
        module.train()
        logits(module)
        logits(module)
    value = float(seen[-1][:, 1:].mean())
    # The same input twice leaves the average where it is; another momentum or a third update would not show here.
    assert switches.running[norm.path].value == pytest.approx(value, rel=1e-5)
    assert switches.running[norm.path].first == pytest.approx(float(seen[-1][:, 0].mean()), rel=1e-5)
    assert len(seen) == 3


def test_frozen_sites_still_train_their_norm() -> None:
    module = make("llama")
    anatomy = native("llama").anatomy
    switches = Switches(replace(anatomy, map=replace(anatomy.map, module=module, _paths={})))
    switches.freeze(switches.sites, Scale(1.3))
    with switches.attached():
        module(TOKENS).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in module.named_parameters() if "norm" in n)


def test_sites_by_name() -> None:
    sites = Switches(native("llama").anatomy).sites
    assert len(sites) == 10
    assert [str(s) for s in choose(sites, ["mlp.1-2", "final"])] == ["mlp.1", "mlp.2", "final"]
    assert choose(sites, ["all"]) == sites
    assert len(choose(sites, ["v.*", "v"])) == 3
    for bad in ("mlp.3", "mpl", "final.0", "q_norm", "qk.a"):
        with pytest.raises(OptionError, match="unknown norm site"):
            choose(sites, [bad])


def test_models_whose_norms_cannot_go_are_refused() -> None:
    with pytest.raises(PointError, match="normalises the stream itself"):
        Switches(native("bert").anatomy)
    module = make("gpt2")
    anatomy = native("gpt2").anatomy
    anatomy: Anatomy = replace(anatomy, map=replace(anatomy.map, module=module, _paths={}))
    make_constant(anatomy, dict.fromkeys(Switches(anatomy).sites, Scale(1.0)))
    with pytest.raises(NoNormError, match="nothing to freeze"):
        Switches(anatomy)
