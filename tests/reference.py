"""What every point must be, computed without this package: plain hooks by written-out module names, and the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from families import prompt, shared
from torch import Tensor, nn

Split = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Names:
    """Module names of one family as its authors wrote them; `None` where it has no such part."""

    blocks: str = "model.layers"
    embed: str = "model.embed_tokens"
    final: str | None = "model.norm"
    ln1: str | None = "input_layernorm"
    ln2: str | None = "post_attention_layernorm"
    attn: str = "self_attn"
    qkv: str = "self_attn.{}_proj"
    o: str = "self_attn.o_proj"
    up: str = "mlp.up_proj"
    down: str | None = "mlp.down_proj"
    attn_added: str | None = None
    """What is added after attention, where that is not the output projection."""
    mlp_added: str | None = None
    kind: str = "sequential"
    split: Split | None = None
    """How the model itself cuts its joint projection's output [batch, pos, width] into q, k, v by heads."""
    centred: bool = False


def _thirds(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)) for part in x.chunk(3, dim=-1))
    return q, k, v


def _per_head(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = x.unflatten(-1, (-1, 3, attention.head_size)).unbind(-2)
    return q, k, v


def _falcon(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = attention._split_heads(x)
    # The grouped layout repeats each key and value head for its group.
    step = k.shape[2] // attention.num_kv_heads
    return q, k[:, :, ::step], v[:, :, ::step]


_SANDWICH = Names(
    ln2="pre_feedforward_layernorm", attn_added="post_attention_layernorm", mlp_added="post_feedforward_layernorm"
)
_GPT_NEOX = Names(
    blocks="gpt_neox.layers", embed="gpt_neox.embed_in", final="gpt_neox.final_layer_norm", attn="attention",
    qkv="attention.query_key_value", o="attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
    kind="parallel", split=_per_head, centred=True,
)  # fmt: skip
_FALCON = Names(
    blocks="transformer.h", embed="transformer.word_embeddings", final="transformer.ln_f", ln2="input_layernorm",
    attn="self_attention", qkv="self_attention.query_key_value", o="self_attention.dense", up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h", kind="parallel", split=_falcon, centred=True,
)  # fmt: skip
_OPT = Names(
    blocks="model.decoder.layers", embed="model.decoder.embed_tokens", final="model.decoder.final_layer_norm",
    ln1="self_attn_layer_norm", ln2="final_layer_norm", o="self_attn.out_proj", up="fc1", down="fc2", centred=True,
)  # fmt: skip


def _but(names: Names, **changes: Any) -> Names:
    return Names(**{**vars(names), **changes})


NAMES: Mapping[str, Names] = {
    "gpt2": Names(
        blocks="transformer.h", embed="transformer.wte", final="transformer.ln_f", ln1="ln_1", ln2="ln_2", attn="attn",
        qkv="attn.c_attn", o="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj", split=_thirds, centred=True,
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), Names()),
    **dict.fromkeys(("gemma2", "gemma3"), _SANDWICH),
    "gpt_neox": _GPT_NEOX,
    "gpt_neox_sequential": _but(_GPT_NEOX, kind="sequential"),
    "phi": Names(
        final="model.final_layernorm", ln2="input_layernorm", o="self_attn.dense", up="mlp.fc1", down="mlp.fc2",
        kind="parallel", centred=True,
    ),
    "opt": _OPT,
    "opt_post_norm": _but(_OPT, kind="post_norm", final=None),
    "falcon_multi_query": _FALCON,
    "falcon_grouped": _but(_FALCON, ln1="ln_attn", ln2="ln_mlp"),
    "falcon_sequential": _but(_FALCON, kind="sequential", ln2="post_attention_layernorm"),
    "olmo2": Names(
        ln1=None, ln2=None, attn_added="post_attention_layernorm", mlp_added="post_feedforward_layernorm"
    ),
    "mixtral": Names(down=None, mlp_added="mlp"),
    "bert": Names(
        blocks="bert.encoder.layer", embed="bert.embeddings.word_embeddings", final=None,
        ln1="attention.output.LayerNorm", ln2="output.LayerNorm", attn="attention.self", qkv="attention.self.{}",
        o="attention.output.dense", up="intermediate.dense", down="output.dense", kind="post_norm", centred=True,
    ),
}  # fmt: skip

_POST_NORM = frozenset({"resid_mid", "attn_scale", "mlp_scale", "final_norm", "final_scale"})

REFUSED: Mapping[str, frozenset[str]] = {
    "gpt_neox": frozenset({"resid_mid"}),
    "phi": frozenset({"resid_mid"}),
    "falcon_multi_query": frozenset({"resid_mid"}),
    "falcon_grouped": frozenset({"resid_mid"}),
    "olmo2": frozenset({"attn_scale", "mlp_scale"}),
    "mixtral": frozenset({"mlp_post"}),
    "bert": _POST_NORM,
    "opt_post_norm": _POST_NORM | {"embed"},
}
"""Points that a family does not have by construction; every backend must refuse them."""


def _plain(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _hear(module: nn.Module, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Every named module's first input as `<`name and output as `>`name, and the logits."""
    heard: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            entering = args[0] if args else kwargs.get("hidden_states")
            for side, value in (("<", entering), (">", output)):
                if isinstance(value, Tensor) or (isinstance(value, tuple) and isinstance(value[0], Tensor)):
                    flat = _plain(value).clone()
                    one_axis = flat.dim() == 2 and flat.shape[0] == tokens.numel()
                    heard[side + name] = flat.view(*tokens.shape, -1) if one_axis else flat

        return hook

    handles = [m.register_forward_hook(listen(n), with_kwargs=True) for n, m in module.named_modules() if n]
    try:
        with torch.no_grad():
            logits = module(tokens).logits
    finally:
        for handle in handles:
            handle.remove()
    return heard, logits


def _divisor(x: Tensor, norm: Any, centred: bool) -> Tensor:
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    x = x.double()
    x = x - x.mean(-1, keepdim=True) if centred else x
    return ((x**2).sum(-1) / x.shape[-1] + eps).sqrt().float()


def _eager_patterns(family: str, tokens: Tensor) -> tuple[Tensor, ...] | None:
    plain: Any = shared(family)
    # Built anew, because some families choose their attention when they are made.
    module = type(plain)._from_config(copy.deepcopy(plain.config), attn_implementation="eager").eval()
    module.load_state_dict(plain.state_dict())
    with torch.no_grad():
        found: tuple[Tensor, ...] | None = module(tokens, output_attentions=True).attentions
    return found


@cache
def expected(family: str) -> Mapping[str, Tensor]:
    """Address to tensor for two rows of nine tokens, for every point the family has."""
    module, names, tokens = shared(family), NAMES[family], prompt(rows=2)
    heard, logits = _hear(module, tokens)
    out = {"logits": logits, "embed": heard[">" + names.embed]}
    patterns = _eager_patterns(family, tokens)
    n_layers = len(module.get_submodule(names.blocks))  # type: ignore[arg-type]
    with torch.no_grad():
        for layer in range(n_layers):
            block = f"{names.blocks}.{layer}"
            found = _block(module, names, heard, block)
            if patterns is not None:
                found["pattern"] = patterns[layer]
            out |= {f"{point}.{layer}": value for point, value in found.items()}
        if names.final:
            norm = module.get_submodule(names.final)
            last = out[f"resid_post.{n_layers - 1}"]
            out |= {"final_norm": norm(last), "final_scale": _divisor(last, norm, names.centred)}
    return out


def _block(module: nn.Module, names: Names, heard: Mapping[str, Tensor], block: str) -> dict[str, Tensor]:
    part = module.get_submodule(block)
    attention: Any = part.get_submodule(names.attn)
    pre, post = heard["<" + block], heard[">" + block]
    d_head = heard[f"<{block}.{names.o}"].shape[-1] // module.config.num_attention_heads  # type: ignore[union-attr,operator]
    z = heard[f"<{block}.{names.o}"]
    added = part.get_submodule(names.o)(z)
    if names.attn_added:
        added = part.get_submodule(names.attn_added)(added)
    attn_in, mid = pre, pre + added
    out = {"resid_pre": pre, "resid_post": post, "attn_out": added, "z": z.unflatten(-1, (-1, d_head))}
    if names.kind == "post_norm":
        mid = part.get_submodule(names.ln1)(mid)
    elif names.ln1:
        norm = part.get_submodule(names.ln1)
        attn_in = norm(pre)
        out["attn_scale"] = _divisor(pre, norm, names.centred)
    mlp_from = pre if names.kind == "parallel" else mid
    out["mlp_in"] = mlp_from
    if names.ln2 and names.kind != "post_norm":
        norm = part.get_submodule(names.ln2)
        out["mlp_in"], out["mlp_scale"] = norm(mlp_from), _divisor(mlp_from, norm, names.centred)
    if names.kind == "sequential":
        out["resid_mid"] = mid
    if names.down:
        out["mlp_post"] = heard[f"<{block}.{names.down}"]
        out["mlp_out"] = part.get_submodule(names.down)(out["mlp_post"])
    if names.mlp_added:
        value = out["mlp_in"] if names.down is None else out["mlp_out"]
        out["mlp_out"] = _plain(part.get_submodule(names.mlp_added)(value))
    out["attn_in"] = attn_in
    return out | dict(zip("qkv", _projections(part, names, attention, attn_in, d_head), strict=True))


def _projections(part: nn.Module, names: Names, attention: Any, x: Tensor, d_head: int) -> tuple[Tensor, ...]:
    if names.split:
        return names.split(attention, part.get_submodule(names.qkv)(x))
    own = ("query", "key", "value") if names.qkv.startswith("attention.self") else ("q", "k", "v")
    return tuple(part.get_submodule(names.qkv.format(name))(x).unflatten(-1, (-1, d_head)) for name in own)
