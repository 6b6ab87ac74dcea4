"""Where each point lives in a model, given how its blocks are put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from probes.anatomy.constant_norm import is_constant
from probes.anatomy.layouts import Layout
from probes.anatomy.mapping import ArchitectureMap, map_of
from probes.anatomy.views import Divisor, Gather, Heads, IdentityView, Site, View
from probes.errors import PointError, unknown
from probes.points import Address

Kind = Literal["sequential", "parallel", "post_norm"]
"""How a block adds: attention then MLP, both to the same stream, or each followed by a norm of the sum."""

_NORM_BEFORE = {"attn_scale": "ln1", "mlp_scale": "ln2", "final_scale": "ln_final"}
_OUTPUT_OF = {"resid_post": "block", "embed": "embed", "final_norm": "ln_final"}
_INPUT_OF = {"resid_pre": "block", "z": "attn.o", "mlp_post": "mlp.out"}


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The sites of a model's points, and the reasons for those it does not have."""

    map: ArchitectureMap
    kind: Kind
    layout: Layout | None = None
    """How a joint query-key-value projection is laid out, once known."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Points that do not hold on this model, with the reason."""
    patterns: Mapping[int, Site] = field(default_factory=dict)
    """Where a layer's attention probabilities pass as a tensor; where they do not, the attention function gives them."""

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read the same stream."""
        return self.kind == "parallel"

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return self.map.n_layers

    @property
    def n_heads(self) -> int:
        """The number of query heads."""
        return int(self.map.sizes.n_heads)

    @cached_property
    def n_kv_heads(self) -> int:
        """The number of key heads, counted from the key projection itself: the map's own figure is wrong for some grouped models."""
        for layer in range(self.n_layers):
            for name in ("attn.k", "attn.qkv"):
                if path := self.map.path(name, layer):
                    heads = outputs(self.map.module.get_submodule(path), int(self.map.sizes.d_model)) // self.d_head
                    return heads if name == "attn.k" else (heads - self.n_heads) // 2
        return int(self.map.sizes.n_key_value_heads or self.n_heads)

    @property
    def d_head(self) -> int:
        """The width of a head."""
        return int(self.map.sizes.d_head)

    def component(self, name: str, layer: int | None = None) -> nn.Module:
        """Return a part by its TransformerLens name: `attn.o`, `ln1`, `mlp.out` of a layer; `embed`, `ln_final`, `unembed`.

        Raises:
            PointError: the model has no such part; names those it has.
        """
        path = self.map.path(name, layer)
        if path is None:
            raise PointError(unknown("component", name, self.map.components(layer)))
        return self.map.module.get_submodule(path)

    def refusal(self, address: Address) -> str | None:
        """Return why the address cannot be read, or None where it can."""
        if address.point == "pattern" and "pattern" not in self.refused and address.layer not in self.patterns:
            address = Address("attn_out", address.layer)
        try:
            self.site(address)
        except PointError as error:
            return str(error)
        return None

    def site(self, address: Address) -> Site:
        """Return where the address is read and written. `pattern` has a site only where `patterns` says so.

        Raises:
            PointError: this model does not have the point; the message is the reason.
        """
        point, layer = address.point, address.layer
        if layer is not None and layer >= self.n_layers:
            raise PointError(f"{address}: this model has layers 0 to {self.n_layers - 1}")
        if point in self.refused:
            raise PointError(self.refused[point])
        if point == "logits":
            if self.map.bare:
                raise PointError(f"{self.map.architecture} has no language-model head, so it gives no logits")
            return Site(("",), "output")
        if point in _OUTPUT_OF:
            return Site((self._path(_OUTPUT_OF[point], address),), "output")
        if point in _INPUT_OF:
            view: View = Heads(self.n_heads, self.d_head) if point == "z" else IdentityView()
            return Site((self._path(_INPUT_OF[point], address),), "input", view)
        if point in _NORM_BEFORE:
            return self._divisor(address)
        if point in ("q", "k", "v"):
            return self._projection(address)
        if point == "pattern":
            return self._pattern(address)
        return {"resid_mid": self._resid_mid, "attn_in": self._attn_in, "mlp_in": self._mlp_in}.get(point, self._added)(
            address
        )

    def _pattern(self, address: Address) -> Site:
        for layer, site in self.patterns.items():
            if layer == address.layer:
                return site
        raise PointError("attention probabilities are read from the attention function, not from a module")

    def _path(self, component: str, address: Address) -> str:
        path = self.map.path(component, address.layer)
        if path is None:
            where = "" if address.layer is None else f" in block {address.layer}"
            raise PointError(f"{address}: {self.map.architecture} has no {component}{where}")
        return path

    def _first(self, address: Address, *components: str) -> str:
        paths = (self.map.path(component, address.layer) for component in components)
        return next((path for path in paths if path), None) or self._path(components[-1], address)

    def _resid_mid(self, address: Address) -> Site:
        if self.parallel:
            raise PointError(
                f"{address}: attention and MLP read the same stream in parallel, so nothing lies between them. "
                "Read resid_pre or resid_post."
            )
        if self.kind == "post_norm":
            raise PointError(
                f"{address}: this block normalises each sum, so no un-normalised stream passes between attention and "
                "MLP. Read mlp_in, which follows the norm, or resid_post."
            )
        return Site((self._first(address, "ln2", "mlp", "mlp.in"),), "input", in_place=True)

    def _added(self, address: Address) -> Site:
        part, norm = ("attn", "ln1_post") if address.point == "attn_out" else ("mlp", "ln2_post")
        last = "attn.o" if part == "attn" else "mlp.out"
        candidates = (last,) if self.kind == "post_norm" else (norm, part, last)
        return Site((self._first(address, *candidates),), "output")

    def _attn_in(self, address: Address) -> Site:
        if joint := self.map.path("attn.qkv", address.layer):
            return Site((joint,), "input")
        return Site(tuple(self._path(f"attn.{name}", address) for name in "qkv"), "input")

    def _mlp_in(self, address: Address) -> Site:
        if whole := self.map.path("mlp", address.layer):
            return Site((whole,), "input")
        gate = self.map.path("mlp.gate", address.layer)
        return Site((self._path("mlp.in", address), *([gate] if gate else [])), "input")

    def _projection(self, address: Address) -> Site:
        heads = self.n_heads if address.point == "q" else self.n_kv_heads
        if own := self.map.path(f"attn.{address.point}", address.layer):
            return Site((own,), "output", Heads(heads, self.d_head))
        joint = self._path("attn.qkv", address)
        if self.layout is None:
            raise PointError(f"{address}: the layout of the joint query-key-value projection is not known")
        return Site((joint,), "output", Gather(getattr(self.layout, address.point)))

    def _divisor(self, address: Address) -> Site:
        if self.kind == "post_norm" and address.layer is not None:
            raise PointError(
                f"{address}: this block's norms follow the sums, so none stands before its attention or MLP"
            )
        shared = address.point == "mlp_scale" and self.parallel
        path = self._first(address, *(("ln2", "ln1") if shared else (_NORM_BEFORE[address.point],)))
        return Site((path,), "input", divisor_of(self.map, path))


def outputs(projection: nn.Module, n_inputs: int) -> int:
    """Return how many outputs a linear layer has, whichever class and orientation it is."""
    for name in ("out_features", "nf"):
        if isinstance(count := getattr(projection, name, None), int):
            return count
    weight = projection.weight
    assert isinstance(weight, Tensor)
    return weight.numel() // n_inputs


def linear_weight(projection: nn.Module) -> Tensor:
    """Return a linear layer's weights as [outputs, inputs], a view, whichever class and orientation it is."""
    weight = projection.weight
    assert isinstance(weight, Tensor)
    return weight.T if type(projection).__name__ == "Conv1D" else weight


def divisor_of(known: ArchitectureMap, path: str) -> Divisor:
    """Return the divisor of the norm at `path` for the kind of norm that the map states; checked when a model is loaded."""
    norm = known.module.get_submodule(path)
    if is_constant(norm):
        return Divisor(0.0, bool(getattr(norm, "centred", False)), constant=True)
    eps = next((getattr(norm, n) for n in ("eps", "variance_epsilon", "norm_eps") if hasattr(norm, n)), None)
    centred = str(known.sizes.normalization_type).startswith("LN")
    return Divisor(float(known.sizes.eps if eps is None else eps), centred)


def anatomy_of(module: nn.Module) -> Anatomy:
    """Return a first anatomy of `module`, from the architecture map alone; `probes.models.verify.identities` checks it on a forward.

    Raises:
        ModelError: the architecture map does not know this class of model.
    """
    known = map_of(module)
    return Anatomy(known, "parallel" if getattr(known.sizes, "parallel_attn_mlp", False) else "sequential")
