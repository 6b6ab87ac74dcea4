"""What a layer would write: beam search whose next-token scores come from that layer's lens."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from analyses.latent_language.extra_settings import Settings
from analyses.latent_language.items import Dropped
from analyses.latent_language.read import Reader, Translate
from analyses.tokens import tokens_text
from probes.lenses import logit
from probes.models.protocol import Model
from probes.points import Address

ITEMS_PER_PAIR = 3


def measure(reader: Reader, settings: Settings) -> tuple[dict[str, pd.DataFrame], list[Dropped]]:
    """Table `readout`: prompt, pair, item, layer, rank, text, logprob."""
    model = reader.model
    layers = sorted({*settings.layers(model.shape.n_layers), model.shape.n_layers - 1})
    rows = []
    for pair in dict.fromkeys(item.pair for item in settings.items):
        for item in [i for i in settings.items if i.pair == pair][:ITEMS_PER_PAIR]:
            for layer in layers:
                beams = beam(model, item.tokens, layer, settings.beam_width, settings.beam_tokens, reader.translate)
                for rank, (tokens, logprob) in enumerate(beams):
                    text = str(tokens) if model.tokenizer is None else tokens_text(model, tokens)
                    rows.append((item.prompt, pair, item.name, layer, rank, text, logprob))
    names = ["prompt", "pair", "item", "layer", "rank", "text", "logprob"]
    return {"readout": pd.DataFrame(rows, columns=names)}, []


def beam(
    model: Model, tokens: Sequence[int], layer: int, width: int, length: int, translate: Translate | None = None
) -> list[tuple[tuple[int, ...], float]]:
    """The most probable continuations of `length` tokens as layer `layer` scores them, best first, with log-probability."""
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for _ in range(length):
        rows = _last_rows(model, [(*tokens, *written) for written, _ in beams], layer)
        if translate is not None:
            rows = translate(rows.float().cpu(), layer).to(rows.device)
        read = logit.read(rows, model.unembedding(), top_k=min(width, model.shape.d_vocab))
        grown = [
            ((*written, int(token)), score + float(logprob))
            for (written, score), ids, logprobs in zip(beams, read.top_ids, read.top_logprobs, strict=True)
            for token, logprob in zip(ids, logprobs, strict=True)
        ]
        beams = sorted(grown, key=lambda entry: -entry[1])[:width]
    return beams


def _last_rows(model: Model, sequences: Sequence[tuple[int, ...]], layer: int) -> Tensor:
    """What leaves block `layer` at the last position of sequences of equal length, [sequence, d_model]."""
    kept: list[Tensor] = []
    address = Address("resid_post", layer)
    model.run(torch.tensor(sequences), {address: lambda tensor: kept.append(tensor[:, -1].clone())})
    return kept[0]
