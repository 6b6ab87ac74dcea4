"""What a Patchscope adds to its prompt: the lift of a watched token over the same prompt with rows that do not hold it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from analyses.lenses.items import Watched
from analyses.lenses.watched import place_rows
from analyses.tokens import tokens_text
from probes.capture.activations import Activations
from probes.lens_fits.patchscope import (
    Patchscope,
    Rescale,
    Target,
    chat_target,
    few_shot_target,
    identity_target,
    norm_matched_noise,
)  # fmt: skip
from probes.lenses import logit
from probes.models.protocol import Model
from probes.points import Address
from probes.reducers import ROWS

Kind = Literal["identity", "describe", "relation", "selfie"]
COPIES = ("river", "seven", "blue")
DESCRIPTIONS = (
    ("Egypt", "a country in the north of Africa"), ("Marie Curie", "a scientist from Poland"), ("Toyota", "a maker of cars"),
)  # fmt: skip
QUESTION = "What is this about?"
SELFIE_WIDTH = 5
"""Placeholders of a SelfIE prompt."""
SELFIE_LAYER = 2
"""Where its rows are put, unless another layer is named."""
CONTROLS = ("unpatched", "foreign_row", "noise", "mean_row", "embedding")


def target_of(model: Model, kind: Kind, relation: Sequence[str], rescale: Rescale) -> Target:
    """Return the prompt that rows are put into; raises as `few_shot_target` and `chat_target` do."""
    if kind == "identity":
        return identity_target(model, COPIES, rescale)
    if kind == "relation":
        pairs = [(left.strip(), right.strip()) for left, _, right in (pair.partition(":") for pair in relation)]
        return few_shot_target(model, pairs, ":", rescale)
    if kind == "describe":
        return few_shot_target(model, DESCRIPTIONS, ":", rescale)
    return chat_target(model, QUESTION, SELFIE_WIDTH, rescale)


def patchscopes_of(
    model: Model, target: Target, kind: Kind, target_layer: str, layers: Sequence[int]
) -> list[Patchscope]:
    """Return a Patchscope for each layer that rows are put at: their own, a given one, or every layer read."""
    if target_layer == "same":
        return [Patchscope.of(model, target, min(SELFIE_LAYER, model.shape.n_layers - 1) if kind == "selfie" else None)]
    return [Patchscope.of(model, target, at) for at in (layers if target_layer == "all" else [int(target_layer)])]


def lift_table(
    activations: Activations,
    watched: Sequence[Watched],
    patchscope: Patchscope,
    place: str,
    seed: int,
    layers: Sequence[int],
) -> pd.DataFrame:
    """Return the log-probability of watched tokens at source layers, the controls', and the lift over the greatest.

    Columns prompt, name, source_position, source_layer, target_layer, logprob, one a control, control_max, lift. Controls are
    the prompt without a patch, another prompt's row, noise of the same norm, the mean row, and the token's own embedding put
    in at the same layer: what the embedding gives too is computed by the upper blocks, and not read from the row.
    """
    model = activations.model
    items = [item for item in watched if place in item.places]
    unembedding = model.unembedding()
    texts = activations.get(Address("embed"), ROWS)
    embedded = torch.stack([texts[item.prompt][item.places[place]] for item in items]).float()
    width = max(len(item.token_ids) for item in items)
    ids = torch.tensor([[*item.token_ids, *[item.token_ids[0]] * (width - len(item.token_ids))] for item in items])

    variants = ("own", *CONTROLS[1:])
    patched = [patchscope.unpatched().expand(len(items), -1)]
    for layer in layers:
        put = _put(place_rows(activations, items, layer, place), embedded, seed + layer)
        patched += [patchscope.readable(put[name], layer) for name in variants]
    read = logit.read(torch.cat(patched), unembedding, ids=ids.repeat(len(patched), 1))
    unpatched, *said = read.logprobs.amax(1).double().cpu().numpy().reshape(len(patched), len(items))
    parts = []
    for at, layer in enumerate(layers):
        columns = dict(zip(variants, said[at * len(variants) :], strict=False))
        part = pd.DataFrame(
            {
                "prompt": [item.prompt for item in items], "name": [item.name for item in items],
                "source_position": [item.places[place] for item in items], "source_layer": layer,
                "target_layer": layer if patchscope.into is None else patchscope.into,
                "logprob": columns.pop("own"), "unpatched": unpatched, **columns,
            }
        )  # fmt: skip
        part["control_max"] = part[list(CONTROLS)].max(axis=1)
        part["lift"] = part["logprob"] - part["control_max"]
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _put(rows: Tensor, embedded: Tensor, seed: int) -> dict[str, Tensor]:
    """Rows that are put at the placeholder: the items' own, and the controls'."""
    return {
        "own": rows, "foreign_row": rows.roll(1, 0), "noise": norm_matched_noise(rows, seed),
        "mean_row": rows.mean(0).expand_as(rows), "embedding": embedded,
    }  # fmt: skip


def text_table(
    activations: Activations,
    watched: Sequence[Watched],
    patchscope: Patchscope,
    place: str,
    seed: int,
    layers: Sequence[int],
    *,
    max_new_tokens: int,
    samples: int,
) -> pd.DataFrame:
    """Return what the model writes with each prompt's row at the placeholder, and whether it names what is watched for.

    Columns prompt, name, source_position, source_layer, target_layer, control, sample, text, wanted, matched. Sample -1 is the
    most probable text, the others are drawn with seeds of their own. A spelling matches as a whole word, a token id as a token.
    """
    model = activations.model
    items = [item for item in watched if place in item.places]
    prompts = list({item.prompt: item for item in items}.values())
    texts = activations.get(Address("embed"), ROWS)
    embedded = torch.stack([texts[item.prompt][item.places[place]] for item in prompts]).float()
    plain = patchscope.unpatched_text(max_new_tokens)
    parts: list[dict[str, object]] = []
    for layer in layers:
        into = layer if patchscope.into is None else patchscope.into
        put = _put(place_rows(activations, prompts, layer, place), embedded, seed + layer)
        written = {
            (control, sample): patchscope.written(rows, layer, max_new_tokens, None if sample < 0 else seed + sample)
            for control, rows in put.items()
            for sample in range(-1, samples)
        }
        written["unpatched", -1] = [plain] * len(prompts)
        for (control, sample), lines in written.items():
            by_prompt = {item.prompt: ids for item, ids in zip(prompts, lines, strict=True)}
            parts += [
                {
                    "prompt": item.prompt, "name": item.name, "source_position": item.places[place], "source_layer": layer,
                    "target_layer": into, "control": control.removeprefix("own"), "sample": sample,
                    "text": tokens_text(model, by_prompt[item.prompt]), "wanted": " or ".join(item.spellings),
                    "matched": matched(model, by_prompt[item.prompt], item),
                }
                for item in items
            ]  # fmt: skip
    return pd.DataFrame(parts)


def matched(model: Model, written: Sequence[int], item: Watched) -> bool:
    """Return whether written tokens name an item: a spelling as a whole word, whatever its case, or a token id."""
    text = tokens_text(model, written)
    return any(
        int(spelling) in written
        if spelling.isdecimal()
        else re.search(rf"\b{re.escape(spelling.strip())}\b", text, re.IGNORECASE)
        for spelling in item.spellings
    )
