"""Scores of every node from backward passes: attribution patching, RelP, LRP and integrated gradients, with the leaks of the rules."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from analyses.contextual_decomposition.cases import Case
from analyses.contextual_decomposition.scores import PreparedCase
from analyses.results.statistics import Array
from probes.decomposition import Baseline, Node
from probes.models.protocol import Model
from probes.points import Address
from probes.progress import Progress
from probes.relevance import Leaks, Relevance, relevance_of
from probes.relevance.read import TOKENS

STEPS = 8
"""Steps of integrated gradients, at the middles of as many equal parts of the way from the references to the prompt."""
POINTS = {"heads": "z", "mlps": "mlp_out", "streams": "resid_post"}
"""Kinds of nodes, and the point at which each is."""


@dataclass(frozen=True)
class Plan:
    """Which methods are read, and by which rules."""

    methods: tuple[str, ...]
    rule: str
    dynamic: bool = False

    @property
    def rules(self) -> dict[str, str]:
        """Rules to run, each with what its methods' names end in: the chosen one's have no ending."""
        rules = {"gradient": ""} if {"attribution", "ig"} & {*self.methods} else {}
        if {"relp", "lrp"} & {*self.methods}:
            # Both rules stand in every comparison, for neither is better on every model.
            rules |= {self.rule: ""} | {other: f"_{other}" for other in ("attnlrp", "cp") if other != self.rule}
        return rules | ({"dynamic": ""} if self.dynamic else {})

    @property
    def token_methods(self) -> list[str]:
        """The methods that score tokens."""
        return [*(name for rule in self.rules for name in self.named(rule)), *({"ig"} & {*self.methods})]

    def named(self, rule: str) -> dict[str, bool]:
        """Return the methods that a rule's pass gives, and whether their baseline is zero."""
        if rule == "dynamic":
            return {"dynamic": True}
        out = {"attribution": False} if rule == "gradient" and "attribution" in self.methods else {}
        if rule == self.rule or rule != "gradient":
            out |= {f"{name}{self.rules[rule]}": name == "lrp" for name in ("relp", "lrp") if name in self.methods}
        return out


@dataclass(eq=False)
class GradientScores:
    """What backward passes say of every prompt's nodes, in the order of the prompts."""

    nodes: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    """Per method and kind, a prompt's scores: heads [layer, head], mlps [layer], streams [layer, pos], tokens [pos]."""
    distances: dict[str, list[Tensor]] = field(default_factory=dict)
    """Per kind, how far each node is from its baseline."""
    leaks: dict[str, list[tuple[float, Leaks, bool]]] = field(default_factory=dict)
    """Per rule and prompt, the metric, its account, and whether the account misses it."""
    routed: dict[str, list[Tensor]] = field(default_factory=dict)
    """By the chosen rule, relevance [2, layer] of what attention and MLP add."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Per method, of the passes that give it; methods of one pass have the same."""
    passes: dict[str, int] = field(default_factory=dict)
    """Per method, backward passes (and as many forwards) of one prompt."""

    def add(self, method: str, kind: str, scores: Tensor) -> None:
        """Enter a prompt's scores."""
        self.nodes.setdefault(method, {}).setdefault(kind, []).append(scores.double().cpu())

    def of_heads(self, method: str, heads: Sequence[Node]) -> Array:
        """Return a method's scores of some heads, [prompt, head]."""
        chosen = [node.layer for node in heads], [node.head for node in heads]
        return np.stack([scores[chosen].numpy() for scores in self.nodes[method]["heads"]])

    def of_layers(self, method: str, layers: Sequence[int]) -> Array:
        """Return a method's scores of the MLPs of some layers, [prompt, layer]."""
        return np.stack([scores[list(layers)].numpy() for scores in self.nodes[method]["mlps"]])

    def of_streams(self, method: str, prompts: Sequence[int], layers: Sequence[int]) -> Array:
        """Return a method's scores of stream positions of prompts of one length, [prompt, layer * pos]."""
        return np.stack([self.nodes[method]["streams"][i][list(layers)].flatten().numpy() for i in prompts])


def read_scores(model: Model, cases: Sequence[PreparedCase], plan: Plan, progress: Progress) -> GradientScores:
    """Read every prompt under every rule of the plan: a forward and a backward each, `STEPS` for integrated gradients.

    Raises:
        PointError: the backend keeps its module to itself, or a part that the rules do not know.
    """
    out = GradientScores()
    progress.start(len(cases), "prompt attributed")
    for one in cases:
        tokens, metric = torch.tensor([one.case.tokens]), metric_of(model, one.case)
        read: Relevance | None = None
        for rule in plan.rules:
            started = time.perf_counter()
            read = relevance_of(model, tokens, metric, rule)
            _enter(out, plan, rule, read, one.baseline)
            for name in plan.named(rule):
                out.seconds[name] = out.seconds.get(name, 0.0) + time.perf_counter() - started
                out.passes[name] = 1
        if read is not None:
            _distances(out, read, one.baseline)
            if "ig" in plan.methods:
                started = time.perf_counter()
                _integrated(out, model, one, read, metric)
                out.seconds["ig"] = out.seconds.get("ig", 0.0) + time.perf_counter() - started
                out.passes["ig"] = STEPS
        progress.advance()
    return out


def metric_of(model: Model, case: Case) -> Callable[[Tensor], Tensor]:
    """Return the case's metric of last logits [batch, d_vocab]."""
    ids = torch.tensor(case.ids, device=model.device)
    return lambda logits: case.metric(logits[:, ids])


def _enter(out: GradientScores, plan: Plan, rule: str, read: Relevance, baseline: Baseline | None) -> None:
    for name, zero in plan.named(rule).items():
        base = None if zero else baseline
        out.add(name, "tokens", read.score(TOKENS, None if base is None else base.stream[0])[0])
        for kind in POINTS if rule != "dynamic" else ():
            out.add(name, kind, _node_scores(read, kind, base))
    if rule != "gradient":
        assert read.leaks is not None
        missed = bool(read.leaks.misses(read.metric.cpu())[0])
        out.leaks.setdefault(rule, []).append((float(read.metric[0]), read.leaks, missed))
    if rule == plan.rule and rule != "gradient":
        parts = torch.stack([read.layers(point)[0].sum(1) for point in ("attn_out", "mlp_out")])
        out.routed.setdefault(rule, []).append(parts.double().cpu())


def _node_scores(read: Relevance, kind: str, baseline: Baseline | None) -> Tensor:
    """Return a kind's scores of one prompt: [layer, head], [layer] or [layer, pos]; streams without the last layer's."""
    scores = read.layers(POINTS[kind], baselines(kind, baseline))[0]
    return scores if kind == "streams" else scores.sum(1)


def baselines(kind: str, baseline: Baseline | None) -> Tensor | None:
    """Return the baseline [layer, pos, ...] of a kind of nodes; a stream's is what enters the next block, the last's nothing."""
    if baseline is None:
        return None
    if kind == "streams":
        return torch.cat((baseline.stream[1:], baseline.stream[-1:]))
    return baseline.z if kind == "heads" else baseline.mlp_out


def _distances(out: GradientScores, read: Relevance, baseline: Baseline | None) -> None:
    for kind, point in POINTS.items():
        base, rows = baselines(kind, baseline), []
        for layer in range(1 + max(a.layer or 0 for a in read.values if a.point == point)):
            value = read.values[Address(point, layer)][0].float()
            gap = value if base is None else value - base[layer].to(value)
            # Over positions too, except where a position is a node by itself.
            rows.append(gap.norm(dim=-1) if kind == "streams" else gap.square().sum((0, -1)).sqrt())
        out.distances.setdefault(kind, []).append(torch.stack(rows).double().cpu())


def _integrated(
    out: GradientScores, model: Model, one: PreparedCase, read: Relevance, metric: Callable[[Tensor], Tensor]
) -> None:
    """Enter (a - baseline) times the mean gradient over `STEPS` mixtures of the whole first stream with its baseline."""
    own = read.values[TOKENS]
    start = torch.zeros_like(own) if one.baseline is None else one.baseline.stream[:1].to(own)
    steps = ((torch.arange(STEPS) + 0.5) / STEPS).to(own)[:, None, None]
    mixed = relevance_of(
        model, torch.tensor([one.case.tokens]).expand(STEPS, -1), metric, "gradient",
        first_stream=start + steps * (own - start),
    )  # fmt: skip
    mean = {address: gradient.mean(0, keepdim=True) for address, gradient in mixed.gradients.items()}
    whole = Relevance("gradient", read.metric, read.values, mean, None)
    out.add("ig", "tokens", whole.score(TOKENS, None if one.baseline is None else one.baseline.stream[0])[0])
    for kind in POINTS:
        out.add("ig", kind, _node_scores(whole, kind, one.baseline))


def account_misses(scores: GradientScores) -> dict[str, set[int]]:
    """Return per rule the prompts, by their place, whose account misses the metric."""
    return {rule: {i for i, (_, _, missed) in enumerate(rows) if missed} for rule, rows in scores.leaks.items()}
