"""When each stage of a two-hop answer happens: the bridge is resolved, moves, the answer is resolved, is extracted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.back_patching.cases import LAST, Case, firsts
from probes import edits
from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.together import together
from probes.capture.activations import Activations
from probes.edits import KnockOut
from probes.lenses import logit
from probes.models.protocol import Model
from probes.points import Address
from probes.prompts import Prompt, tokenize

PATCHSCOPE = "Syria: Syria\nLeonardo DiCaprio: Leonardo DiCaprio\nSamsung: Samsung\nx:"
"""A prompt that names what stands before its last colon; the patched token is `x`."""

Resolution = tuple[int, str, str, str, float]
"""(prompt, set, position, entity, earliest layer or NaN)."""
Critical = tuple[int, str, int, bool]
"""(prompt, position name, layer, whether the next token changes)."""

STAGES = ("first_hop_resolved", "propagation", "second_hop_resolved", "prediction_extracted")


@dataclass(frozen=True)
class Patchscope:
    """The naming prompt, run once and open at its placeholder."""

    prompt: Prompt
    base: CachedPrompt
    targets: tuple[int, ...]

    @classmethod
    def open(cls, model: Model, step: int) -> Patchscope:
        """Open the prompt at the token before its last colon, with a target at every `step`-th block."""
        prompt = tokenize([PATCHSCOPE], model)[0]
        base = CachedPrompt(model, prompt.tokens, len(prompt.tokens) - 2)
        return cls(prompt, base, tuple(range(0, model.shape.n_layers, step)))

    def names(self, sources: Float[Tensor, "layer d_model"]) -> Int[Tensor, "layer target"]:
        """Return the first token of the name that the prompt gives to each source row, for each target block."""
        entering = torch.stack(self.base.entering[:])
        first = [t + 1 for _ in sources for t in self.targets]
        hidden = entering[first].clone()
        hidden[:, 0] = sources.repeat_interleave(len(self.targets), 0)
        last = self.base.resume(first, hidden).last
        top = logit.read(last, self.base.model.unembedding(), top_k=1).top_ids[:, 0].cpu()
        return top.view(len(sources), len(self.targets))


def _earliest(hits: Tensor | np.ndarray, layers: Sequence[int]) -> float:
    places = np.flatnonzero(np.asarray(hits, dtype=bool))
    return float(layers[places[0]]) if len(places) else np.nan


def resolutions(scope: Patchscope, case: Case, sources: dict[str, Tensor], layers: Sequence[int]) -> list[Resolution]:
    """Return (prompt, set, position, entity, earliest layer or NaN) for the bridge and the answer at each position."""
    rows: list[Resolution] = []
    model = scope.base.model
    named_as = {
        "bridge": firsts(model, scope.prompt, case.bridge_texts),
        "answer": case.given | firsts(model, scope.prompt, case.answer_texts),
    }
    namings = together(model, [partial(scope.names, stream[list(layers)]) for stream in sources.values()])
    for name, named in zip(sources, namings, strict=True):
        for entity, ids in named_as.items():
            hits = torch.isin(named, torch.tensor(sorted(ids), dtype=torch.long)).any(-1)
            rows.append((case.prompt, case.set, name, entity, _earliest(hits, layers)))
    return rows


def inner(case: Case) -> dict[str, int]:
    """Return the case's positions before the last."""
    return {name: position for name, position in case.positions.items() if position < len(case.tokens) - 1}


def critical_layers(model: Model, case: Case, layers: Sequence[int], half_window: int) -> list[Critical]:
    """Cut the last token's view of each inner position in a window around each layer.

    Returns:
        (prompt, position name, layer, whether the next token changes) for each.
    """
    if not inner(case):
        return []
    n_layers, last = model.shape.n_layers, len(case.tokens) - 1
    places = [(name, position, layer) for name, position in inner(case).items() for layer in layers]

    def top(cut: Sequence[KnockOut]) -> int:
        return int(edits.logits(model, torch.tensor([case.tokens]), cut)[0, -1].argmax())

    def around(position: int, layer: int) -> KnockOut:
        window = range(max(0, layer - half_window), min(n_layers, layer + half_window + 1))
        return KnockOut(tuple(window), queries=(last,), keys=(position,))

    cuts = [[], *([around(position, layer)] for _, position, layer in places)]
    plain, *knocked = together(model, [partial(top, cut) for cut in cuts])
    return [(case.prompt, name, layer, token != plain) for (name, _, layer), token in zip(places, knocked, strict=True)]


def projections(activations: Activations, cases: Sequence[Case]) -> pd.DataFrame:
    """Return whether each sublayer's output at the last token, read by the unembedding, has the answer or bridge on top."""
    model, rows = activations.model, []
    final = torch.cat(activations.get(Address("resid_post", model.shape.n_layers - 1), LAST))
    predicted = logit.read(final, model.unembedding(), top_k=1).top_ids[:, 0].tolist()
    for part in ("attn_out", "mlp_out"):
        for layer in range(model.shape.n_layers):
            out = torch.cat(activations.get(Address(part, layer), LAST))
            top = logit.read(out, model.unembedding(), top_k=1).top_ids[:, 0].tolist()
            for case, token, prediction in zip(cases, top, predicted, strict=True):
                rows.append(
                    (case.prompt, part, layer, token in case.bridges, token in case.answers, token == prediction)
                )
    return pd.DataFrame(
        rows, columns=["prompt", "part", "layer", "bridge_on_top", "answer_on_top", "prediction_on_top"]
    )


def stage_tables(
    cases: Sequence[Case],
    rows: Sequence[tuple[list[Resolution], list[Critical], int]],
    activations: Activations,
) -> dict[str, pd.DataFrame]:
    """Return the tables `stages`, `resolution`, `knockout` and `projection` from each case's rows."""
    resolution = pd.DataFrame(
        [row for resolved, _, _ in rows for row in resolved], columns=["prompt", "set", "position", "entity", "layer"]
    )
    knockout = pd.DataFrame(
        [row for _, knocked, _ in rows for row in knocked], columns=["prompt", "position_name", "layer", "critical"]
    ).astype({"critical": bool})
    projection = projections(activations, cases)
    by_stage = stages(cases, resolution, knockout, projection)
    return {"stages": by_stage, "resolution": resolution, "knockout": knockout, "projection": projection}


def stages(
    cases: Sequence[Case], resolution: pd.DataFrame, knockout: pd.DataFrame, projection: pd.DataFrame
) -> pd.DataFrame:
    """Return columns prompt, set, stage, layer; the layer is NaN where a stage was never seen."""
    rows = []
    for case in cases:
        resolved = resolution[resolution["prompt"] == case.prompt].set_index(["position", "entity"])["layer"]
        read = projection[projection["prompt"] == case.prompt]
        seen = (knockout["prompt"] == case.prompt) & (knockout["position_name"] == "t1")
        cut = knockout[seen & knockout["critical"]]["layer"]
        bridge = read[(read["part"] == "attn_out") & read["bridge_on_top"]]["layer"]
        moving = [cut.min(), bridge.min(), resolved.get(("t2", "bridge"), np.nan)]
        known = [float(m) for m in moving if m == m]
        extracted = read[(read["part"] == "mlp_out") & read["prediction_on_top"]]["layer"]
        values = (
            resolved.get(("t1", "bridge"), np.nan),
            float(np.mean(known)) if known else np.nan,
            resolved.get(("t2", "answer"), np.nan),
            float(extracted.min()) if len(extracted) else np.nan,
        )
        rows += [(case.prompt, case.set, stage, layer) for stage, layer in zip(STAGES, values, strict=True)]
    return pd.DataFrame(rows, columns=["prompt", "set", "stage", "layer"])
