"""Relevance: the account of every family closes, the forward stays as it is, and the rules are those of the papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, make
from tiny import native
from torch import Tensor, nn

from probes.errors import OptionError, PointError
from probes.gradients import values_and_gradients
from probes.models.backends.native import NativeModel
from probes.points import Address
from probes.relevance import RULES, Relevance, changed, relevance_of
from probes.relevance.read import TOKENS
from probes.relevance.rules import instead, scaled

ROWS = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 8]])
LRP = ("attnlrp", "cp")


def metric(logits: Tensor) -> Tensor:
    return logits[:, 5] - logits[:, [7, 9]].mean(-1)


def logits_of(model: NativeModel) -> Tensor:
    out: list[Tensor] = []
    model.run(ROWS, {Address("logits"): lambda t: out.append(t[:, -1].float().clone())})
    return out[0]


def hooks_in(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a.cpu() - b.cpu()).abs().max() <= tolerance * b.abs().max().clamp_min(1e-6))


def account(read: Relevance) -> Tensor:
    leaks = read.leaks
    assert leaks is not None
    return leaks.tokens + leaks.biases.sum(1) + leaks.softmax.sum((1, 2)) + leaks.activations.sum(1)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bert"])
@pytest.mark.parametrize("rule", LRP)
def test_what_enters_and_what_leaks_is_the_metric(family: str, rule: str) -> None:
    model = native(family)
    read = relevance_of(model, ROWS, metric, rule)
    assert read.leaks is not None
    assert torch.allclose(read.metric, metric(logits_of(model)), atol=1e-5)
    assert close(account(read), read.metric), "the parts were measured one by one, so that they need not add up"
    assert not read.leaks.misses(read.metric).any()
    gated = model.anatomy.map.path("mlp.in", 0) is not None
    assert not gated or float(read.leaks.activations.abs().max()) < 1e-5
    assert rule != "cp" or float(read.leaks.softmax.abs().max()) < 1e-6


def test_an_account_that_is_missed_is_said() -> None:
    """The head of BERT has a norm and an activation behind the blocks, which no rule reaches; plain gradients leak at norms."""
    for model, rule in ((native("bert"), "cp"), (native("llama"), "gradient")):
        read = relevance_of(model, ROWS, metric, rule)
        assert read.leaks is not None
        assert read.leaks.misses(read.metric).all()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "olmo2"])
def test_without_biases_and_softmax_all_relevance_is_the_tokens(family: str) -> None:
    read = relevance_of(native(family), ROWS, metric, "cp")
    assert close(read.score(TOKENS).sum(1), read.metric)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "phi", "mixtral"])
@pytest.mark.parametrize("rule", RULES)
def test_the_forward_is_the_same_to_the_bit_and_nothing_stays_hooked(family: str, rule: str) -> None:
    model = native(family)
    before, hooks = logits_of(model), hooks_in(model.module)
    with changed(model, RULES[rule], (2, 4)), torch.no_grad():
        inside = model.module(input_ids=ROWS, use_cache=False).logits[:, -1].float()
    plain = model.module(input_ids=ROWS, use_cache=False).logits[:, -1].float()
    assert torch.equal(inside, plain)
    relevance_of(model, ROWS, metric, rule)
    assert torch.equal(logits_of(model), before)
    assert hooks_in(model.module) == hooks


def test_a_failing_forward_leaves_nothing_hooked() -> None:
    model = native("llama")
    hooks = hooks_in(model.module)
    with pytest.raises(ZeroDivisionError):
        relevance_of(model, ROWS, lambda _: 1 / 0, "attnlrp")  # type: ignore[arg-type, return-value]
    assert hooks_in(model.module) == hooks


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2", "gpt_neox"])
def test_rule_gradient_is_gradient_times_activation(family: str) -> None:
    model = native(family)
    read = relevance_of(model, ROWS, metric, "gradient")
    addresses = [Address(point, 1) for point in ("z", "mlp_out", "resid_post")]
    values, gradients = values_and_gradients(model, ROWS, addresses, metric)
    for address in addresses:
        assert torch.allclose(read.values[address], values[address], atol=1e-6)
        assert close(read.gradients[address], gradients[address], 1e-4)


def test_rows_do_not_mix_and_their_order_does_not_matter() -> None:
    model = native("qwen2")
    both = relevance_of(model, ROWS, metric)
    turned = relevance_of(model, ROWS.flip(0), metric)
    alone = relevance_of(model, ROWS[1:], metric)
    for point in ("z", "mlp_out", "resid_post"):
        assert torch.allclose(both.layers(point).flip(0), turned.layers(point), atol=1e-5)
        assert torch.allclose(both.layers(point)[1:], alone.layers(point), atol=1e-5)


@pytest.mark.parametrize("rule", LRP)
def test_the_stream_carries_the_metric_less_the_leaks_above(rule: str) -> None:
    read = relevance_of(native("llama"), ROWS, metric, rule)
    assert read.leaks is not None
    streams, leaks = read.layers("resid_post").sum(2), read.leaks.softmax.sum(2)
    above = torch.flip(torch.cumsum(torch.flip(leaks, [1]), 1), [1])
    assert torch.allclose(streams[:, :-1], read.metric[:, None] - above[:, 1:], atol=1e-5)
    assert torch.allclose(streams[:, -1], read.metric, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_that_adds_zero_has_no_relevance(family: str) -> None:
    module = make(family)
    model = NativeModel(module, ref="zero", weights="zero")
    with torch.no_grad():
        for name in ("attn.o", "mlp.out"):
            for parameter in model.anatomy.component(name, 1).parameters():
                parameter.zero_()
    read = relevance_of(model, ROWS, metric)
    for point in ("attn_out", "mlp_out"):
        assert float(read.layers(point)[:, 1].abs().max()) == 0
        assert float(read.layers(point)[:, 0].abs().max()) > 1e-4


def test_in_a_linear_model_every_rule_but_the_patterns_is_the_gradient() -> None:
    """No norms, no MLPs, and keys of zero, so that attention is uniform: the metric is linear in the first stream."""
    module = make("llama")
    with torch.no_grad():
        for block in module.model.layers:  # type: ignore[union-attr]
            block.input_layernorm, block.post_attention_layernorm = nn.Identity(), nn.Identity()
            block.self_attn.k_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        module.model.norm = nn.Identity()  # type: ignore[union-attr]
    model = NativeModel(module, ref="linear", weights="linear")
    plain, cp = (relevance_of(model, ROWS, metric, rule) for rule in ("gradient", "cp"))
    assert close(plain.score(TOKENS).sum(1), plain.metric)
    for point in ("attn_out", "resid_post"):
        assert torch.allclose(cp.layers(point), plain.layers(point), atol=1e-5)
    assert torch.allclose(cp.score(TOKENS), plain.score(TOKENS), atol=1e-5)
    halves = relevance_of(model, ROWS, metric, "attnlrp")
    assert halves.leaks is not None
    assert torch.allclose(
        halves.leaks.softmax.sum((1, 2)), halves.metric - halves.score(TOKENS).sum(1), atol=1e-5
    )  # keys are zero, so what enters the patterns ends there
    assert torch.allclose(halves.leaks.softmax, halves.layers("z").sum(2) / 2, atol=1e-5)


def test_two_factors_get_half_each_and_up_gets_all_under_cp() -> None:
    model = native("llama")
    for rule, share in (("attnlrp", 0.5), ("cp", 0.0)):
        seen: dict[str, Tensor] = {}

        def keep(name: str, seen: dict[str, Tensor] = seen) -> Any:
            def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
                seen[name] = out.detach().requires_grad_()
                return seen[name]

            return hook

        block = model.anatomy.component("mlp", 1)
        handles = [getattr(block, f"{name}_proj").register_forward_hook(keep(name)) for name in ("gate", "up")]
        hidden: list[Tensor] = []
        with changed(model, RULES[rule], (2, 4)), torch.enable_grad():
            handles.append(block.down_proj.register_forward_pre_hook(lambda _, args, out=hidden: out.append(args[0])))
            model.module(input_ids=ROWS, use_cache=False)
        for handle in handles:
            handle.remove()
        arriving = torch.randn(hidden[0].shape, generator=torch.Generator().manual_seed(0))
        gate, up = torch.autograd.grad(
            (hidden[0] * arriving).sum(), [seen["gate"], seen["up"]], allow_unused=True, materialize_grads=True
        )
        whole = hidden[0] * arriving
        assert torch.allclose(seen["gate"] * gate, share * whole, atol=1e-6)
        assert torch.allclose(seen["up"] * up, (1 - share) * whole, atol=1e-6)


def test_a_surrogate_gives_its_gradient_and_never_its_value() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    out = instead(x.square(), 3 * x)
    assert out.tolist() == [1, 4]
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [3, 3]
    assert torch.autograd.grad(scaled(x, 0.25).sum(), x)[0].tolist() == [0.25, 0.25]
    assert not scaled(x, 0).requires_grad


def test_magnitudes_are_for_tokens_alone() -> None:
    read = relevance_of(native("llama"), ROWS, metric, "dynamic")
    assert read.leaks is not None
    assert close(account(read), read.metric)
    with pytest.raises(OptionError, match="attnlrp or cp"):
        read.layers("z")
    with pytest.raises(PointError, match="normalises each sum"):
        relevance_of(native("opt_post_norm"), ROWS, metric, "dynamic")
    with pytest.raises(OptionError, match="attnlrp"):
        relevance_of(native("llama"), ROWS, metric, "attn_lrp")


def test_magnitude_sums_are_shared_out_signless() -> None:
    """One block that adds b to a: what the block and the stream get is R |b| and R |a| over their sum, element by element."""
    model = native("llama")
    read = relevance_of(model, ROWS, metric, "dynamic")
    last = Address("resid_post", 2)
    whole = (read.values[last] * read.gradients[last]).float()
    mlp = Address("mlp_out", 2)
    part = read.values[mlp].abs() / (read.values[mlp].abs() + (read.values[last] - read.values[mlp]).abs())
    assert torch.allclose(read.values[mlp] * read.gradients[mlp], whole * part, atol=1e-5)


def test_a_stream_written_at_the_start_is_what_is_differentiated() -> None:
    model = native("gpt2")
    whole = relevance_of(model, ROWS, metric, "gradient")
    own = whole.values[TOKENS]
    again = relevance_of(model, ROWS, metric, "gradient", first_stream=own)
    assert again.leaks is None
    assert torch.allclose(again.layers("z"), whole.layers("z"), atol=1e-6)
    moved = relevance_of(model, ROWS, metric, "gradient", first_stream=own * 0.5)
    assert not torch.allclose(moved.metric, whole.metric)
