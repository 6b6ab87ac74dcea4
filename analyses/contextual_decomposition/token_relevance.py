"""Relevance of single tokens, the account of the metric, and whether the most relevant token is the one it must be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analyses.contextual_decomposition.cases import Case
from analyses.contextual_decomposition.gradient_scores import GradientScores, Plan, account_misses
from analyses.results.statistics import cluster_bootstrap, wilson
from analyses.tokens import token_text
from probes.models.protocol import Model


def token_tables(
    model: Model, cases: Sequence[Case], scores: GradientScores, plan: Plan, layered: bool, seed: int
) -> dict[str, pd.DataFrame]:
    """Return the tables `token_relevance`, `pointing`, `leak` and `routed`, those for which something was read.

    Args:
        layered: whether what a layer adds is a share of its stream, so that layers can be compared.
    """
    if not scores.nodes:
        return {}
    tables = {"token_relevance": token_table(model, cases, scores, plan)}
    pointing = pointing_table(cases, tables["token_relevance"])
    tables |= {} if pointing.empty else {"pointing": pointing}
    tables |= {"leak": leak_table(cases, scores)} if scores.leaks else {}
    return tables | ({"routed": routed_table(scores, plan.rule, seed)} if scores.routed and layered else {})


def token_table(model: Model, cases: Sequence[Case], scores: GradientScores, plan: Plan) -> pd.DataFrame:
    """Return columns prompt, position, method, score, text; prompts whose account misses under a rule are left out there."""
    missed = account_misses(scores)
    rule_of = {name: rule for rule in plan.rules for name in plan.named(rule)}
    rows = []
    for method, kinds in scores.nodes.items():
        for place, (case, values) in enumerate(zip(cases, kinds["tokens"], strict=True)):
            if place in missed.get(rule_of.get(method, ""), ()):
                continue
            for at, value in enumerate(values.tolist()):
                rows.append((case.index, at, method, value, token_text(model, case.tokens[at])))
    return pd.DataFrame(rows, columns=["prompt", "position", "method", "score", "text"])


def leak_table(cases: Sequence[Case], scores: GradientScores) -> pd.DataFrame:
    """Return columns prompt, layer, kind, head, amount, rule: what the metric is made of under each rule.

    Kinds: `metric`, and what adds up to it: `tokens`, `bias`, `softmax`, `activation`, `rest`. Layer and head are -1 where
    there is none; the layer of biases outside the blocks is -1 too.
    """
    parts = []
    for rule, rows in scores.leaks.items():
        for case, (metric, leaks, _) in zip(cases, rows, strict=True):
            softmax, biases = leaks.softmax[0].double().numpy(), leaks.biases[0].double().numpy()
            n_layers, n_heads = softmax.shape
            layers = np.arange(n_layers)
            blocks = [
                ("metric", [-1], [-1], [metric]),
                ("tokens", [-1], [-1], [float(leaks.tokens[0])]),
                ("bias", [*layers, -1], [-1] * (n_layers + 1), biases),
                ("softmax", np.repeat(layers, n_heads), np.tile(np.arange(n_heads), n_layers), softmax.ravel()),
                ("activation", layers, [-1] * n_layers, leaks.activations[0].double().numpy()),
                ("rest", [-1], [-1], [float(leaks.rest[0])]),
            ]
            parts += [
                pd.DataFrame({"prompt": case.index, "layer": layer, "kind": kind, "head": head, "amount": amount, "rule": rule})
                for kind, layer, head, amount in blocks
            ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def routed_table(scores: GradientScores, rule: str, seed: int) -> pd.DataFrame:
    """Return columns layer, part (attention or mlp), relevance, ci_low, ci_high: the relevance of what each part adds."""
    values = np.stack([part.numpy() for part in scores.routed[rule]])
    parts = []
    for at, part in enumerate(("attention", "mlp")):
        interval = cluster_bootstrap(values[:, at], np.arange(len(values)), seed=seed)
        parts.append(pd.DataFrame({
            "layer": np.arange(values.shape[2]), "part": part, "relevance": interval.mean,
            "ci_low": interval.low, "ci_high": interval.high,
        }))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def leak_notes(scores: GradientScores) -> list[str]:
    """Say how much of the metric is the tokens' under each rule, and how many accounts miss."""
    said = []
    for rule, rows in scores.leaks.items():
        if rule == "dynamic":
            continue
        missed = sum(miss for *_, miss in rows)
        size = float(np.mean([abs(metric) for metric, *_ in rows])) or 1.0
        leaks = [leaks for _, leaks, _ in rows]
        shares = {
            "tokens": np.mean([float(one.tokens[0]) for one in leaks]),
            "biases": np.mean([float(one.biases.sum()) for one in leaks]),
            "the softmax of attention": np.mean([float(one.softmax.sum()) for one in leaks]),
        }
        parts = ", ".join(f"{name} {value / size:+.0%}" for name, value in shares.items())
        said.append(f"Under rule {rule} the metric (mean size {size:.2f}) is made of: {parts}.")
        if missed:
            said.append(
                f"Under rule {rule} the account of {missed} of {len(rows)} prompts misses the metric by more than 1e-4: they "
                "are left out of the table token_relevance for methods of that rule."
            )
    return said


def span_of(case: Case) -> tuple[str, frozenset[int]]:
    """Return the name of a prompt's span and its positions: those given, or those that hold an answer token."""
    if case.span:
        return "given", frozenset(case.span)
    return "answer", frozenset(at for at, token in enumerate(case.tokens) if token in case.answers)


def pointing_table(cases: Sequence[Case], tokens: pd.DataFrame) -> pd.DataFrame:
    """Return columns method, span, first_token, rate, low, high, chance, n: how often the most relevant token lies in its span.

    `chance` is the mean share of a prompt's positions that are in its span; `first_token` says whether position 0 counts.
    Bounds are Wilson's. Prompts without a span are left out.
    """
    by_prompt = {case.index: span_of(case) for case in cases}
    rows = []
    for method, own in tokens.groupby("method", sort=False):
        for first in (True, False):
            hits: dict[str, list[tuple[bool, float]]] = {}
            for prompt, row in own.groupby("prompt"):
                name, span = by_prompt[int(str(prompt))]
                allowed = row if first else row[row["position"] > 0]
                inside = span if first else span - {0}
                if not inside or allowed.empty or len(inside) == len(allowed):
                    continue
                best = int(allowed["position"].to_numpy()[allowed["score"].to_numpy().argmax()])
                hits.setdefault(name, []).append((best in inside, len(inside) / len(allowed)))
            for name, values in hits.items():
                n, right = len(values), sum(hit for hit, _ in values)
                chance = float(np.mean([share for _, share in values]))
                rows.append((method, name, first, right / n, *wilson(right, n), chance, n))
    return pd.DataFrame(rows, columns=["method", "span", "first_token", "rate", "low", "high", "chance", "n"])
