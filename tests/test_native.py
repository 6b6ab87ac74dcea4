"""The native backend: conformance, and what it must leave as it found it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import CAUSAL, Conformance, close, one, read
from families import FAMILIES, make, prompt, shared
from reference import REFUSED
from torch import Tensor, nn

from probes.errors import PointError
from probes.models import fetch_model, load_model
from probes.models.backends.native import NativeModel
from probes.models.protocol import Model
from probes.points import POINTS, Address


def native(module: nn.Module, ref: str = "tiny") -> NativeModel:
    return NativeModel(module, ref=ref, weights="digest")


class TestNative(Conformance):
    def load(self, module: nn.Module, family: str) -> Model:
        return native(module, family)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_nothing_more_is_refused_than_a_family_lacks(self, family: str) -> None:
        own_attention = {"pattern"} if family.startswith("falcon") else set()
        lens = {"lens"} if family in ("bert", "opt_post_norm") else set()
        assert set(self.model(family).faithfulness.refused) == REFUSED.get(family, set()) | own_attention | lens

    @pytest.mark.parametrize("family", CAUSAL)
    def test_greedy_decoding_is_the_library_s_own(self, family: str) -> None:
        tokens = prompt(6)
        theirs = shared(family).generate(tokens, max_new_tokens=6, do_sample=False)[0, 6:].tolist()  # type: ignore[operator]
        assert self.model(family).generate(tokens[0].tolist(), 6) == theirs

    def test_it_is_a_model(self) -> None:
        model = self.model("llama")
        assert isinstance(model, Model)
        assert model.context.backend == "native"
        assert (model.context.dtype, model.context.attention) == ("float32", "sdpa")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_of_every_family_loads_by_default(family: str, tmp_path: Path) -> None:
    module = shared(family)
    module.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    fused = type(module)._supports_sdpa  # type: ignore[attr-defined]
    assert model.context.attention == ("sdpa" if fused else "eager")
    assert fused == (family != "gemma2")
    if "lens" not in model.faithfulness.refused:
        close(one(model, Address("logits"), prompt()), one(native(module), Address("logits"), prompt()))


def test_a_reader_sees_what_the_caller_s_own_hook_made() -> None:
    module = make("llama")
    model = native(module)
    handle = module.get_submodule("model.layers.1").register_forward_hook(lambda _, __, out: out * 0)
    assert not one(model, Address("resid_post", 1), prompt()).any()
    handle.remove()


@pytest.mark.parametrize(
    ("address", "blocks"), [("embed", 0), ("resid_pre.1", 1), ("z.1", 1), ("resid_post.1", 2), ("final_norm", 3)]
)
def test_a_forward_stops_after_the_last_address(address: str, blocks: int) -> None:
    module = make("llama")
    model = native(module)
    ran: list[str] = []
    for name, m in module.named_modules():
        if (name.startswith("model.layers.") and name.count(".") == 2) or name == "lm_head":
            m.register_forward_hook(lambda *_, name=name: ran.append(name))
    read(model, [Address("embed"), Address.parse(address)], prompt())
    assert ran == [f"model.layers.{layer}" for layer in range(blocks)]


def test_nothing_to_read_costs_no_forward() -> None:
    module = make("llama")
    model = native(module)
    module.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    model.run(prompt(), {})


def test_attention_stays_sdpa_when_no_pattern_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make("llama")
    model = native(module)
    masks: list[object] = []
    plain = nn.functional.scaled_dot_product_attention

    def count(*args: Any, **kwargs: Any) -> Tensor:
        masks.append(kwargs.get("attn_mask"))
        return plain(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count)
    read(model, [Address("logits")], torch.nn.functional.pad(prompt(rows=2), (0, 3)), lengths=[9, 9])
    assert masks == [None] * 3, "without a mask the fast kernels may run"
    read(model, [Address("pattern", 0), Address("logits")], prompt())
    assert len(masks) == 6, "patterns are computed beside the model's own attention, not in its place"


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mistral", "qwen3"])
def test_patterns_are_the_same_under_eager_and_sdpa(family: str) -> None:
    eager = copy.deepcopy(shared(family))
    eager.set_attn_implementation("eager")  # type: ignore[operator]
    a, b = native(eager), native(shared(family))
    assert (a.context.attention, b.context.attention) == ("eager", "sdpa")
    close(one(a, Address("pattern", 2), prompt()), one(b, Address("pattern", 2), prompt()))


def test_patterns_of_padded_rows_are_those_of_the_rows_alone() -> None:
    for family in ("llama", "bert"):
        model = native(shared(family))
        padded = torch.nn.functional.pad(prompt(5), (0, 3))
        tokens = torch.cat((padded, prompt(8, seed=4)))
        batched = read(model, [Address("pattern", 1)], tokens, lengths=[5, 8])[Address("pattern", 1)]
        close(batched[0, :, :5, :5], one(model, Address("pattern", 1), prompt(5))[0])


def test_a_knocked_out_key_no_longer_reaches_the_query() -> None:
    model, tokens = native(make("llama")), prompt()
    pattern, z = Address("pattern", 1), Address("z", 1)

    def knock_out(p: Tensor) -> Tensor:
        p = p.clone()
        p[:, 2, 5, 3] = 0
        return p

    before = read(model, [pattern, z], tokens)
    after = read(model, [pattern, z], tokens, {pattern: knock_out})
    changed = (before[z] - after[z]).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().tolist() == [[5, 2]]
    v = one(model, Address("v", 1), tokens)[0, 3, 1]
    close(after[z][0, 5, 2], before[z][0, 5, 2] - before[pattern][0, 2, 5, 3] * v)


def test_a_model_spread_by_accelerate_reads_the_same() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, spread = native(shared("llama")), make("llama")
    accelerate.dispatch_model(spread, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert any(hasattr(m, "_hf_hook") for m in spread.modules())
    model = native(spread)
    for name in POINTS:
        address = Address(name, 1 if POINTS[name].layered else None)
        close(one(model, address, prompt()), one(plain, address, prompt()))


def test_a_bert_without_its_head_is_read_as_with_it_and_has_no_logits() -> None:
    module: Any = shared("bert")
    whole, bare = native(module), native(module.bert)
    assert bare.shape == dataclasses.replace(whole.shape, architecture="BertModel")
    assert bare.faithfulness.holds
    assert "last hidden state == resid_post" in {identity.name for identity in bare.faithfulness.identities}
    layered = [Address(name, layer) for name, point in POINTS.items() if point.layered for layer in range(3)]
    assert [bare.refusal(address) is None for address in layered] == [
        whole.refusal(address) is None for address in layered
    ]
    shared_points = [Address("embed"), *(address for address in layered if whole.refusal(address) is None)]
    assert len(shared_points) > 20
    for address in shared_points:
        close(one(bare, address, prompt()), one(whole, address, prompt()))
    assert {"logits", "lens"} <= set(bare.faithfulness.refused)
    with pytest.raises(PointError, match="BertModel has no language-model head"):
        one(bare, Address("logits"), prompt())
    with pytest.raises(PointError, match="BertModel has no unembedding"):
        bare.unembedding()


@pytest.mark.download
def test_the_sentence_encoder_loads_and_refuses_the_lens() -> None:
    fetch_model("minilm-l6")
    model = load_model("minilm-l6")
    assert model.faithfulness.holds
    assert not model.shape.causal
    with pytest.raises(PointError, match="no unembedding"):
        model.unembedding()


def test_bert_does_not_write() -> None:
    with pytest.raises(PointError, match="both ways"):
        native(shared("bert")).generate([5, 6], 2)


def test_components_are_the_module_s_own_parts() -> None:
    module: Any = shared("llama")
    model = native(module)
    assert model.component("attn.o", 1) is module.model.layers[1].self_attn.o_proj
    assert model.component("unembed") is module.lm_head
    with pytest.raises(PointError, match=r"attn\.qkv.*Legal.*attn\.q"):
        model.component("attn.qkv", 1)
