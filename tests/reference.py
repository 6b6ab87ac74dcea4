"""What every point must be, computed without this package: plain hooks by written-out module names, and the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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


def _capture_modules(module: nn.Module, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Every named module's first input as `<`name and output as `>`name, and the logits."""
    captured: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            entering = args[0] if args else kwargs.get("hidden_states")
            for side, value in (("<", entering), (">", output)):
                if isinstance(value, Tensor) or (isinstance(value, tuple) and isinstance(value[0], Tensor)):
                    flat = _plain(value).clone()
                    one_axis = flat.dim() == 2 and flat.shape[0] == tokens.numel()
                    captured[side + name] = flat.view(*tokens.shape, -1) if one_axis else flat

        return hook

    handles = [m.register_forward_hook(listen(n), with_kwargs=True) for n, m in module.named_modules() if n]
    try:
        with torch.no_grad():
            logits = module(tokens).logits
    finally:
        for handle in handles:
            handle.remove()
    return captured, logits


def _divisor(x: Tensor, norm: Any, centred: bool) -> Tensor:
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    x = x.double()
    x = x - x.mean(-1, keepdim=True) if centred else x
    return ((x**2).sum(-1) / x.shape[-1] + eps).sqrt().float()


@cache
def _eager(family: str) -> Any:
    plain: Any = shared(family)
    # Built anew, because some families choose their attention when they are made.
    module = type(plain)._from_config(copy.deepcopy(plain.config), attn_implementation="eager").eval()
    module.load_state_dict(plain.state_dict())
    return module


def _eager_patterns(family: str, tokens: Tensor) -> tuple[Tensor, ...] | None:
    with torch.no_grad():
        patterns: tuple[Tensor, ...] | None = _eager(family)(tokens, output_attentions=True).attentions
    return patterns


@cache
def expected(family: str) -> Mapping[str, Tensor]:
    """Address to tensor for two rows of nine tokens, for every point the family has."""
    module, names, tokens = shared(family), NAMES[family], prompt(rows=2)
    captured, logits = _capture_modules(module, tokens)
    out = {"logits": logits, "embed": captured[">" + names.embed]}
    patterns = _eager_patterns(family, tokens)
    n_layers = len(module.get_submodule(names.blocks))  # type: ignore[arg-type]
    with torch.no_grad():
        for layer in range(n_layers):
            block = f"{names.blocks}.{layer}"
            values = _block(module, names, captured, block)
            if patterns is not None:
                values["pattern"] = patterns[layer]
            out |= {f"{point}.{layer}": value for point, value in values.items()}
        if names.final:
            norm = module.get_submodule(names.final)
            last = out[f"resid_post.{n_layers - 1}"]
            out |= {"final_norm": norm(last), "final_scale": _divisor(last, norm, names.centred)}
    return out


def _block(module: nn.Module, names: Names, captured: Mapping[str, Tensor], block: str) -> dict[str, Tensor]:
    part = module.get_submodule(block)
    attention: Any = part.get_submodule(names.attn)
    pre, post = captured["<" + block], captured[">" + block]
    d_head = captured[f"<{block}.{names.o}"].shape[-1] // module.config.num_attention_heads  # type: ignore[union-attr,operator]
    z = captured[f"<{block}.{names.o}"]
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
        out["mlp_post"] = captured[f"<{block}.{names.down}"]
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


Edit = Callable[[Tensor], Tensor]


def edit(old: Tensor) -> Tensor:
    """The edit that backends are held to, of a point's tensor: everywhere in the first row, at one position in the second."""
    first, second = old.clone().split(1)
    # Rolled, because a norm undoes a mere change of scale or mean.
    second[:, 2] = second[:, 2].roll(1, -1) - 1
    return torch.cat((first.roll(1, -1) * 1.5 + 0.25, second))


@cache
def edited(family: str, point: str, layer: int) -> Tensor:
    """The logits for two rows of nine tokens with one point edited, by plain hooks (of layer 0 where it has no layer)."""
    tokens = prompt(rows=2)
    module = _eager(family) if point == "pattern" else shared(family)
    with torch.no_grad(), ExitStack() as undo:
        if point == "pattern":
            undo.enter_context(_softmax_edited(layer))
        else:
            _install(module, NAMES[family], point, layer, edit, undo)
        logits: Tensor = module(tokens).logits
    return edit(logits) if point == "logits" else logits


@contextmanager
def _softmax_edited(layer: int) -> Iterator[None]:
    """Within, the softmax of one layer's eager attention gives edited probabilities."""
    original, passed = nn.functional.softmax, [0]

    def softmax(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = original(scores, *args, **kwargs)
        if out.dim() != 4:
            return out
        passed[0] += 1
        return edit(out) if passed[0] == layer + 1 else out

    nn.functional.softmax = softmax  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.softmax = original


def _install(module: nn.Module, names: Names, point: str, layer: int, change: Edit, undo: ExitStack) -> None:
    block = f"{names.blocks}.{layer}"
    part: Any = module.get_submodule(block)
    heads = module.config.num_attention_heads  # type: ignore[union-attr]

    def on_input(path: str, edit: Edit, in_place: bool = False) -> None:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            old = args[0] if args else kwargs["hidden_states"]
            flat = old.dim() == 2
            new = edit(old.view(2, 9, -1) if flat else old)
            new = new.flatten(0, 1) if flat else new
            if in_place:
                old.copy_(new)
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        handle = module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
        undo.callback(handle.remove)

    def on_output(path: str, edit: Edit) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            old = _plain(output)
            flat = old.dim() == 2
            new = edit(old.view(2, 9, -1) if flat else old)
            new = new.flatten(0, 1) if flat else new
            return new if isinstance(output, Tensor) else (new, *output[1:])

        undo.callback(module.get_submodule(path).register_forward_hook(hook).remove)

    def by_heads(x: Tensor) -> Tensor:
        return change(x.unflatten(-1, (heads, -1))).flatten(-2)

    own = ("query", "key", "value") if names.qkv.startswith("attention.self") else ("q", "k", "v")
    projections = [names.qkv] if names.split else [names.qkv.format(name) for name in own]
    if point in ("q", "k", "v"):
        which = "qkv".index(point)
        if names.split is None:
            d_head = part.get_submodule(names.o).weight.shape[-1] // heads
            on_output(f"{block}.{projections[which]}", lambda x: change(x.unflatten(-1, (-1, d_head))).flatten(-2))
        else:
            on_output(f"{block}.{names.qkv}", _columns(part.get_submodule(names.attn), names.split, which, change))
        return
    gate = f"{block}.{names.up.replace('up', 'gate')}"
    has_gate = "up_proj" in names.up and names.down is not None
    mlp_inputs = [f"{block}.mlp"] if names.down is None else [f"{block}.{names.up}", *([gate] if has_gate else [])]
    mid = next((f"{block}.{n}" for n in (names.ln2, None if names.down is None else "mlp") if n), f"{block}.mlp")
    inputs = {
        "resid_pre": [block],
        "attn_in": [f"{block}.{name}" for name in projections],
        "mlp_in": mlp_inputs,
        "mlp_post": [f"{block}.{names.down}"],
    }
    outputs = {
        "resid_post": block,
        "attn_out": f"{block}.{names.attn_added or names.o}",
        "mlp_out": f"{block}.{names.mlp_added or names.down}",
        "embed": names.embed,
        "final_norm": names.final,
    }
    if point == "z":
        on_input(f"{block}.{names.o}", by_heads)
    elif point == "resid_mid":
        on_input(mid, change, in_place=True)
    elif point in inputs:
        for path in inputs[point]:
            on_input(path, change)
    elif point in outputs:
        on_output(str(outputs[point]), change)


def _columns(attention: Any, split: Split, which: int, change: Edit) -> Edit:
    """The edit of one of q, k, v on the output of a joint projection, whose columns the model's own code tells."""

    def edit(x: Tensor) -> Tensor:
        index = torch.arange(x.shape[-1], dtype=torch.float32).expand(x.shape)
        columns = split(attention, index)[which][0, 0].long()
        out = x.clone()
        out[..., columns] = change(x[..., columns])
        return out

    return edit
