"""Backward rules of relevance propagation, hung on a model's parts for one forward; the forward's values stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from probes.anatomy import Anatomy, Site
from probes.anatomy.constant_norm import is_constant
from probes.blocks.rerouting import module_of
from probes.decomposition.module_reading import activation_of
from probes.errors import OptionError, PointError, unknown
from probes.hooks.forward_hooks import ForwardHooks
from probes.models.protocol import Model
from probes.models.verify.recording import deviation
from probes.norms.arithmetic import NormParts, parts_of
from probes.points import Address

EPS = 1e-10
"""Added to the input that an activation's output is divided by, as AttnLRP's authors do."""
NORMS = ("ln1", "ln1_post", "attn.q_norm", "attn.k_norm", "ln2", "ln2_post")


@dataclass(frozen=True)
class Rule:
    """What each operation passes back in place of its gradient g; relevance is then input times what arrives.

    Linear maps pass their gradient under every rule.
    """

    queries: float
    """Part of the gradient that queries and keys pass on; 0 holds the attention pattern constant."""
    values: float
    """Part of the gradient that values pass on."""
    gate: Literal["gradient", "halves", "constant", "magnitude"]
    """How activation(gate) * up shares out its relevance: not changed, half each, all to up, or by |a| / (|a| + |b|)."""
    constant_divisors: bool
    """Whether norms divide by a constant and activations multiply by one."""
    magnitudes: bool = False
    """Whether sums in the stream share out by magnitude, signless: for maps over tokens, not for nodes."""


RULES = {
    "attnlrp": Rule(0.25, 0.5, "halves", True),
    "cp": Rule(0.0, 1.0, "constant", True),
    "gradient": Rule(1.0, 1.0, "gradient", False),
    "dynamic": Rule(0.0, 0.5, "magnitude", True, magnitudes=True),
}
"""By name. `attnlrp` and `cp`: Achtibat et al. 2024, as their package does it. `gradient`: nothing changed.

`dynamic`: Lee and Millan Arias 2025 (DynamicLRP) as released, its queries and keys without relevance, and its sums by
magnitude; every norm is taken as one operation, where the released code does so for fused LayerNorms alone.
"""


def rule_of(name: str) -> Rule:
    """Return the rule of this name.

    Raises:
        OptionError: there is none.
    """
    if name not in RULES:
        raise OptionError(unknown("rule", name, RULES))
    return RULES[name]


class _Instead(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, gradient


class _Scaled(torch.autograd.Function):
    """A tensor whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.factor, None


def scaled(x: Tensor, factor: float) -> Tensor:
    """Return `x` itself, its gradient multiplied by `factor`; 0 passes none."""
    if not factor:
        return x.detach()
    out: Tensor = _Scaled.apply(x, factor)  # type: ignore[no-untyped-call]
    return out


def instead(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return `value`, to the bit, with the gradient of `surrogate`, of the same shape."""
    out: Tensor = _Instead.apply(value.detach(), surrogate.to(value.dtype))  # type: ignore[no-untyped-call]
    return out


@contextmanager
def changed(model: Model, rule: Rule, rows: tuple[int, int]) -> Iterator[None]:
    """Change what the model's parts pass back, for one forward over `rows` (batch, pos) inside; afterwards nothing is left.

    Raises:
        PointError: the backend keeps its module to itself, or a part that the rules do not know, by name.
    """
    with module_of(model) as (module, anatomy), ExitStack() as stack:
        plan = _Plan(anatomy, rule, getattr(module, "config", None))
        plan.fill(capped="lens" not in model.faithfulness.refused and model.unembedding().softcap is not None)
        for router in plan.routers:
            stack.enter_context(router.register_forward_hook(_detached))
        hooks = ForwardHooks(plan.sites, plan.reads, plan.writes, stop=False)
        stack.enter_context(hooks.on(module, rows))
        yield


def _detached(_: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    return type(output)(part.detach() if isinstance(part, Tensor) else part for part in output)


Key = tuple[str, Any]


@dataclass(eq=False)
class _Plan:
    """Sites with what is read and written there, under one rule."""

    anatomy: Anatomy
    rule: Rule
    config: Any
    sites: dict[Key, Site] = field(default_factory=dict)
    reads: dict[Key, Callable[[Tensor], None]] = field(default_factory=dict)
    writes: dict[Key, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    routers: list[nn.Module] = field(default_factory=list)
    seen: dict[Key, Tensor] = field(default_factory=dict)
    functions: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def fill(self, capped: bool) -> None:
        layers = range(self.anatomy.n_layers)
        if self.rule.constant_divisors:
            for layer in layers:
                for name in NORMS:
                    self._norm(name, layer)
            self._norm("ln_final", None)
            if capped and (head := self.anatomy.map.path("unembed")):
                self._cap(head)
        for layer in layers:
            self._attention(layer)
            if self.rule.constant_divisors:
                self._mlp(layer)
            if self.rule.magnitudes:
                self._sums(layer)

    def _keep(self, key: Key, site: Site) -> Key:
        self.sites[key] = site
        self.reads[key] = lambda tensor: self.seen.__setitem__(key, tensor)
        return key

    def _write(self, key: Key, site: Site, write: Callable[[Tensor], Tensor]) -> None:
        self.sites[key], self.writes[key] = site, write

    def _norm(self, name: str, layer: int | None) -> None:
        path = self.anatomy.map.path(name, layer)
        if path is None or ("norm", path) in self.sites:
            return
        module = self.anatomy.map.module.get_submodule(path)
        if is_constant(module):
            return
        sizes = self.anatomy.map.sizes
        weight = getattr(module, "weight", None)
        parts = parts_of(module, weight.numel() if isinstance(weight, Tensor) else int(sizes.d_model), float(sizes.eps))
        entering = self._keep(("norm in", path), Site((path,), "input"))
        self._write(("norm", path), Site((path,), "output"), lambda y: instead(y, self._divided(parts, entering)))

    def _divided(self, parts: NormParts, entering: Key) -> Tensor:
        x = self.seen.pop(entering)
        return parts.divided(x, parts.scale(x).detach()[..., None])

    def _cap(self, head: str) -> None:
        below = self._keep(("uncapped", head), Site((head,), "output"))

        def cap(logits: Tensor) -> Tensor:
            z = self.seen.pop(below)
            return instead(logits, z * (logits / (z + EPS)).detach())

        self._write(("capped", ""), Site(("",), "output"), cap)

    def _attention(self, layer: int) -> None:
        for point, factor in (("q", self.rule.queries), ("k", self.rule.queries), ("v", self.rule.values)):
            if factor == 1:
                continue
            # Behind the norm of queries or keys where there is one, so that its bias gets its share alone.
            norm = self.anatomy.map.path(f"attn.{point}_norm", layer)
            site = Site((norm,), "output") if norm else self.anatomy.site(Address(point, layer))
            self._write((point, layer), site, lambda t, factor=factor: scaled(t, factor))  # type: ignore[misc]

    def _mlp(self, layer: int) -> None:
        known = self.anatomy.map
        up, gate, out = (known.path(name, layer) for name in ("mlp.in", "mlp.gate", "mlp.out"))
        if up is None or out is None:
            if gate is None or known.path("mlp", layer) is None:
                raise PointError(f"block {layer} of {known.architecture} has no MLP that the rules know")
            self.routers.append(self.anatomy.component("mlp.gate", layer))
            return
        keys = [
            self._keep((name, layer), Site((path,), "output")) for name, path in (("gate", gate), ("up", up)) if path
        ]
        self._write(("hidden", layer), Site((out,), "input"), lambda h: instead(h, self._units(layer, h, keys)))

    def _units(self, layer: int, hidden: Tensor, keys: list[Key]) -> Tensor:
        """Return the hidden units as relevance sees them: each factor times a constant."""
        inputs = [self.seen.pop(key).view_as(hidden) for key in keys]
        gate, up = inputs if len(inputs) == 2 else (None, inputs[0])
        with torch.no_grad():
            block = self.anatomy.component("block", layer)
            if layer not in self.functions:
                self.functions[layer] = activation_of(block, self.config, gate, up, hidden, f"block {layer}")
            acted = self.functions[layer](up if gate is None else gate)
            ratio = acted / ((up if gate is None else gate) + EPS)
            if gate is None:
                part = None
            elif self.rule.gate == "magnitude":
                part = acted.abs() / (acted.abs() + up.abs() + EPS)
            else:
                part = torch.full_like(acted, 0.5 if self.rule.gate == "halves" else 0.0)
            constant = up.detach()
        if gate is None or part is None:
            return up * ratio
        return gate * (part * ratio * constant) + up * ((1 - part) * acted)

    def _sums(self, layer: int) -> None:
        if self.anatomy.kind == "post_norm":
            raise PointError(
                f"{self.anatomy.map.architecture} normalises each sum, so no sum of its stream can be shared out"
            )
        enters = self._keep(("resid_pre", layer), self.anatomy.site(Address("resid_pre", layer)))
        attn, mlp = (self._keep((p, layer), self.anatomy.site(Address(p, layer))) for p in ("attn_out", "mlp_out"))
        if self.anatomy.parallel:
            self._sum(("resid_post", layer), (enters, attn, mlp))
        else:
            self._sum(("resid_mid", layer), (enters, attn), keep=True)
            self._sum(("resid_post", layer), (("resid_mid", layer), mlp))

    def _sum(self, key: Key, parts: tuple[Key, ...], keep: bool = False) -> None:
        def split(y: Tensor) -> Tensor:
            terms = [self.seen.pop(part) for part in parts]
            with torch.no_grad():
                if deviation(sum(terms, torch.zeros_like(y)), y) > 1e-2:
                    raise PointError(f"{key[0]}.{key[1]} is not the sum of {', '.join(part[0] for part in parts)}")
                size = y / (sum(term.abs() for term in terms) + EPS)
                factors = [size * term.sign() for term in terms]
            surrogate = sum((term * factor for term, factor in zip(terms, factors, strict=True)), torch.zeros_like(y))
            out = instead(y, surrogate)
            if keep:
                self.seen[key] = out
            return out

        self._write(key, self.anatomy.site(Address(*key)), split)


def exceptions(model: Model) -> list[str]:
    """Return what the rules do not reach on this model, a sentence each."""
    said = []
    with module_of(model) as (module, anatomy):
        config = getattr(module, "config", None)
        if getattr(config, "attn_logit_softcapping", None):
            said.append("The softcap of attention scores lies inside attention: it passes its plain gradient.")
        if any(name.endswith("sinks") for name, _ in module.named_parameters()):
            said.append("Attention sinks take part of each row of attention, which counts as a leak of the softmax.")
        if any(not anatomy.map.path("mlp.in", layer) for layer in range(anatomy.n_layers)):
            said.append("Routers of experts are held constant; experts themselves pass their plain gradient.")
        if anatomy.kind == "post_norm":
            said.append(
                "Blocks normalise each sum: the relevance of what a block adds is no share of its stream, and norms and "
                "activations after the last block pass their plain gradient."
            )
    return said
