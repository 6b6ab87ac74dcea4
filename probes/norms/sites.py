"""The places where a model normalises, each a norm and what reads it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from probes.anatomy import Anatomy
from probes.anatomy.constant_norm import is_constant
from probes.errors import OptionError, PointError, unknown
from probes.norm_kinds import Kind
from probes.norms.arithmetic import NormParts, parts_of
from probes.points import Address

_COMPONENT: dict[Kind, str] = {
    "mlp": "ln2",
    "mlp_post": "ln2_post",
    "q_norm": "attn.q_norm",
    "k_norm": "attn.k_norm",
    "qk": "ln1",
    "v": "ln1",
    "attn_post": "ln1_post",
    "final": "ln_final",
}


class NoNormError(PointError):
    """A model without norms whose scale depends on their input."""


@dataclass(frozen=True, order=True)
class NormSite:
    """One use of a norm; its text form is `qk.3`, or `final`."""

    kind: Kind
    layer: int | None = None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm module of a model and the sites that read it."""

    path: str
    parts: NormParts
    width: int
    sites: tuple[NormSite, ...]
    readers: dict[NormSite, tuple[str, ...]]
    """Per site, the modules whose input is this norm's output; for a joint projection, that projection."""
    columns: dict[NormSite, Tensor]
    """Per site that reads part of a joint projection's outputs, which."""


def norms_of(anatomy: Anatomy) -> tuple[Norm, ...]:
    """Return every norm with a scale of its own, in the order in which they run.

    Raises:
        NoNormError: the model has no norm whose scale could be frozen.
        PointError: the model normalises each sum, or has a norm of an unknown form.
    """
    if anatomy.kind == "post_norm":
        raise PointError(
            f"{anatomy.map.architecture} normalises the stream itself after each sum, so its norms cannot be folded into "
            "the next linear map; norms can be frozen where they stand before attention, MLP and unembedding"
        )
    by_path: dict[str, dict[NormSite, tuple[str, ...]]] = {}
    for layer in range(anatomy.n_layers):
        for kind in ("qk", "v", "q_norm", "k_norm", "attn_post", "mlp", "mlp_post"):
            _enter(anatomy, NormSite(kind, layer), by_path)
    _enter(anatomy, NormSite("final"), by_path)
    if not by_path:
        raise NoNormError(
            f"{anatomy.map.architecture} has no norm whose scale depends on its input, so there is nothing to freeze; "
            "is it norm-free already?"
        )
    return tuple(_norm(anatomy, path, readers) for path, readers in by_path.items())


def _enter(anatomy: Anatomy, site: NormSite, by_path: dict[str, dict[NormSite, tuple[str, ...]]]) -> None:
    path = _path(anatomy, site)
    if path is not None and not is_constant(anatomy.map.module.get_submodule(path)):
        by_path.setdefault(path, {})[site] = _readers(anatomy, site)


def _path(anatomy: Anatomy, site: NormSite) -> str | None:
    path = anatomy.map.path(_COMPONENT[site.kind], site.layer)
    if path is None and site.kind == "mlp" and anatomy.parallel:
        return anatomy.map.path("ln1", site.layer)
    return path


def _readers(anatomy: Anatomy, site: NormSite) -> tuple[str, ...]:
    if site.kind == "mlp":
        return anatomy.site(Address("mlp_in", site.layer)).modules
    if site.kind in ("qk", "v"):
        if joint := anatomy.map.path("attn.qkv", site.layer):
            return (joint,)
        paths = (anatomy.map.path(f"attn.{name}", site.layer) for name in site.kind)
        return tuple(path for path in paths if path)
    if site.kind == "final" and (path := anatomy.map.path("unembed")):
        return (path,)
    return ()


def _norm(anatomy: Anatomy, path: str, readers: dict[NormSite, tuple[str, ...]]) -> Norm:
    module = anatomy.map.module.get_submodule(path)
    weight = getattr(module, "weight", None)
    width = weight.numel() if isinstance(weight, Tensor) else int(anatomy.map.sizes.d_model)
    parts = parts_of(module, width, float(anatomy.map.sizes.eps))
    columns = {}
    for site in readers:
        if site.kind in ("qk", "v") and anatomy.map.path("attn.qkv", site.layer):
            if anatomy.layout is None:
                raise PointError(f"{site}: the layout of the joint query-key-value projection is not known")
            layout = anatomy.layout
            both = torch.cat([layout.q.flatten(), layout.k.flatten()])
            columns[site] = both if site.kind == "qk" else layout.v.flatten().clone()
    return Norm(path, parts, width, tuple(readers), readers, columns)


def choose(sites: Iterable[NormSite], names: Iterable[str]) -> tuple[NormSite, ...]:
    """Return the sites named by `mlp`, `qk.*`, `v.0-3`, `final` or `all`, in their order.

    Raises:
        OptionError: a name that no site of this model has.
    """
    have = tuple(sites)
    chosen: dict[NormSite, None] = {}
    for name in names:
        kind, _, layers = name.partition(".")
        low, _, high = layers.partition("-")
        match = [s for s in have if kind in ("all", s.kind) and _within(s, layers, low, high)]
        if not match:
            kinds = {s.kind: [t.layer for t in have if t.kind == s.kind] for s in have}
            legal = [k if at == [None] else f"{k}.0 to {k}.{max(n or 0 for n in at)}" for k, at in kinds.items()]
            raise OptionError(unknown("norm site", name, ["all", *legal]))
        chosen.update(dict.fromkeys(match))
    return tuple(chosen)


def _within(site: NormSite, layers: str, low: str, high: str) -> bool:
    if layers in ("", "*") or site.layer is None:
        return layers in ("", "*")
    if not low.isdecimal() or (high and not high.isdecimal()):
        return False
    return int(low) <= site.layer <= int(high or low)
