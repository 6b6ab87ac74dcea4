"""From norms with constant scales to linear maps: first in the norms' own places, then inside the next weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from probes.anatomy import Anatomy, linear_weight
from probes.anatomy.constant_norm import ConstantNorm
from probes.errors import OptionError, PointError
from probes.norms.scales import Scale
from probes.norms.sites import Norm, NormSite, norms_of


def constant_scales(norms: tuple[Norm, ...], on: Mapping[NormSite, Scale]) -> dict[str, float]:
    """Return the one scale of each norm, by path.

    Raises:
        OptionError: a site that is not frozen, not constant, or not at the same scale as its norm's other sites.
    """
    scales = {}
    for norm in norms:
        missing = [site for site in norm.sites if site not in on]
        if missing:
            raise OptionError(f"site {missing[0]} is not frozen, so its norm is no linear map yet; freeze it first")
        values = {on[site].value for site in norm.sites}
        if len(values) != 1 or not all(on[site].constant for site in norm.sites):
            raise OptionError(
                f"the scale of {norm.sites[0]} differs between positions or paths; give its norm one number"
            )
        scales[norm.path] = values.pop()
    return scales


def make_constant(anatomy: Anatomy, on: Mapping[NormSite, Scale]) -> None:
    """Put a linear map in every norm's place, in the anatomy's own module; `on` holds every site's frozen scale.

    Raises:
        OptionError: see `constant_scales`.
    """
    norms = norms_of(anatomy)
    scales = constant_scales(norms, on)
    for norm in norms:
        replacement = ConstantNorm(norm.parts.gain / scales[norm.path], norm.parts.bias, norm.parts.centred)
        replace(anatomy.map.module, norm.path, replacement.train(norm.parts.norm.training))


def replace(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


@torch.no_grad()
def absorb(anatomy: Anatomy) -> None:
    """Multiply every constant norm into the linear maps beside it and leave an identity in its place.

    A norm before a map W, c becomes W' = (I - 11ᵀ/d) diag(g) W and c' = bW + c; one after a map (of what attention or
    MLP add, of queries and keys per head) scales its outputs. The unembedding gets weights of its own.

    Raises:
        PointError: something other than a linear map reads a norm, as in a mixture of experts.
    """
    root = anatomy.map.module
    plans = [plan for layer in range(anatomy.n_layers) for plan in _plans(anatomy, layer)]
    if (path := anatomy.map.path("ln_final")) and isinstance(root.get_submodule(path), ConstantNorm):
        plans.append((path, ("unembed",), None, True))
    for _, names, layer, _ in plans:
        for name in names:
            _linear(anatomy.component(name, layer), name, layer)
    _untie(anatomy)
    for path, names, layer, before in plans:
        norm = root.get_submodule(path)
        assert isinstance(norm, ConstantNorm)
        for name in names:
            fold = _fold_before if before else _fold_after
            fold(_linear(anatomy.component(name, layer), name, layer), norm)
    for path in dict.fromkeys(plan[0] for plan in plans):
        replace(root, path, nn.Identity())


_Plan = tuple[str, tuple[str, ...], int | None, bool]
"""(path of a norm, the components it is folded into, their layer, whether it runs before them)."""


def _plans(anatomy: Anatomy, layer: int) -> list[_Plan]:
    root, has = anatomy.map.module, anatomy.map.path

    def present(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if has(name, layer))

    attention = present("attn.qkv") or present("attn.q", "attn.k", "attn.v")
    # Without an input projection of its own the MLP is a mixture, whose gate alone is a linear map.
    mlp = present("mlp.in", "mlp.gate") if has("mlp.in", layer) else ("mlp",)
    shared = anatomy.parallel and not has("ln2", layer)
    candidates = (
        ("ln1", (*attention, *(mlp if shared else ())), True),
        ("ln2", mlp, True),
        ("ln1_post", ("attn.o",), False),
        ("ln2_post", ("mlp.out",), False),
        ("attn.q_norm", ("attn.q",), False),
        ("attn.k_norm", ("attn.k",), False),
    )
    return [
        (path, names, layer, before)
        for component, names, before in candidates
        if (path := has(component, layer)) and isinstance(root.get_submodule(path), ConstantNorm)
    ]


def _linear(module: nn.Module, name: str, layer: int | None) -> nn.Module:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point():
        return module
    where = name if layer is None else f"{name} of block {layer}"
    raise PointError(
        f"{where} is a {type(module).__name__}, no linear map, so the norm before it stays a map of its own"
    )


def _fold_before(linear: nn.Module, norm: ConstantNorm) -> None:
    weight = linear_weight(linear)
    w = weight.double()
    if norm.bias is not None:
        _set_bias(linear, w @ norm.bias.double(), add=True)
    w = w * norm.weight.double()
    if norm.centred:
        w = w - w.mean(1, keepdim=True)
    weight.copy_(w)


def _fold_after(linear: nn.Module, norm: ConstantNorm) -> None:
    if norm.centred:
        raise PointError("a norm that subtracts the mean after a linear map is not folded into that map")
    weight = linear_weight(linear)
    gain = norm.weight.double().repeat(weight.shape[0] // norm.weight.numel())
    weight.copy_(weight.double() * gain[:, None])
    if isinstance(getattr(linear, "bias", None), Tensor):
        linear.bias.copy_(linear.bias.double() * gain)  # type: ignore[union-attr,operator]
    if norm.bias is not None:
        _set_bias(linear, norm.bias.double().repeat(len(gain) // norm.bias.numel()), add=True)


def _set_bias(linear: nn.Module, value: Tensor, add: bool) -> None:
    old = getattr(linear, "bias", None)
    if isinstance(old, Tensor):
        old.copy_((old.double() + value) if add else value)
    else:
        linear.bias = nn.Parameter(value.to(linear_weight(linear).dtype))


def _untie(anatomy: Anatomy) -> None:
    """Give the unembedding weights of its own where it shares the embedding's."""
    embed, unembed = anatomy.component("embed"), anatomy.component("unembed")
    if unembed.weight is embed.weight:
        assert isinstance(unembed.weight, Tensor)
        unembed.weight = nn.Parameter(unembed.weight.detach().clone())
        for config in {id(c): c for c in _configs(anatomy.map.module)}.values():
            config.tie_word_embeddings = False


def _configs(module: nn.Module) -> list[Any]:
    config = getattr(module, "config", None)
    getter: Callable[[], Any] | None = getattr(config, "get_text_config", None)
    return [config, *([getter()] if getter else [])]
