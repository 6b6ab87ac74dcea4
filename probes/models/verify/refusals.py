"""Points compared with what the model itself computed; those that differ are refused, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from probes.anatomy import Anatomy, Layout, joint_layouts
from probes.anatomy.views import Divisor
from probes.errors import PointError
from probes.hooks.attention_probabilities import Attended, grouped
from probes.models.placement import data_of
from probes.models.unembedding import apply
from probes.models.verify.recording import Recording, deviation, every_site
from probes.points import POINTS, Address

_SCALES = ("attn_scale", "mlp_scale", "final_scale")
_IDENTITY = {
    "q": "q == the queries attention received",
    "k": "k == the keys attention received",
    "v": "v == the values attention received",
    "pattern": "z == pattern @ v",
    "z": "attention's output == its output projection of z",
    "mlp_post": "the MLP's output == its output projection of mlp_post",
    "attn_in": "attn_in == norm(resid_pre)",
    "mlp_in": "mlp_in == norm(resid_mid)",
    **{point: f"norm output == input / {point} * weight" for point in _SCALES},
}


def refusals(
    anatomy: Anatomy, seen: Recording, attended: Mapping[int, Attended] | str, causal: bool, tolerance: float
) -> tuple[Anatomy, dict[str, float]]:
    """Return the anatomy with its joint layout chosen and false points refused, and the errors of the identities that hold."""
    seen_attention = {} if isinstance(attended, str) else attended
    layout, against = _layout(anatomy, seen, seen_attention, causal, tolerance)
    anatomy = replace(anatomy, layout=layout)
    seen = Recording(seen.raw, every_site(anatomy))
    refused: dict[str, str] = dict.fromkeys("qkv", against) if against else {}
    refused |= {name: reason for name in POINTS if name not in refused and (reason := _misfit(anatomy, seen, name))}
    if isinstance(attended, str):
        refused["pattern"] = attended
    errors = {
        **_attention_errors(anatomy, seen, seen_attention, causal, refused),
        **_scale_errors(anatomy, seen),
        **_part_errors(anatomy, seen),
    }
    holding: dict[str, float] = {}
    for point, error in errors.items():
        if error <= tolerance and point not in refused:
            holding[_IDENTITY[point]] = error
        elif point not in refused:
            refused[point] = f"{_IDENTITY[point]} does not hold on this model (off by {error:.1e} relative)"
    if reason := _final_norm(anatomy, seen, tolerance):
        refused |= {"final_norm": reason, "final_scale": reason}
        holding.pop(_IDENTITY["final_scale"], None)
    return replace(anatomy, refused=refused), holding


def _misfit(anatomy: Anatomy, seen: Recording, name: str) -> str | None:
    """Why a point's tensors do not have the shape its meaning says, or None."""
    for address in seen.sites:
        if address.point == name:
            try:
                width = seen.need(address).shape[-1]
            except PointError as error:
                return str(error)
            if POINTS[name].dims[-1] == "d_model" and width != anatomy.map.sizes.d_model:
                return f"{address}: its width is {width}, not that of the residual stream, {anatomy.map.sizes.d_model}"
    return None


def _layout(
    anatomy: Anatomy, seen: Recording, attended: Mapping[int, Attended], causal: bool, tolerance: float
) -> tuple[Layout | None, str | None]:
    """The layout of a joint projection under which its values are those attention mixed; a reason where none is."""
    joint = [(layer, path) for layer in range(anatomy.n_layers) if (path := anatomy.map.path("attn.qkv", layer))]
    if not joint:
        return None, None
    raws = {layer: seen.raw[path, "output"] for layer, path in joint if (path, "output") in seen.raw}
    width = next(iter(raws.values())).shape[-1] if raws else 0
    for layout in joint_layouts(anatomy.map, width, anatomy.n_heads, anatomy.n_kv_heads, anatomy.d_head):
        errors = [_value_error(seen, layer, raw[..., layout.v], attended, causal) for layer, raw in raws.items()]
        if all(error is not None and error <= tolerance for error in errors):
            return layout, None
    return None, (
        f"no known layout of {anatomy.map.architecture}'s joint query-key-value projection gives the values its "
        "attention mixes"
    )


def _value_error(
    seen: Recording, layer: int, v: Tensor, attended: Mapping[int, Attended], causal: bool
) -> float | None:
    """Deviation of v [batch, pos, kv_head, d_head] from what attention mixed; None where nothing tells.

    Where the attention function was not seen, the first position of a causal model tells: it attends to itself only,
    so its `z` is its `v`.
    """
    if layer in attended:
        return deviation(_as_rows(attended[layer].value, v.shape[2]), v)
    z = Address("z", layer)
    if not causal or seen.lacks(z):
        return None
    first = seen.need(z)[:, :1]
    return deviation(v[:, :1].repeat_interleave(first.shape[2] // v.shape[2], dim=2), first)


def _as_rows(states: Tensor, heads: int) -> Tensor:
    """[batch, head, pos, width] to [batch, pos, heads, width]; heads repeated for their group are taken once."""
    return states[:, :: max(1, states.shape[1] // heads)].transpose(1, 2)


def _attention_errors(
    anatomy: Anatomy, seen: Recording, attended: Mapping[int, Attended], causal: bool, refused: Mapping[str, str]
) -> dict[str, float]:
    """Worst error over layers of what can be said of q, k, v and pattern."""
    worst: dict[str, float] = {}

    def note(point: str, error: float | None) -> None:
        if error is not None:
            worst[point] = max(worst.get(point, 0.0), error)

    for layer in range(anatomy.n_layers):
        if "v" not in refused and not seen.lacks(Address("v", layer)):
            note("v", _value_error(seen, layer, seen.need(Address("v", layer)), attended, causal))
        if layer in anatomy.patterns and "v" not in refused:
            pattern = seen.need(Address("pattern", layer))
            values = seen.need(Address("v", layer)).transpose(1, 2)
            mixed = pattern.float() @ grouped(values, pattern.shape[1]).float()
            note("pattern", deviation(mixed.transpose(1, 2), seen.need(Address("z", layer))))
        if layer not in attended:
            continue
        here = attended[layer]
        if not seen.lacks(Address("z", layer)):
            mixed = here.pattern @ grouped(here.value, here.query.shape[1]).float()
            note("pattern", deviation(mixed.transpose(1, 2), seen.need(Address("z", layer))))
        for point, states in (("q", here.query), ("k", here.key)):
            if point not in refused and not seen.lacks(Address(point, layer)):
                note(point, _unrotated_error(anatomy, seen.need(Address(point, layer)), states, f"{point}_norm", layer))
    return worst


def _unrotated_error(anatomy: Anatomy, rows: Tensor, states: Tensor, norm: str, layer: int) -> float | None:
    """Deviation of each head's first row [batch, 1, head, d_head] from what attention received, up to order and length.

    At the first position rotary embedding is the identity (up to a permutation in some models, and a factor in others).
    """
    first = rows[:, :1]
    if anatomy.map.path(f"attn.{norm}", layer):
        module = anatomy.component(f"attn.{norm}", layer)
        weight = next(module.parameters(), None)
        flat = weight is not None and weight.numel() == first[0, 0].numel()
        shaped = first.flatten(2) if flat else first
        first = apply(module, shaped).reshape(first.shape)
    expected = _as_rows(states, rows.shape[2])[:, :1]

    def canonical(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x.float(), dim=-1).sort(-1).values

    return deviation(canonical(first), canonical(expected)) if first.shape == expected.shape else float("inf")


def _scale_errors(anatomy: Anatomy, seen: Recording) -> dict[str, float]:
    """Worst error over layers of `norm output == input / scale * weight (+ bias)`."""
    worst: dict[str, float] = {}
    for address, site in seen.sites.items():
        view = site.view
        if address.point not in _SCALES or not isinstance(view, Divisor) or seen.lacks(address):
            continue
        path = site.modules[0]
        divided, output = view.normalised(seen.raw[path, "input"]), seen.raw[path, "output"]
        error = _norm_error(anatomy.map.module.get_submodule(path), divided, output)
        worst[address.point] = max(worst.get(address.point, 0.0), error)
    return worst


def _norm_error(norm: nn.Module, divided: Tensor, output: Tensor) -> float:
    """Deviation of `output` from `divided` times the norm's weight, which some models keep less one."""
    weight, bias = (_on_cpu(data_of(norm, name)) for name in ("weight", "bias"))
    if weight is not None and weight.shape != divided.shape[-1:]:
        return float("inf")
    scaled = [divided] if weight is None else [divided * weight, divided * (1 + weight)]
    return min(deviation(x if bias is None else x + bias, output) for x in scaled)


def _part_errors(anatomy: Anatomy, seen: Recording) -> dict[str, float]:
    """Worst error over layers of what ties z and mlp_post to their parts' outputs, and inputs to the stream."""
    worst: dict[str, float] = {}

    def note(point: str, actual: Tensor | None, expected: Tensor | None) -> None:
        if actual is not None and expected is not None:
            worst[point] = max(worst.get(point, 0.0), deviation(actual, expected))

    def output(component: str, layer: int) -> Tensor | None:
        path = anatomy.map.path(component, layer)
        return seen.raw.get((path, "output")) if path else None

    for layer in range(anatomy.n_layers):
        if anatomy.kind != "post_norm":
            note("z", output("attn.o", layer), output("attn", layer))
            note("mlp_post", output("mlp.out", layer), output("mlp", layer))
        for point, stream, norm in (("attn_in", "resid_pre", "ln1"), ("mlp_in", "resid_mid", "ln2")):
            at, of = Address(point, layer), Address(stream, layer)
            if seen.lacks(at) or seen.lacks(of):
                continue
            normed = seen.need(of)
            if anatomy.kind != "post_norm" and anatomy.map.path(norm, layer):
                normed = apply(anatomy.component(norm, layer), normed)
            note(point, normed, seen.need(at))
    return worst


def _on_cpu(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().float().cpu()


def _final_norm(anatomy: Anatomy, seen: Recording, tolerance: float) -> str | None:
    """Why the mapped final norm does not act on the residual stream, or None."""
    path = anatomy.map.path("ln_final")
    if path is None:
        return None
    last = seen.need(Address("resid_post", anatomy.n_layers - 1))
    entering = seen.raw.get((path, "input"))
    if entering is not None and deviation(entering, last) <= tolerance:
        return None
    return f"the norm before the unembedding of {anatomy.map.architecture} does not act on the residual stream"
