"""Relevance against implementations of others: rules written out without gradients, and the AttnLRP authors' package where it is installed."""

from __future__ import annotations

import sys
from importlib import import_module, util
from types import ModuleType
from typing import Any

import pytest
import torch
from families import make
from torch import Tensor, nn

from probes.models.backends.native import NativeModel
from probes.planted.registry import build
from probes.relevance import relevance_of
from probes.relevance.read import TOKENS

IDS = torch.tensor([[5, 6, 7, 8, 11]])
TINY = 1e-12


def metric(logits: Tensor) -> Tensor:
    return logits[:, 5] - logits[:, 7]


def through(x: Tensor, weight: Tensor, share: Tensor) -> Tensor:
    """The relevance of x, for y = x W^T of relevance y * share."""
    return x * (share @ weight)


def over(relevance: Tensor, y: Tensor) -> Tensor:
    return torch.where(
        y.abs() > TINY, relevance / torch.where(y.abs() > TINY, y, torch.ones_like(y)), torch.zeros_like(y)
    )


class WrittenOut:
    """AttnLRP of a Llama in float64: every operation's relevance by its rule, from activations alone."""

    def __init__(self, module: Any) -> None:
        self.module, self.config = module, module.config
        self.heads, self.kv = self.config.num_attention_heads, self.config.num_key_value_heads
        self.d_head = self.config.hidden_size // self.heads

    def weight(self, part: nn.Module) -> Tensor:
        return part.weight.detach().double()  # type: ignore[operator, union-attr]

    def norm(self, part: Any, x: Tensor) -> Tensor:
        return self.weight(part) * x / (x.square().mean(-1, keepdim=True) + part.variance_epsilon).sqrt()

    def turned(self, x: Tensor, back: bool = False) -> Tensor:
        """Rotary positions of [pos, head, d_head]; `back` is the transposed map."""
        half = self.d_head // 2
        cos, sin = (t[0].double()[:, None] for t in self.module.model.rotary_emb(x, torch.arange(len(x))[None]))
        sin = -sin if back else sin
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    @torch.no_grad()
    def tokens(self) -> tuple[Tensor, Tensor]:
        """Relevance [pos] of tokens, and [layer, head] of heads."""
        x = self.module.model.embed_tokens(IDS)[0].double()
        layers = []
        for block in self.module.model.layers:
            seen: dict[str, Tensor] = {"x": x}
            seen["n1"] = self.norm(block.input_layernorm, x)
            q, k, v = (
                (seen["n1"] @ self.weight(getattr(block.self_attn, f"{name}_proj")).T).unflatten(-1, (-1, self.d_head))
                for name in "qkv"
            )
            seen |= {"q": q, "k": k, "v": v, "tq": self.turned(q), "tk": self.turned(k)}
            groups = self.heads // self.kv
            keys, values = (t.repeat_interleave(groups, 1) for t in (seen["tk"], v))
            scores = torch.einsum("ihd,jhd->hij", seen["tq"], keys) / self.d_head**0.5
            mask = torch.ones_like(scores).tril().bool()
            pattern = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            z = torch.einsum("hij,jhd->ihd", pattern, values)
            out = z.flatten(1) @ self.weight(block.self_attn.o_proj).T
            mid = x + out
            n2 = self.norm(block.post_attention_layernorm, mid)
            gate, up = (n2 @ self.weight(getattr(block.mlp, f"{name}_proj")).T for name in ("gate", "up"))
            hidden = nn.functional.silu(gate) * up
            mlp = hidden @ self.weight(block.mlp.down_proj).T
            seen |= {
                "keys": keys,
                "values": values,
                "scores": scores,
                "pattern": pattern,
                "z": z,
                "out": out,
                "mid": mid,
            }
            seen |= {"n2": n2, "gate": gate, "up": up, "hidden": hidden, "mlp": mlp}
            x = mid + mlp
            layers.append((block, seen, x))
        normed = self.norm(self.module.model.norm, x)
        head = self.weight(self.module.lm_head)
        share = torch.zeros(len(x), len(head), dtype=torch.float64)
        share[-1, 5], share[-1, 7] = 1, -1
        relevance, heads = through(normed, head, share), []
        for block, seen, after in reversed(layers):
            relevance, z = self.block(block, seen, after, relevance)
            heads.append(z.sum((0, 2)))
        return relevance.sum(-1), torch.stack(heads[::-1])

    def block(self, block: Any, seen: dict[str, Tensor], after: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
        share = over(relevance, after)
        to_mlp, to_mid = seen["mlp"] * share, seen["mid"] * share
        hidden = through(seen["hidden"], self.weight(block.mlp.down_proj), over(to_mlp, seen["mlp"]))
        for name in ("gate", "up"):  # half each; activation and norm pass theirs on
            to_mid = to_mid + through(
                seen["n2"], self.weight(getattr(block.mlp, f"{name}_proj")), over(hidden / 2, seen[name])
            )
        share = over(to_mid, seen["mid"])
        to_x = seen["x"] * share
        z = through(seen["z"].flatten(1), self.weight(block.self_attn.o_proj), share).view_as(seen["z"])
        part = over(z, seen["z"]) / 2
        to_v = seen["values"] * torch.einsum("hij,ihd->jhd", seen["pattern"], part)
        to_a = seen["pattern"] * torch.einsum("ihd,jhd->hij", part, seen["values"])
        scores = seen["scores"].masked_fill(seen["pattern"] == 0, 0)
        to_s = scores * (to_a - seen["pattern"] * to_a.sum(-1, keepdim=True))
        part = over(to_s, scores) / 2 / self.d_head**0.5
        to_q = seen["tq"] * torch.einsum("hij,jhd->ihd", part, seen["keys"])
        to_k = seen["keys"] * torch.einsum("hij,ihd->jhd", part, seen["tq"])
        groups = len(seen["scores"]) // self.kv
        to_k, to_v = (t.unflatten(1, (self.kv, groups)).sum(2) for t in (to_k, to_v))
        for name, rel in (("q", to_q), ("k", to_k), ("v", to_v)):
            if name != "v":
                rel = seen[name] * self.turned(over(rel, seen[f"t{name}"]), back=True)
            weight = self.weight(getattr(block.self_attn, f"{name}_proj"))
            to_x = to_x + through(seen["n1"], weight, over(rel, seen[name]).flatten(1))
        return to_x, z


def test_rules_written_out_without_gradients_give_the_same() -> None:
    module = make("llama")
    tokens, heads = WrittenOut(module).tokens()
    read = relevance_of(NativeModel(module, ref="written", weights="written"), IDS, metric)
    assert torch.allclose(read.score(TOKENS)[0].double(), tokens, atol=1e-4 * float(tokens.abs().max()))
    assert torch.allclose(read.layers("z")[0].sum(1).double(), heads, atol=1e-4 * float(heads.abs().max()))


def lxt_part(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """A module of the AttnLRP authors' package, past its `__init__`, which imports every family it knows at once."""
    spec = util.find_spec("lxt")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("lxt is not installed: pip install --no-deps lxt")
    root = next(iter(spec.submodule_search_locations))
    for package in ("lxt.efficient", "lxt.efficient.models"):
        bare = ModuleType(package)
        bare.__path__ = [f"{root}/{package.partition('.')[2].replace('.', '/')}"]
        monkeypatch.setitem(sys.modules, package, bare)
    return import_module(name)


@pytest.mark.parametrize("rule", ["attnlrp", "cp"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_authors_package_gives_the_same(family: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = lxt_part(monkeypatch, "lxt.efficient.patches")
    module = make(family)
    read = relevance_of(NativeModel(module, ref="lxt", weights="lxt"), IDS, metric, rule)
    modeling = import_module(f"transformers.models.{family}.modeling_{family}")
    wrap = patches.wrap_attention_forward if rule == "attnlrp" else patches.cp_wrap_attention_forward
    monkeypatch.setattr(modeling, "eager_attention_forward", wrap(modeling.eager_attention_forward))
    if family == "llama":
        gated = patches.gated_mlp_forward if rule == "attnlrp" else patches.cp_gated_mlp_forward
        monkeypatch.setattr(modeling.LlamaMLP, "forward", gated)
        monkeypatch.setattr(modeling.LlamaRMSNorm, "forward", patches.rms_norm_forward)
        embedding = module.get_submodule("model.embed_tokens")
    else:
        own = lxt_part(monkeypatch, "lxt.efficient.models.gpt2")
        monkeypatch.setattr(modeling.GPT2MLP, "forward", own.mlp_forward)
        monkeypatch.setattr(nn.LayerNorm, "forward", patches.layer_norm_forward)
        embedding = module.get_submodule("transformer.wte")
    module.set_attn_implementation("eager")  # type: ignore[operator]
    rows = embedding(IDS).detach().requires_grad_()
    value = metric(module(inputs_embeds=rows, use_cache=False).logits[:, -1])
    assert torch.allclose(value, read.metric, atol=1e-5)
    gradient = torch.autograd.grad(value.sum(), rows)[0]
    theirs = (read.values[TOKENS] * gradient).sum(-1)
    assert torch.allclose(read.score(TOKENS), theirs, atol=1e-4 * float(theirs.abs().max()))


def test_what_acts_through_keys_alone_is_seen_by_attnlrp_and_not_by_cp() -> None:
    """Planted K1: head 0.1 looks back one token, and head 1.1 uses what it writes as its keys alone."""
    task = build("K1")
    model = NativeModel(task.module, ref="K1", weights="K1")
    example = task.examples[0]
    read = {
        rule: relevance_of(
            model, torch.tensor([example.tokens]), lambda l: l[:, example.answer] - l[:, example.partner_answer], rule  # noqa: E741
        ).layers("z")[0].sum(1)
        for rule in ("attnlrp", "cp")
    }  # fmt: skip
    assert float(read["cp"][0].abs().max()) == 0
    assert int(read["attnlrp"][0].abs().argmax()) == 1
    assert float(read["attnlrp"][0, 1]) > 0.1
    assert all(int(values[1].argmax()) == 1 for values in read.values())
