"""What happens at the end of a prompt when one component of a head is changed there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.answers import as_merged, forms
from analyses.results.statistics import cluster_bootstrap
from analyses.tasks.ioi import Ioi
from probes.blocks.cached_prompt import CachedPrompt
from probes.lenses import logit
from probes.models.protocol import Model, Write
from probes.points import Address
from probes.prompts import tokenize
from probes.weights.composition import Circuit, Heads


@dataclass(frozen=True, eq=False)
class Change:
    """One edit of a head's output o at the last position: o + ((keep - 1) c + offset) v with c = o · v."""

    label: str
    component: int
    """-1 where it is no singular component."""
    direction: Tensor
    """v [d_model], a unit vector inside what the head can write."""
    keep: float = 0.0
    offset: float = 0.0


@dataclass(frozen=True)
class Spots:
    """The tokens of an indirect-object prompt, and where its names are in them."""

    tokens: tuple[int, ...]
    io: int
    """Token of the name that should come next."""
    s: int
    io_at: int
    s_at: int
    """Where the subject stands first."""


@dataclass(frozen=True, eq=False)
class Names:
    """An indirect-object prompt as the model sees it."""

    cached: CachedPrompt
    io: int
    """Token of the name that should come next."""
    s: int
    io_at: int
    s_at: int
    """Where the subject stands first."""


def open_prompts(model: Model, prompts: Sequence[Ioi]) -> list[Names]:
    """Run prompts once, with their last position open; leave out those whose names are not one token each."""
    return [
        Names(CachedPrompt(model, one.tokens, -1), one.io, one.s, one.io_at, one.s_at) for one in spots(model, prompts)
    ]


def spots(model: Model, prompts: Sequence[Ioi]) -> list[Spots]:
    """Find the names in the prompts whose names are one token each."""
    in_prompts = []
    for prompt in prompts:
        tokens = tokenize([prompt.text], model)[0].tokens
        io, s = (name_token(model, name) for name in (prompt.indirect, prompt.subject))
        places = [
            [i for i, token in enumerate(tokens) if token in name_forms(model, n)]
            for n in (prompt.indirect, prompt.subject)
        ]
        if io is not None and s is not None and len(places[0]) == 1 and len(places[1]) == 2:
            in_prompts.append(Spots(tokens, io, s, places[0][0], places[1][0]))
    return in_prompts


def name_token(model: Model, name: str) -> int | None:
    """Return the one token of a name after a space; None if it has several."""
    ids = as_merged(model.tokenizer, "a", f" {name}")
    return ids[0] if ids is not None and len(ids) == 1 else None


def name_forms(model: Model, name: str) -> set[int]:
    """Return the tokens that stand for a name inside a text or at its start."""
    return forms(model.tokenizer, name)


def head_factors(
    w_o: Float[Tensor, "d_head d_model"], directions: Float[Tensor, "row d_model"]
) -> tuple[Float[Tensor, "row d_head"], Float[Tensor, "row d_head"]]:
    """Express directions v of a head's output o in the head's z, as pairs (read, write).

    z · read is o · v; adding a multiple of write to z adds that multiple of v to o.

    Args:
        directions: inside the span of the rows of `w_o`.
    """
    return directions @ w_o.T, directions @ torch.linalg.pinv(w_o)


def changed_head(head: int, w_o: Float[Tensor, "d_head d_model"], changes: Sequence[Change]) -> Write:
    """Return a write of z [rows, pos, head, d_head] that makes one change per row at the last position."""
    read, write = head_factors(w_o, torch.stack([c.direction for c in changes]))
    keep, offset = (torch.tensor([getattr(c, name) for c in changes]) for name in ("keep", "offset"))

    def edit(z: Tensor) -> Tensor:
        out, own = z.clone(), z[:, -1, head].float()
        r, w = read.to(own), write.to(own)
        amount = (keep.to(own) - 1) * (own * r).sum(-1) + offset.to(own)
        out[:, -1, head] = (own + amount[:, None] * w).to(z.dtype)
        return out

    return edit


def whole_head(head: int, values: Float[Tensor, " d_head"] | None) -> Write:
    """Return a write that sets the head's z at the last position to zero, or to given values."""

    def edit(z: Tensor) -> Tensor:
        out = z.clone()
        out[:, -1, head] = 0 if values is None else values.to(z)
        return out

    return edit


@dataclass(frozen=True, eq=False)
class Outcome:
    """Measurements at the end of one prompt, one entry per change."""

    attention: Tensor
    """[rows, key], the target head's."""
    logits: Tensor
    """[rows, 2], of the indirect object and of the subject."""


@torch.no_grad()
def outcome(names: Names, source: int, target: tuple[int, int], write: Write, rows: int) -> Outcome:
    """Measure the target head's attention and the names' logits under a write of the source layer's z."""
    seen: list[Tensor] = []
    at = Address("pattern", target[0])

    def keep(pattern: Tensor) -> None:
        seen.append(pattern[:, target[1], -1].clone())

    last = names.cached.edited(source, rows, {Address("z", source): write}, {at: keep})
    unembedding = names.cached.model.unembedding()
    hidden = logit.normalized(last, unembedding)
    logits = logit.token_logits(hidden, unembedding, torch.tensor([names.io, names.s]))
    return Outcome(seen[0].cpu(), logits.cpu())


def measures(names: Names, edited: Outcome, base: Outcome) -> dict[str, Float[Tensor, " row"]]:
    """Return three measures per row.

    `attention_change` is the total variation distance of the last position's attention from the unedited one,
    `inhibition` the attention to the indirect object minus that to the subject's first mention, `logit_difference` that of
    the indirect object and the subject.
    """
    change = (edited.attention - base.attention).abs().sum(-1) / 2
    inhibition = edited.attention[:, names.io_at] - edited.attention[:, names.s_at]
    return {
        "attention_change": change,
        "inhibition": inhibition,
        "logit_difference": edited.logits[:, 0] - edited.logits[:, 1],
    }


def standard_changes(
    source: Circuit, component: int, stride: int, random_directions: int, alphas: Sequence[float], seed: int
) -> list[Change]:
    """Return the changes made to every edited head.

    Every stride-th component and the chosen one are set to zero, and so are random directions of the head's span; the
    chosen component is also scaled by each of `alphas`.
    """
    write = source.svd[2]
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.nn.functional.normalize(
        torch.randn(random_directions, len(write), generator=generator) @ write, dim=-1
    )
    swept = sorted({component, *range(0, len(write), stride)})
    changes = [Change("zero", i, write[i]) for i in swept]
    changes += [Change("random_direction", -1, v) for v in mixed]
    return changes + [Change(f"scale:{alpha:g}", component, write[component], keep=alpha) for alpha in alphas]


def pair_forwards(prompts: int, changes: int) -> int:
    """Count the rows that `pair_effects` runs: per prompt each change, the head at zero and at its mean, and two unedited."""
    return prompts * (changes + 4)


def pair_effects(
    prompts: Sequence[Names], heads: Heads, pair: pd.Series, changes: Sequence[Change], tick: Callable[[int], None]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (effects of every change and of whole-head ablations, coefficients of each component), both per prompt."""
    layer, head = int(pair["source_layer"]), int(pair["source_head"])
    target = (int(pair["target_layer"]), int(pair["target_head"]))
    w_o, circuit = heads.w_o[layer, head], Circuit(heads.w_v[layer, head], heads.w_o[layer, head])
    values = [head_output(names.cached, layer, head) for names in prompts]
    mean = torch.stack(values).mean(0)
    tick(len(prompts))
    rows, coefficients = [], []
    for index, names in enumerate(prompts):
        base = outcome(names, layer, target, lambda z: z, 1)
        outcomes = {"edit": outcome(names, layer, target, changed_head(head, w_o, changes), len(changes)),
                "head_zero": outcome(names, layer, target, whole_head(head, None), 1),
                "head_mean": outcome(names, layer, target, whole_head(head, mean), 1)}  # fmt: skip
        tick(len(changes) + 3)
        before = {k: float(v[0]) for k, v in measures(names, base, base).items()}
        for name, edited in outcomes.items():
            after = measures(names, edited, base)
            labels = [(c.label, c.component) for c in changes] if name == "edit" else [(name, -1)]
            for row, (label, component) in enumerate(labels):
                rows += [
                    (index, label, component, row, metric, before[metric], float(v[row])) for metric, v in after.items()
                ]
        c = (values[index] @ w_o) @ circuit.svd[2].T
        coefficients += [(index, i, float(x)) for i, x in enumerate(c)]
    effects = pd.DataFrame(rows, columns=["prompt", "edit", "component", "row", "metric", "before", "after"])
    return effects, pd.DataFrame(coefficients, columns=["prompt", "component", "coefficient"])


def head_output(prompt: CachedPrompt, layer: int, head: int) -> Float[Tensor, " d_head"]:
    """Return a head's z at the last position, float32."""
    seen: list[Tensor] = []
    prompt.edited(layer, 1, {}, {Address("z", layer): lambda z: seen.append(z[0, -1, head].float().cpu().clone())})
    return seen[0]


def effect_table(effects: pd.DataFrame, pair: pd.Series, names: Sequence[str], seed: int) -> pd.DataFrame:
    """Return means over prompts with intervals, one row per change and metric."""
    rows = []
    for (edit, component, row, metric), group in effects.groupby(["edit", "component", "row", "metric"], sort=False):
        interval = cluster_bootstrap(group["after"] - group["before"], group["prompt"], seed=seed)
        means = {"before": group["before"].mean(), "after": group["after"].mean(), **interval.columns("change", "ci_")}
        what = {"component": component, "edit": edit, "row": row, "metric": metric}
        rows.append({**{name: pair[name] for name in names}, **what, **means, "n": len(group)})
    return pd.DataFrame(rows)


def beaten(table: pd.DataFrame, component: int, metric: str = "attention_change") -> dict[str, float]:
    """Return the shares of the head's other components, and of random directions in its span, that change the metric less."""
    effects = table[table["metric"] == metric]
    zero = effects[effects["edit"] == "zero"].set_index("component")["change"].abs()
    others, random = zero.drop(component), effects[effects["edit"] == "random_direction"]["change"].abs()
    return {
        "components": float(np.mean(others < zero[component])),
        "directions": float(np.mean(random < zero[component])),
    }
