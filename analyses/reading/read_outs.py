"""Tables of what rows say through a lens: the tokens on top, and how far each row is from the model's own prediction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.tokens import token_text, token_texts
from probes.lenses import logit
from probes.models.protocol import Model
from probes.prompts import Prompt


def positions_table(model: Model, prompts: Sequence[Prompt], first: int, places: Sequence[range]) -> pd.DataFrame:
    """Return a row for each position read: prompt, position, input_id, input_token.

    Args:
        first: the prompt that the first range of `places` belongs to.
        places: per prompt, the positions read.
    """
    pairs = [
        (i, position, prompts[i].tokens[position], token_text(model, prompts[i].tokens[position]))
        for i, place in enumerate(places, first)
        for position in place
    ]
    return pd.DataFrame(pairs, columns=["prompt", "position", "input_id", "input_token"])


def read_tables(
    model: Model,
    rows: Float[Tensor, "layer_pos d_model"],
    final: Float[Tensor, "pos d_model"],
    where: pd.DataFrame,
    top_k: int,
    layers: Sequence[int] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables `top` and `read` of rows that a lens made readable.

    Args:
        rows: all positions of the first layer, then of the next.
        final: the last layer's rows of the same positions.
        where: a row for each position, as `positions_table` gives it.
        top_k: how many tokens to list.
        layers: those the rows are of; from the first on by default.
    """
    n_layers = len(rows) // len(final)
    of = torch.arange(len(final)).repeat(n_layers)
    unembedding = model.unembedding()
    best = logit.read(final, unembedding, top_k=1).top_ids[:, 0].cpu()
    seen = logit.read(rows, unembedding, ids=best[of, None], top_k=top_k, reference=final, reference_of=of)
    read = pd.concat([where.assign(layer=layer) for layer in layers or range(n_layers)], ignore_index=True)
    top = read.loc[read.index.repeat(top_k)].reset_index(drop=True)
    read["entropy_bits"], read["kl_to_final"] = seen.entropy_bits.cpu().numpy(), seen.kl.cpu().numpy()
    read["final_token_id"] = best[of].numpy()
    read["final_token"] = token_texts(model, read["final_token_id"].tolist())
    read["final_probability"] = seen.logprobs[:, 0].exp().cpu().numpy()
    read["final_logprob"] = seen.logprobs[:, 0].cpu().numpy()
    read["top_token_id"] = seen.top_ids[:, 0].cpu().numpy()
    read["agrees"] = read["top_token_id"] == read["final_token_id"]
    top["rank"] = np.tile(np.arange(top_k), len(read))
    top["token_id"] = seen.top_ids.flatten().cpu().numpy()
    top["token"] = token_texts(model, top["token_id"].tolist())
    top["probability"] = seen.top_logprobs.exp().flatten().cpu().numpy()
    return top, read
