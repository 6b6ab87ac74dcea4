"""Communication channels: low-rank subspaces through which an attention head writes what a later head reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from analyses.base import Analysis, Measured, PromptsLike
from analyses.communication_channels.figures import FIGURES, PROFILES
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
from analyses.communication_channels.task import (
    Settings,
    check_heads,
    edit_channels,
    most_forwards,
    parse_heads,
    steer_lists,
)
from analyses.interventions import Interventions, Tally
from analyses.options import accept_old_names, option
from analyses.tokens import token_text
from probes.errors import PointError
from probes.models.protocol import BlockAccess, Model
from probes.points import Address
from probes.progress import Progress
from probes.prompts import Prompt
from probes.store import ActivationStore
from probes.weights.composition import Heads, Kind
from probes.weights.head_weights import head_weights, rotary


@accept_old_names
@dataclass(frozen=True)
class CommunicationChannels(Settings, Analysis):
    """Composition of attention heads by singular components (Merullo et al. 2024, "Talking Heads", arXiv 2406.09519)."""

    kinds: tuple[Kind, ...] = option(("q", "k", "v"), "What the later head does with what it reads: query, key, value.")
    fold_norm: bool = option(True, "Put the gain of the norm before attention into the reading weights.")
    center: bool = option(True, "When folding a norm that subtracts the mean, make the reading weights blind to it.")
    rope_offset: int = option(0, "Distance in tokens between query and key, for models with rotary embeddings.", low=0)
    null: Null = option("analytic", "How p values of component scores are found: a matched gamma, or random draws.")
    n_null: int = option(2000, "null random: how many directions are drawn.", low=100)
    z_thresh: float = option(5.0, "Robust z of a component among its head's above which a pair may be flagged.", low=0)
    pairs: int = option(8, "Pairs of each kind whose components are listed.", low=1)

    name = "communication_channels"
    title = "Communication channels between heads"
    reference = 'Merullo, Eickhoff and Pavlick 2024, "Talking Heads", arXiv 2406.09519'
    figures = FIGURES
    profiles = PROFILES
    reads = "weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_heads(self.heads)

    @property
    def makes_prompts(self) -> bool:
        """Always: the scan is of weights, and the edits generate their own prompts."""
        return True

    def interventions(self, model: Model, prompts: Sequence[Prompt]) -> Interventions:
        """Count the task's prompts and their restarts under edited channels: the most there can be, since the scan chooses them."""
        if self._no_task(model) is not None:
            return Interventions()
        return Interventions(most_forwards(model, self), exact=False)

    def collect(self, model: Model, prompts: PromptsLike) -> list[Prompt]:
        """Return no prompts: the scan is of weights alone."""
        return []

    def measure(self, model: Model, prompts: PromptsLike, store: ActivationStore, progress: Progress) -> Measured:
        """Return the tables `composition`, `components`, `tokens`; with a task `task`, `edits`, `rank`; and `laundry`, `steering`.

        The given prompts are not used: the scan needs none, and the edits make their own.
        """
        tally = Tally(progress)
        check_heads(self.heads, model)
        heads = head_weights(model, fold_norm=self.fold_norm, center=self.center)
        rotation = rotary(model, self.rope_offset)
        scans = [scan(heads, kind, rotation) for kind in dict.fromkeys(self.kinds)]
        table = composition_table(scans, self.null, self.n_null, self.seed, self.z_thresh)
        notes = [*heads.notes, self._weights_note(heads)]
        tables: dict[str, pd.DataFrame] = {"composition": table}
        listed = [ranked(table, kind).head(self.pairs) for kind in dict.fromkeys(self.kinds)]
        reason, counts = self._no_task(model), {"prompts": 0, "tokens": 0}
        if reason is None:
            edits, edited, n_tokens = edit_channels(model, heads, scans, table, self, tally)
            tables |= edits
            counts = {"prompts": int(edits["task"]["n"].iloc[0]), "tokens": n_tokens}
            listed.append(edited)
        elif self.task != "none":
            notes.append(f"No prompts were run: {reason}.")
        pairs = pd.concat(listed).drop_duplicates(PAIR)
        tables["components"] = component_table(heads, scans, pairs, self.null, self.n_null, self.seed)
        tables["tokens"] = _token_table(model, heads, scans, pairs)
        if reason is None and self.laundry_prompts:
            tables |= steer_lists(model, heads, scans, table, edited, self, tally)
        return Measured([], tables, None, notes, counts, tally.forwards)

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
        if not isinstance(model, BlockAccess):
            return f"backend {model.context.backend} cannot resume inside the stack"
        try:
            model.unembedding()
        except PointError as error:
            return str(error)
        return model.refusal(Address("pattern", 0)) or model.refusal(Address("z", 0))


def _token_table(model: Model, heads: Heads, scans: Sequence[Scan], pairs: pd.DataFrame, k: int = 6) -> pd.DataFrame:
    """Return the tokens that a pair's strongest component promotes, and those whose embeddings it reads most."""
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
