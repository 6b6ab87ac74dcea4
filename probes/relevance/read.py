"""Relevance of tokens, heads, MLPs and streams, read from one forward and one backward under a rule, and its leaks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.anatomy import Anatomy, Site
from probes.blocks.rerouting import module_of
from probes.errors import ModelError, OptionError
from probes.gradients import Metric
from probes.hooks.forward_hooks import ForwardHooks, tensor_of
from probes.models.protocol import Model
from probes.points import Address
from probes.relevance.rules import NORMS, RULES, Rule, changed, rule_of

NODES = ("z", "attn_out", "mlp_out", "resid_post")
"""Points of a layer whose relevance is kept."""
TOKENS = Address("resid_pre", 0)
"""Where tokens are: the first stream, positions added."""


@dataclass(frozen=True, eq=False)
class Leaks:
    """Where a metric m goes: m = tokens + biases + softmax + activations + rest, for each row."""

    tokens: Float[Tensor, " batch"]
    biases: Float[Tensor, "batch layers"]
    """By layer; the last column are those outside the blocks."""
    softmax: Float[Tensor, "batch layer head"]
    """What enters attention patterns and does not come out of queries and keys."""
    activations: Float[Tensor, "batch layer"]
    """The same of an MLP's activation and gate, or of a whole mixture of experts."""
    rest: Float[Tensor, " batch"]
    """What is left of m: rounding under rules that change every norm, what norms do under plain gradients."""

    def misses(self, metric: Float[Tensor, " batch"], tolerance: float = 1e-4) -> Tensor:
        """Return [batch] whether the account misses its metric by more than `tolerance`, relative to the largest of its parts."""
        sizes = torch.stack([metric.abs(), self.tokens.abs(), self.biases.sum(1).abs(), self.softmax.sum((1, 2)).abs()])
        return self.rest.abs() > tolerance * sizes.amax(0).clamp_min(1e-6)

    def row(self, index: int) -> Leaks:
        """Return the account of one row, a batch of one."""
        return Leaks(*(getattr(self, part.name)[index : index + 1] for part in fields(self)))


@dataclass(frozen=True, eq=False)
class Relevance:
    """Values a and changed derivatives g of one metric at `NODES` and `TOKENS`, each [batch, pos, ...]; relevance is a * g."""

    rule: str
    metric: Float[Tensor, " batch"]
    values: Mapping[Address, Tensor]
    gradients: Mapping[Address, Tensor]
    leaks: Leaks | None
    """None where the values were written, or the account was not asked for."""

    def score(self, address: Address, baseline: Tensor | None = None) -> Tensor:
        """Return the sum over a node's features of (a - baseline) * g, [batch, pos] or [batch, pos, head], float32.

        Args:
            address: one of the points kept.
            baseline: [pos, ...]; None is zero, which makes it relevance.

        Raises:
            OptionError: a node under a rule that is for maps over tokens alone.
        """
        if RULES[self.rule].magnitudes and address != TOKENS:
            raise OptionError(
                f"rule {self.rule!r} shares sums out by magnitude, which gives a positive share to what pulls the other way: "
                "read tokens by it, and nodes by attnlrp or cp"
            )
        change = self.values[address].float()
        change = change if baseline is None else change - baseline.to(change)
        return (change * self.gradients[address].float()).sum(-1)

    def layers(self, point: str, baseline: Tensor | None = None) -> Tensor:
        """Return the scores of a point of every layer, [batch, layer, pos] or [batch, layer, pos, head].

        Args:
            point: one of `NODES`.
            baseline: [layer, pos, ...], or None.
        """
        addresses = sorted((a for a in self.values if a.point == point and a != TOKENS), key=lambda a: a.layer or 0)
        return torch.stack(
            [self.score(a, None if baseline is None else baseline[a.layer or 0]) for a in addresses], dim=1
        )

    def rows(self) -> list[Relevance]:
        """Return what is said of each row, a batch of one each."""
        out = []
        for i in range(len(self.metric)):
            values, gradients = ({a: t[i : i + 1] for a, t in each.items()} for each in (self.values, self.gradients))
            leaks = None if self.leaks is None else self.leaks.row(i)
            out.append(Relevance(self.rule, self.metric[i : i + 1], values, gradients, leaks))
        return out


def relevance_of(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    metric: Metric,
    rule: str = "attnlrp",
    *,
    first_stream: Float[Tensor, "batch pos d_model"] | None = None,
) -> Relevance:
    """Return relevance to a metric under a rule, by one forward and one backward; rows do not mix.

    Args:
        model: the model, of a backend that hands out its module.
        tokens: prompts of one length.
        metric: read from the logits of the last position, float32.
        rule: a name of `RULES`.
        first_stream: what enters block 0 in place of the tokens' own rows; then there is no account of leaks.

    Raises:
        OptionError: no such rule.
        PointError: the backend keeps its module to itself, or a part that the rules do not know.
        ModelError: weights that no gradient can pass.
    """
    rules, rows = rule_of(rule), (int(tokens.shape[0]), int(tokens.shape[1]))
    with module_of(model) as (module, anatomy):
        watch = _Watch(anatomy, rows, rules, first_stream)
        before, after = (watch.hooks(first) for first in (True, False))
        with before.on(module, rows), changed(model, rules, rows), after.on(module, rows), torch.enable_grad():
            logits = tensor_of(module(input_ids=tokens.to(model.device), **_arguments(model, module)))
            value = metric(logits[:, -1].float())
        watch.differentiate(value, model.ref)
        points = [key for key in watch.sites if isinstance(key, Address) and (key.point in NODES or key == TOKENS)]
        return Relevance(
            rule, value.detach().float(), {key: watch.values[key] for key in points}, {key: watch.gradients[key] for key in points},
            None if first_stream is not None else watch.account(value.detach().float()),
        )  # fmt: skip


def _arguments(model: Model, module: nn.Module) -> dict[str, Any]:
    arguments: dict[str, Any] = {"use_cache": False} if model.shape.causal else {}
    if model.shape.causal and "logits_to_keep" in inspect.signature(module.forward).parameters:
        arguments["logits_to_keep"] = 1
    return arguments


class _Watch:
    """Zeros added where something passes, whose gradients are those of the place."""

    def __init__(self, anatomy: Anatomy, rows: tuple[int, int], rule: Rule, first_stream: Tensor | None) -> None:
        self.anatomy, self.rows, self.rule, self.first_stream = anatomy, rows, rule, first_stream
        self.sites: dict[Any, Site] = {TOKENS: anatomy.site(TOKENS)}
        self.values: dict[Any, Tensor] = {}
        self.probes: dict[Any, Tensor] = {}
        self.gradients: dict[Any, Tensor] = {}
        self.biases: dict[str, tuple[int, Tensor]] = {}
        for layer in range(anatomy.n_layers):
            for point in NODES:
                self.sites[Address(point, layer)] = anatomy.site(Address(point, layer))
            if first_stream is None:
                self._account_sites(layer)
        if first_stream is None:
            self._bias_sites()

    def _account_sites(self, layer: int) -> None:
        known = self.anatomy.map
        self.sites[Address("q", layer)] = self.anatomy.site(Address("q", layer))
        if known.path("mlp.in", layer):
            self.sites[Address("mlp_post", layer)] = self.anatomy.site(Address("mlp_post", layer))
            for name in ("mlp.in", "mlp.gate"):
                if path := known.path(name, layer):
                    self.sites[(name, layer)] = Site((path,), "output")
        else:
            self.sites[Address("mlp_in", layer)] = self.anatomy.site(Address("mlp_in", layer))

    def _bias_sites(self) -> None:
        blocks = [str(self.anatomy.map.path("block", layer)) for layer in range(self.anatomy.n_layers)]
        for path, part in self.anatomy.map.module.named_modules():
            bias = getattr(part, "bias", None)
            if isinstance(bias, Tensor) and bias.dim() == 1 and isinstance(getattr(part, "weight", None), Tensor):
                layer = next((i for i, block in enumerate(blocks) if path.startswith(block + ".")), len(blocks))
                self.biases[path] = layer, bias
                self.sites[("bias", path)] = Site((path,), "output")

    def hooks(self, before: bool) -> ForwardHooks:
        """Return the hooks that come before those of the rules, which read what these leave, or those that come after."""
        first = {key for key in self.sites if key == TOKENS or _point(key) in ("mlp.in", "mlp.gate", "q")}
        norms = {self.anatomy.map.path(name, layer) for name in NORMS for layer in range(self.anatomy.n_layers)}
        norms.add(self.anatomy.map.path("ln_final"))
        first |= {
            key for key, site in self.sites.items()
            if _point(key) in ("bias", "attn_out", "mlp_out") and norms.isdisjoint(site.modules)
        }  # fmt: skip
        sites = {key: site for key, site in self.sites.items() if (key in first) is before}
        return ForwardHooks(sites, {}, {key: self._visit(key) for key in sites}, stop=False)

    def _visit(self, key: Any) -> Any:
        """Return the write that adds a zero at a site and keeps what passes."""

        def write(tensor: Tensor) -> Tensor:
            if key == TOKENS and self.first_stream is not None:
                tensor = self.first_stream.to(tensor)
            if isinstance(key, tuple) and key[0] == "bias":
                shape: tuple[int, ...] = (tensor.shape[0], *[1] * (tensor.dim() - 2), tensor.shape[-1])
            else:
                shape, self.values[key] = tuple(tensor.shape), tensor.detach().clone()
            self.probes[key] = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device, requires_grad=True)
            return tensor + self.probes[key]

        return write

    def differentiate(self, value: Tensor, ref: str) -> None:
        """Fill `gradients`; zero where nothing of a place reaches the metric.

        Raises:
            ModelError: weights that no gradient can pass.
        """
        keys = list(self.probes)
        try:
            gradients = torch.autograd.grad(value.sum(), [self.probes[key] for key in keys], allow_unused=True)
        except RuntimeError as error:
            raise ModelError(f"{ref}: no gradient passes its weights ({error}); load it unquantised") from error
        for key, gradient in zip(keys, gradients, strict=True):
            self.gradients[key] = torch.zeros_like(self.probes[key]) if gradient is None else gradient
        self.probes.clear()

    def _sum(self, key: Any) -> Tensor:
        """Relevance at a site [batch, pos, ...]."""
        return self.values[key].float() * self.gradients[key].float()

    def account(self, metric: Tensor) -> Leaks:
        """Return the account of the metric [batch]."""
        n_layers, anatomy = self.anatomy.n_layers, self.anatomy
        biases, norms = torch.zeros(len(metric), n_layers + 1), torch.zeros(len(metric), n_layers)
        experts = torch.zeros(len(metric), n_layers)
        for path, (layer, bias) in self.biases.items():
            amount = (self.gradients[("bias", path)].float() * bias.detach().float()).flatten(1).sum(1).cpu()
            biases[:, layer] += amount
            if layer < n_layers and path == anatomy.map.path("attn.q_norm", layer):
                norms[:, layer] += amount
            mixed = layer < n_layers and not anatomy.map.path("mlp.in", layer)
            if mixed and path.startswith(f"{anatomy.map.path('mlp', layer)}."):
                experts[:, layer] += amount
        softmax, activations = [], []
        for layer in range(n_layers):
            heads = self._sum(Address("z", layer)).sum((1, -1)).cpu()
            queries = self._sum(Address("q", layer)).sum((1, -1)).cpu()
            # Queries and keys get the same, for their product is linear in both.
            softmax.append((1 - self.rule.values) * heads - 2 * (queries + norms[:, layer, None] / heads.shape[1]))
            activations.append(self._mlp(layer) - experts[:, layer])
        tokens = self._sum(TOKENS).sum((1, 2)).cpu()
        spent = tokens + biases.sum(1) + torch.stack(softmax, 1).sum((1, 2)) + torch.stack(activations, 1).sum(1)
        return Leaks(tokens, biases, torch.stack(softmax, 1), torch.stack(activations, 1), metric.cpu() - spent)

    def _mlp(self, layer: int) -> Tensor:
        """What enters a layer's hidden units, or its experts, less what leaves them, [batch]."""
        if Address("mlp_in", layer) in self.values:
            leaving, entering = Address("mlp_out", layer), [Address("mlp_in", layer)]
        else:
            leaving = Address("mlp_post", layer)
            entering = [key for key in (("mlp.in", layer), ("mlp.gate", layer)) if key in self.values]  # type: ignore[misc]
        whole = self._sum(leaving).flatten(1).sum(1)
        return (whole - sum(self._sum(key).flatten(1).sum(1) for key in entering)).cpu()


def _point(key: Any) -> str:
    """The point of an address, or the first word of another key."""
    return key.point if isinstance(key, Address) else str(key[0])
