"""Communication channels: low-rank subspaces through which an attention head writes what a later head reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch

from analyses.base import Analysis, Clock, PromptsLike, make_result
from analyses.communication_channels import laundry as laundry
from analyses.communication_channels.edits import (
    Names,
    beaten,
    effect_table,
    name_token,
    open_prompts,
    pair_effects,
    standard_changes,
)
from analyses.communication_channels.figures import FIGURES
from analyses.communication_channels.profiles import PROFILES
from analyses.communication_channels.scan import (
    PAIR,
    Null,
    Scan,
    component_table,
    composition_table,
    pair_circuits,
    ranked,
    scan,
)
from analyses.options import option, validate
from analyses.result import FigureSpec, ProfileSpec, Result
from analyses.statistics import cluster_bootstrap, wilson
from analyses.tasks import ioi as tasks_ioi
from analyses.tasks import laundry as tasks_laundry
from analyses.tokens import token_text
from probes import lens
from probes.composition import Heads, Kind
from probes.errors import PointError
from probes.head_weights import head_weights, rotary
from probes.models.base import Model
from probes.needs import Need
from probes.points import Address
from probes.progress import QUIET, Progress
from probes.prompts import Field, Prompt
from probes.store import ActivationStore

ALPHAS = (-2.0, -1.0, 0.5, 2.0, 4.0)
"""Factors of the sweep of a component's size, beside 0 and 1."""


@dataclass(frozen=True)
class CommunicationChannels(Analysis):
    """Composition of attention heads by singular components (Merullo et al. 2024, "Talking Heads", arXiv 2406.09519)."""

    kinds: tuple[Kind, ...] = option(("q", "k", "v"), "What the later head does with what it reads: query, key, value.")
    fold_norm: bool = option(True, "Put the gain of the norm before attention into the reading weights.")
    center: bool = option(True, "When folding a norm that subtracts the mean, make the reading weights blind to it.")
    rope_offset: int = option(0, "Distance in tokens between query and key, for models with rotary embeddings.", low=0)
    null: Null = option("analytic", "How p values of component scores are found: a matched gamma, or random draws.")
    n_null: int = option(2000, "null random: how many directions are drawn.", low=100)
    z_thresh: float = option(5.0, "Robust z of a component among its head's above which a pair may be flagged.", low=0)
    pairs: int = option(8, "Pairs of each kind whose components are listed.", low=1)
    task: Literal["ioi", "none"] = option("ioi", "ioi: also edit channels on generated prompts; none: weights only.")
    task_prompts: int = option(40, "ioi: how many prompts are generated.", low=2)
    edit_pairs: int = option(
        2, "ioi: query channels edited, half by rank, half into the head that finds the name.", low=1
    )
    random_directions: int = option(32, "ioi: control directions inside what the head can write.", low=1)
    laundry_items: tuple[int, ...] = option((2, 3, 4, 6), "Lengths of the lists to recall from.", low=2, high=20)
    laundry_prompts: int = option(4, "Lists per length and place of the answer; 0 leaves the task out.", low=0)
    steer_steps: int = option(3, "Values of each of the three steered coefficients.", low=2, high=15)
    seed: int = option(0, "Seed of prompts, controls and intervals.")

    name: ClassVar[str] = "communication_channels"
    title: ClassVar[str] = "Communication channels between heads"
    reference: ClassVar[str] = 'Merullo, Eickhoff and Pavlick 2024, "Talking Heads", arXiv 2406.09519'
    prompt_fields: ClassVar[Mapping[str, Field]] = {}
    figures: ClassVar[Mapping[str, FigureSpec]] = FIGURES
    profiles: ClassVar[Mapping[str, ProfileSpec]] = PROFILES

    def __post_init__(self) -> None:
        validate(self)

    @property
    def makes_prompts(self) -> bool:
        """Yes: the scan is of weights, and the edits make their own."""
        return True

    @property
    def intervenes(self) -> bool:
        """With a task, on whose prompts channels are edited."""
        return self.task != "none"

    def collect(self, model: Model, prompts: PromptsLike) -> list[Prompt]:
        """None of those given: the scan is of weights alone."""
        return []

    def needs(self, model: Model) -> list[Need]:
        """Nothing: the scan is of weights, and edits are interventions."""
        return []

    def run(
        self,
        model: Model,
        prompts: PromptsLike = (),
        *,
        store: ActivationStore | None = None,
        progress: Progress = QUIET,
    ) -> Result:
        """Tables `composition`, `components`, `tokens`; with a task `task`, `edits`, `rank`; and `laundry`, `steering`.

        The given prompts are not used: the scan needs none, and the edits make their own.
        """
        clock = Clock()
        heads = head_weights(model, fold_norm=self.fold_norm, center=self.center)
        rotation = rotary(model, self.rope_offset)
        scans = [scan(heads, kind, rotation) for kind in dict.fromkeys(self.kinds)]
        table = composition_table(scans, self.null, self.n_null, self.seed, self.z_thresh)
        notes = [*heads.notes, self._weights_note(heads)]
        tables: dict[str, pd.DataFrame] = {"composition": table}
        wanted = [ranked(table, kind).head(self.pairs) for kind in dict.fromkeys(self.kinds)]
        reason, counts = self._no_task(model), {"prompts": 0, "tokens": 0}
        if reason is None:
            made, edited, n_tokens = self._edits(model, heads, scans, table, progress)
            tables |= made
            counts = {"prompts": int(made["task"]["n"].iloc[0]), "tokens": n_tokens}
            wanted.append(edited)
        elif self.task != "none":
            notes.append(f"No prompts were run: {reason}.")
        pairs = pd.concat(wanted).drop_duplicates(PAIR)
        tables["components"] = component_table(heads, scans, pairs, self.null, self.n_null, self.seed)
        tables["tokens"] = _token_table(model, heads, scans, pairs)
        if reason is None and self.laundry_prompts:
            tables |= self._laundry(model, heads, scans, table, edited)
        return make_result(self, model, [], tables, None, clock, notes, counts)

    def _weights_note(self, heads: Heads) -> str:
        folded = "with" if heads.fold_norm else "without"
        return f"Scores are of weights {folded} the norm's gain folded in, at a rotary offset of {self.rope_offset}."

    def _no_task(self, model: Model) -> str | None:
        if self.task == "none":
            return "none was asked for"
        if "q" not in self.kinds:
            return "only channels into queries are edited, and kinds leaves out q"
        if model.tokenizer is None or not model.shape.causal:
            return "the model has no tokenizer" if model.tokenizer is None else "the model reads both ways"
        if getattr(model, "tapped", None) is None:
            return f"backend {model.context.backend} cannot resume inside the stack"
        try:
            model.unembedding()
        except PointError as error:
            return str(error)
        return model.refusal(Address("pattern", 0)) or model.refusal(Address("z", 0))

    def _edits(
        self, model: Model, heads: Heads, scans: Sequence[Scan], table: pd.DataFrame, progress: Progress
    ) -> tuple[dict[str, pd.DataFrame], pd.DataFrame, int]:
        """(tables, the pairs edited, tokens of the prompts)."""
        made = tasks_ioi.sample(self.task_prompts, self.seed, lambda name: name_token(model, name) is not None)
        prompts = open_prompts(model, made)
        mover, attention = mover_head(model, prompts)
        by_rank = ranked(table, "q")
        into_mover = ranked(table, "q", mover)
        n = (self.edit_pairs + 1) // 2
        chosen = pd.concat([by_rank.head(n), into_mover.head(self.edit_pairs - n)]).drop_duplicates(PAIR)
        effects, ranks = [], []
        progress.start(len(chosen), "channel")
        for _, pair in chosen.iterrows():
            source, _ = pair_circuits(heads, scans, pair)
            component = int(pair["component"])
            changes = standard_changes(source, component, self.random_directions, ALPHAS, self.seed)
            found, sizes = pair_effects(prompts, heads, pair, changes, self.seed)
            effects.append(effect_table(found, pair, PAIR, self.seed))
            shares = beaten(effects[-1], component)
            matched = _matched(source.svd[1], sizes, component)
            ranks.append(
                {
                    **{name: pair[name] for name in PAIR}, "component": component, "z": pair["z"],
                    "components_beaten": shares["components"], "directions_beaten": shares["directions"], **matched,
                }
            )  # fmt: skip
            progress.advance()
        tables = {
            "task": _task_table(prompts, mover, attention, self.seed),
            "edits": pd.concat(effects, ignore_index=True),
            "rank": pd.DataFrame(ranks),
        }
        return tables, chosen, sum(len(names.held.tokens) for names in prompts)

    def _laundry(
        self, model: Model, heads: Heads, scans: Sequence[Scan], table: pd.DataFrame, edited: pd.DataFrame
    ) -> dict[str, pd.DataFrame]:
        mover = edited.iloc[-1]
        into = ranked(table, "q", (int(mover["target_layer"]), int(mover["target_head"]))).head(3)
        channel, control = [], []
        generator = torch.Generator().manual_seed(self.seed)
        for _, pair in into.iterrows():
            source, _ = pair_circuits(heads, scans, pair)
            layer, head = int(pair["source_layer"]), int(pair["source_head"])
            write = source.svd[2]
            channel.append(laundry.Dial(layer, head, write[int(pair["component"])]))
            mixed = torch.randn(len(write), generator=generator) @ write
            control.append(laundry.Dial(layer, head, mixed / mixed.norm()))

        def single(item: str) -> bool:
            return name_token(model, item) is not None

        by_length = {}
        for n in self.laundry_items:
            made = tasks_laundry.sample(n, self.laundry_prompts, self.seed, keeps=single)
            by_length[n] = laundry.listed(model, made)
        accuracy, steering = laundry.run(
            model, heads, by_length, {"channel": channel, "random": control}, self.steer_steps
        )
        return {"laundry": accuracy, "steering": steering}


def mover_head(model: Model, prompts: Sequence[Names]) -> tuple[tuple[int, int], np.ndarray]:
    """(the head that attends most to the indirect object rather than the subject at the end, that difference by
    [layer, head]).
    """
    n_layers, n_heads = model.shape.n_layers, model.shape.n_heads
    total = np.zeros((n_layers, n_heads))
    for names in prompts:

        def keep(layer: int, names: Names = names):  # type: ignore[no-untyped-def]
            def read(pattern: torch.Tensor) -> None:
                row = pattern[0, :, -1].float().cpu().numpy()
                total[layer] += (row[:, names.io_at] - row[:, names.s_at]) / len(prompts)

            return read

        names.held.edited(0, 1, {}, {Address("pattern", layer): keep(layer) for layer in range(n_layers)})
    later = total[1:]
    layer, head = np.unravel_index(int(later.argmax()), later.shape)
    return (int(layer) + 1, int(head)), total


def _matched(singular: torch.Tensor, sizes: pd.DataFrame, component: int) -> dict[str, int]:
    """Other components nearest to the chosen one in singular value, and in the mean size of their coefficient."""
    s = (singular - singular[component]).abs()
    s[component] = torch.inf
    size = sizes["coefficient"].abs().groupby(sizes["component"]).mean()
    distance = (size - size[component]).abs()
    distance[component] = np.inf
    return {"matched_singular_value": int(s.argmin()), "matched_coefficient": int(distance.idxmin())}


@torch.no_grad()
def _task_table(prompts: Sequence[Names], mover: tuple[int, int], attention: np.ndarray, seed: int) -> pd.DataFrame:
    difference, solved = [], []
    for names in prompts:
        unembedding = names.held.model.unembedding()
        hidden = lens.normalized(names.held.entering[-1][-1:], unembedding)
        io, s = lens.token_logits(hidden, unembedding, torch.tensor([names.io, names.s]))[0].tolist()
        difference.append(io - s)
        solved.append(io > s)
    mean = cluster_bootstrap(difference, range(len(prompts)), seed=seed)
    low, high = wilson(sum(solved), len(solved))
    return pd.DataFrame(
        [
            ("accuracy", float(np.mean(solved)), low, high, len(prompts)),
            ("logit_difference", mean.mean[0], mean.low[0], mean.high[0], len(prompts)),
            (
                f"attention of {mover[0]}.{mover[1]} to the indirect object minus the subject",
                attention[mover],
                np.nan,
                np.nan,
                len(prompts),
            ),
        ],
        columns=["measure", "value", "ci_low", "ci_high", "n"],
    )


def _token_table(model: Model, heads: Heads, scans: Sequence[Scan], pairs: pd.DataFrame, k: int = 6) -> pd.DataFrame:
    """Tokens that the strongest component's write direction promotes, and whose embeddings its read direction meets."""
    try:
        unembed = model.unembedding().weight.float().cpu()
    except PointError:
        unembed = None
    embed = getattr(getattr(model, "component", lambda _: None)("embed"), "weight", None)
    rows = []
    for _, pair in pairs.iterrows():
        source, _target = pair_circuits(heads, scans, pair)
        read, _s, write = source.svd
        component = int(pair["component"])
        for side, direction, matrix in (("writes", write[component], unembed), ("reads", read[component], embed)):
            if matrix is None or matrix.shape[-1] != len(direction):
                continue
            values = matrix.detach().float().cpu() @ direction
            for sign, scores in (("+", values), ("-", -values)):
                top = scores.topk(min(k, len(scores)))
                text = " ".join(token_text(model, int(t)).strip() or "·" for t in top.indices)
                rows.append((*(pair[name] for name in PAIR), component, side, sign, text, float(top.values[0])))
    return pd.DataFrame(rows, columns=[*PAIR, "component", "side", "sign", "tokens", "largest"])
