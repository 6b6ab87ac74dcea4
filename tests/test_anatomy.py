"""The anatomy: built from the map without touching the model, and checked against a forward before it is trusted."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from families import FAMILIES, make, shared
from reference import NAMES
from torch import Tensor, nn

from probes.anatomy import ArchitectureMap, anatomy_of, joint_layouts
from probes.anatomy.views import Divisor, Gather, Heads, View
from probes.errors import ModelError
from probes.models.backends.native import NativeModel
from probes.models.verify.identities import probe_tokens
from probes.points import Address


def native(module: nn.Module) -> NativeModel:
    return NativeModel(module, ref="planted", weights="digest")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kind_of_block_is_the_family_s(family: str) -> None:
    assert native(shared(family)).anatomy.kind == NAMES[family].kind


@pytest.mark.parametrize("family", FAMILIES)
def test_a_map_leaves_the_module_alone(family: str) -> None:
    module: Any = make(family)
    before = (str(module), str(module.config), {name: id(m) for name, m in module.named_modules()})
    anatomy_of(module)
    assert (str(module), str(module.config), {name: id(m) for name, m in module.named_modules()}) == before


def swap(monkeypatch: pytest.MonkeyPatch, **wrong: str) -> None:
    """Make the map answer with another component's path."""
    true = ArchitectureMap.path

    def path(self: ArchitectureMap, component: str, layer: int | None = None) -> str | None:
        return true(self, wrong.get(component.replace(".", "_"), component), layer)

    monkeypatch.setattr(ArchitectureMap, "path", path)


@pytest.mark.parametrize(
    "wrong",
    [{"attn": "mlp"}, {"mlp": "ln2"}, {"ln2": "mlp"}, {"ln2": "attn.o"}, {"attn": "attn.q"}],
    ids=str,
)
def test_a_wrong_map_of_the_stream_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str]) -> None:
    swap(monkeypatch, **wrong)
    with pytest.raises(ModelError, match=r"planted: .* is off by"):
        native(make("llama"))


@pytest.mark.parametrize(
    ("wrong", "point", "reason"),
    [
        ({"attn_v": "attn.k"}, "v", "values attention received"),
        ({"attn_q": "attn.o"}, "q", "heads|queries attention received"),
        ({"attn_k": "attn.v"}, "k", "keys attention received"),
        ({"ln_final": "embed"}, "final_norm", "residual stream"),
        ({"mlp_out": "mlp.gate"}, "mlp_post", "output projection"),
        ({"attn_o": "attn.q"}, "z", "output projection"),
        ({"attn_qkv": "attn.o"}, "attn_in", "attn_in == norm"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_a_wrong_map_of_a_part_refuses_its_points(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str], point: str, reason: str
) -> None:
    swap(monkeypatch, **wrong)
    model = native(make("llama"))
    refusal = model.refusal(Address(point, None if point.startswith("final") else 0))
    assert refusal
    assert re.search(reason, refusal)


RAW = torch.arange(24.0).view(1, 2, 12)


@pytest.mark.parametrize("view", [Heads(3, 4), Gather(torch.tensor([[0, 6], [3, 9]]))], ids=["heads", "gather"])
def test_a_view_reads_back_what_it_writes_and_touches_nothing_else(view: View) -> None:
    raw = RAW.clone()
    new = -view.read(raw) - 1
    written = view.write(raw, new)
    assert torch.equal(view.read(written), new)
    assert torch.equal(raw, RAW)
    assert int((written != raw).sum()) == new.numel()
    assert torch.equal(view.write(raw, view.read(raw)), raw)


def test_a_divisor_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])
    assert Divisor(0.5, centred=False).read(x).item() == pytest.approx((50 / 4 + 0.5) ** 0.5)
    assert Divisor(0.5, centred=True).read(x).item() == pytest.approx((14 / 4 + 0.5) ** 0.5)
    assert Divisor(0.0, centred=True).read(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon_multi_query", "falcon_sequential"])
def test_the_layout_found_by_values_is_the_map_s_own(family: str) -> None:
    anatomy = native(shared(family)).anatomy
    assert anatomy.layout
    q, k, v = anatomy.layout.q, anatomy.layout.k, anatomy.layout.v
    mapped = anatomy.map.split_joint(q.numel() + k.numel() + v.numel())
    assert mapped
    assert all(torch.equal(ours.flatten(), theirs) for ours, theirs in zip((q, k, v), mapped, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon_grouped"])
def test_every_layout_uses_each_output_once(family: str) -> None:
    anatomy = anatomy_of(shared(family))
    width = (anatomy.n_heads + 2 * anatomy.n_kv_heads) * anatomy.d_head
    layouts = list(joint_layouts(anatomy.map, width, anatomy.n_heads, anatomy.n_kv_heads, anatomy.d_head))
    assert {"concatenated", "grouped"} <= {layout.name for layout in layouts}
    for layout in layouts:
        used: Tensor = torch.cat([part.flatten() for part in (layout.q, layout.k, layout.v)])
        assert torch.equal(used.sort().values, torch.arange(width))


def test_a_joint_projection_of_unknown_layout_refuses_q_k_v(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probes.models.verify.refusals.joint_layouts", lambda *_: iter(()))
    model = native(make("gpt2"))
    for point in "qkv":
        assert "joint query-key-value projection" in str(model.refusal(Address(point, 0)))
    assert model.refusal(Address("z", 0)) is None


@pytest.mark.parametrize(("family", "centred"), [("gpt2", False), ("llama", True)])
def test_a_wrong_word_on_the_kind_of_norm_refuses_the_scales(
    monkeypatch: pytest.MonkeyPatch, family: str, centred: bool
) -> None:
    monkeypatch.setattr("probes.anatomy.sites.divisor_of", lambda *_: Divisor(1e-5, centred))
    refused = native(make(family)).faithfulness.refused
    assert {"attn_scale", "mlp_scale", "final_scale"} == set(refused)


def test_an_architecture_without_a_map_is_refused() -> None:
    module: Any = shared("llama")
    with pytest.raises(ModelError, match=r"LlamaModel.*language-model head"):
        anatomy_of(module.model)
    with pytest.raises(ModelError, match="no Hugging Face config"):
        anatomy_of(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("n_vocab", "n_ctx", "avoid"), [(97, 64, None), (97, 64, 9), (97, 3, None), (50257, 1024, 0), (5, 8, 1)]
)
def test_probe_tokens_are_legal_and_differ_in_the_last_place_only(n_vocab: int, n_ctx: int, avoid: int | None) -> None:
    tokens = probe_tokens(n_vocab, n_ctx, avoid)
    assert tokens.min() >= 0
    assert tokens.max() < n_vocab
    assert tokens.shape[1] <= n_ctx
    assert avoid not in tokens.flatten().tolist()
    assert (tokens[0] != tokens[1]).nonzero().flatten().tolist() == [tokens.shape[1] - 1]
