"""The tensors that pass a model's sites in one small forward, kept for checking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from probes.anatomy import Anatomy, Kind, Site
from probes.anatomy.views import IdentityView
from probes.errors import PointError
from probes.hooks.attention_probabilities import Attended, reason_against, watched
from probes.hooks.forward_hooks import ForwardHooks
from probes.models.protocol import Read
from probes.points import Address, every_address

Key = TypeVar("Key")


@runtime_checkable
class Call(Protocol):
    """One plain forward of the model under check."""

    def __call__(
        self, tokens: Int[Tensor, "batch pos"], hooks: ForwardHooks | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits [batch, pos, d_vocab] of token ids [batch, pos]; the hooks see what passes their sites."""
        ...


def deviation(actual: Shaped[Tensor, ...], expected: Shaped[Tensor, ...]) -> float:
    """Return the largest |actual - expected| over the largest |expected|, in float32; infinite for other shapes or NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.float(), expected.float()
    error = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")


@dataclass(frozen=True, eq=False)
class Recording:
    """Raw module tensors by (path, side), and the sites that read them."""

    raw: Mapping[tuple[str, str], Tensor]
    sites: Mapping[Address, Site]

    def need(self, address: Address) -> Tensor:
        """Return the address's tensor [batch, pos, ...] on the CPU.

        Raises:
            PointError: it has no site, its module never ran, or its tensor does not have the shape of the point.
        """
        site = self.sites.get(address)
        if site is None:
            raise PointError(f"{address} has no place in this model")
        raw = self.raw.get((site.modules[0], site.side))
        if raw is None:
            raise PointError(f"{address}: module {site.modules[0]!r} never ran in a forward pass")
        try:
            return site.view.read(raw)
        except (RuntimeError, IndexError) as error:
            raise PointError(
                f"{address}: {site.modules[0]!r} carries {raw.shape[-1]} values a position, which do not divide into "
                f"this model's heads"
            ) from error

    def lacks(self, address: Address) -> bool:
        """Whether `need` would raise for the address."""
        try:
            self.need(address)
        except PointError:
            return True
        return False


def every_site(anatomy: Anatomy) -> dict[Address, Site]:
    """Return the site of every address the anatomy can place."""
    sites: dict[Address, Site] = {}
    for address in every_address(anatomy.n_layers):
        with suppress(PointError):
            sites[address] = anatomy.site(address)
    return sites


@dataclass(frozen=True, eq=False)
class Evidence:
    """The tensors of one small forward that the checks compare; all on the CPU."""

    logits: Float[Tensor, "batch pos d_vocab"]
    """[batch, pos, d_vocab], of a forward without hooks."""
    raw: Mapping[tuple[str, str], Tensor]
    """Module tensors by (path, side)."""
    attended: Mapping[int, Attended] | str
    """What each layer's attention function received, or the reason it cannot be had."""


def evidence_of(
    guess: Anatomy, call: Call, attended: Mapping[int, Attended] | str, tokens: Int[Tensor, "batch pos"]
) -> Evidence:
    """Gather the evidence of forwards over `tokens` [batch, pos] of a model in memory."""
    return Evidence(call(tokens).cpu(), record(checked_sites(guess), call, tokens), attended)


def checked_sites(guess: Anatomy) -> dict[tuple[str, str], Site]:
    """Return a site for every (path, side) that the checks compare, whichever kind the blocks turn out to be."""
    sites: dict[tuple[str, str], Site] = {}
    for kind in get_args(Kind):
        for site in every_site(replace(guess, kind=kind)).values():
            for path in site.modules:
                sites[path, site.side] = replace(site, modules=(path,), view=IdentityView())
    for path in _outputs(guess):
        sites[path, "output"] = Site((path,), "output")
    return sites


def record(
    sites: Mapping[tuple[str, str], Site], call: Call, tokens: Int[Tensor, "batch pos"]
) -> dict[tuple[str, str], Tensor]:
    """Run one forward over `tokens` [batch, pos] and return what passes the sites, copied to the CPU."""
    raw: dict[tuple[str, str], Tensor] = {}
    call(tokens, ForwardHooks(sites, kept_copies(sites, raw), {}, stop=False))
    return raw


def kept_copies(keys: Iterable[Key], seen: dict[Key, Tensor]) -> dict[Key, Read]:
    """Return reads that put what passes at each key into `seen`, copied to the CPU."""

    def read(key: Key, tensor: Tensor) -> None:
        seen[key] = tensor.detach().to("cpu", copy=True)

    return {key: partial(read, key) for key in keys}


def recorded(anatomy: Anatomy, call: Call, tokens: Int[Tensor, "batch pos"]) -> Recording:
    """Record one forward over `tokens` [batch, pos] as the anatomy's sites read it."""
    return Recording(record(checked_sites(anatomy), call, tokens), every_site(anatomy))


def _outputs(anatomy: Anatomy) -> list[str]:
    """Modules whose outputs the checks compare, besides the sites."""
    paths = [anatomy.map.path("ln_final")]
    for layer in range(anatomy.n_layers):
        names = ("ln1", "ln2", "attn", "attn.o", "attn.qkv", "mlp", "mlp.out")
        paths += [anatomy.map.path(name, layer) for name in names]
    return [path for path in paths if path]


def attention_layers(module: nn.Module, anatomy: Anatomy) -> dict[nn.Module, int]:
    """Return every module inside an attention block, with its layer."""
    out: dict[nn.Module, int] = {}
    for layer in range(anatomy.n_layers):
        if path := anatomy.map.path("attn", layer):
            out.update(dict.fromkeys(module.get_submodule(path).modules(), layer))
    return out


def attention_of(
    module: nn.Module, anatomy: Anatomy, call: Call, tokens: Int[Tensor, "batch pos"], only: Sequence[int] | None = None
) -> dict[int, Attended] | str:
    """Return what the attention function of each layer (of `only` some) received, or the reason it cannot be had."""
    config = module.config.get_text_config()  # type: ignore[union-attr,operator]
    if against := reason_against(config):
        return against
    seen: dict[int, Attended] = {}

    def keep(layer: int) -> Callable[[Attended], None]:
        def copy(a: Attended) -> None:
            query, key, value, pattern = (t.detach().to("cpu", copy=True) for t in (a.query, a.key, a.value, a.pattern))
            seen[layer] = Attended(query, key, value, pattern)

        return copy

    outside = f"the attention of {anatomy.map.architecture} does not go through transformers' attention interface"
    chosen = range(anatomy.n_layers) if only is None else only
    layers = {part: layer for part, layer in attention_layers(module, anatomy).items() if layer in chosen}
    try:
        with watched(config, layers, {layer: keep(layer) for layer in chosen}), torch.inference_mode():
            call(tokens)
    except (TypeError, KeyError, ValueError, RuntimeError, AttributeError) as error:
        return f"{outside} ({type(error).__name__} when routed through it)"
    missing = set(layers.values()) - set(seen)
    return f"{outside} in block {min(missing)}" if missing else seen
