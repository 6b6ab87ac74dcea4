"""Models of other libraries come in, and ours go out, with the same numbers."""

from __future__ import annotations

from typing import Any

import nnsight
import pytest
import torch
from conformance import close, one, state
from families import make, prompt, shared
from reference import expected
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from probes.errors import ModelError
from probes.models import Model, as_bridge, as_nnsight, from_bridge, from_hf, from_nnsight
from probes.points import Address

POINTS = ("resid_post.1", "q.1", "z.1", "pattern.1", "mlp_post.1", "logits")


def same(model: Model, family: str) -> None:
    for text in POINTS:
        close(one(model, Address.parse(text), prompt(rows=2)), expected(family)[text])


def bridged(family: str) -> Any:
    module = make(family)
    return build_bridge_from_module(module, type(module).__name__, hf_config=module.config, model_name=family)


@pytest.mark.parametrize("backend", ["native", "transformer_lens", "nnsight"])
def test_a_module_comes_in_on_every_backend(backend: str) -> None:
    model = from_hf(make("llama"), backend=backend)
    assert isinstance(model, Model)
    assert (model.context.backend, model.ref) == (backend, "LlamaForCausalLM")
    same(model, "llama")


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_multi_query"])
def test_a_bridge_comes_in_with_the_user_s_hooks_in_force(family: str) -> None:
    bridge = bridged(family)
    model = from_bridge(bridge)
    assert (model.context.backend, model.ref) == ("transformer_lens", family)
    same(model, family)
    seen: list[Any] = []
    bridge.add_hook("blocks.1.hook_out", lambda tensor, hook: seen.append(tensor) or tensor * 0)
    assert not one(model, Address("resid_post", 1), prompt()).any()
    with pytest.raises(KeyError):
        model.run(prompt(), {Address("resid_pre", 1): lambda _: {}["the reader's own"]})
    assert len(bridge.blocks[1].hook_out.fwd_hooks) == 1
    assert as_bridge(model) is bridge


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_bridge_with_processed_weights_is_read_as_it_is(family: str) -> None:
    bridge = bridged(family)
    before = from_bridge(bridge).context.weights
    bridge.enable_compatibility_mode()
    model, address = from_bridge(bridge), Address("resid_post", 1)
    assert model.context.weights != before, "its rows must not be taken for those of the plain weights"
    with torch.no_grad():
        _, cache = bridge.run_with_cache(prompt(rows=2), names_filter=["blocks.1.hook_out"])
    rows = one(model, address, prompt(rows=2))
    close(rows, cache["blocks.1.hook_out"])
    if family == "gpt2":
        assert not torch.allclose(rows, expected(family)[str(address)], atol=1e-3), "centred weights"


def test_an_nnsight_model_comes_in() -> None:
    traced = nnsight.NNsight(make("llama"))
    model = from_nnsight(traced)
    same(model, "llama")
    assert as_nnsight(model) is traced


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("backend", ["native", "nnsight", "transformer_lens"])
def test_a_model_goes_out_as_a_bridge_of_its_own(family: str, backend: str) -> None:
    module = make(family)
    model = from_hf(module, backend=backend)
    bridge = as_bridge(model)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(prompt(rows=2))
    close(logits, expected(family)["logits"])
    close(cache["blocks.1.hook_out"], expected(family)["resid_post.1"])
    before = state(module)
    bridge.enable_compatibility_mode()
    assert state(module) == before
    close(one(model, Address("logits"), prompt(rows=2)), expected(family)["logits"])


def test_a_model_goes_out_to_nnsight() -> None:
    for backend in ("native", "transformer_lens"):
        traced = as_nnsight(from_hf(make("llama"), backend=backend))
        with traced.trace(input_ids=prompt(rows=2)):
            hidden = traced.model.layers[1].output.save()
        close(hidden.detach(), expected("llama")["resid_post.1"])


def test_what_is_no_model_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="no TransformerBridge"):
        from_bridge(shared("llama"))
    with pytest.raises(ModelError, match="no nnsight model"):
        from_nnsight(shared("llama"))
    with pytest.raises(ModelError, match=r"unknown backend 'nnsite'.*Did you mean 'nnsight'"):
        from_hf(shared("llama"), backend="nnsite")
    with torch.device("meta"), pytest.raises(ModelError, match="dispatch=True"):
        from_nnsight(nnsight.NNsight(make("llama")))
