"""Local importance: how much of the metric comes from each word of a prompt, and from its tokens one by one."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analyses.contextual_decomposition.scores import PreparedCase, to_metric
from analyses.tokens import token_text, tokens_text
from probes.decomposition import Baseline, Decomposer, Rules, Source, head, token
from probes.models.protocol import Model
from probes.progress import QUIET, Progress


def words_of(pieces: Sequence[str]) -> list[range]:
    """Return the positions of each word; the first token and every one that begins with white space begin a word."""
    starts = [i for i, piece in enumerate(pieces) if i == 0 or piece[:1].isspace()]
    ends = [*starts[1:], len(pieces)]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


def source_of(positions: Sequence[int], how: str, n_heads: int) -> Source:
    """Return a phrase as a source: its rows of the first stream, or all heads of block 0 at its positions."""
    if how == "token":
        return tuple(token(p) for p in positions)
    return tuple(head(0, h, p) for p in positions for h in range(n_heads))


def words_table(
    model: Model,
    decomposer: Decomposer,
    prepared: Sequence[PreparedCase],
    rules: Rules,
    how: str,
    mode: str,
    progress: Progress = QUIET,
) -> pd.DataFrame:
    """Return columns prompt, word, first_position, last_position, text, relevance, share, interaction.

    `share` is the relevance as a share of the metric's magnitude; `interaction` is what the word's tokens have
    together and not one by one. In zero mode a word's own rows are relevant, in mean mode what they differ from the mean.
    """
    n_heads = model.shape.n_heads
    rows = []
    for one in progress.over(prepared, "prompt's words"):
        case = one.case
        pieces = [token_text(model, t) for t in case.tokens]
        words = words_of(pieces) if model.tokenizer is not None else [range(i, i + 1) for i in range(len(pieces))]
        singles = [source_of([p], how, n_heads) for p in range(len(pieces))]
        several = [source_of(list(word), how, n_heads) for word in words if len(word) > 1]
        baseline: Baseline | None = one.baseline if mode == "mean" else None
        scores = to_metric(decomposer, PreparedCase(case, one.prompt, baseline), [*singles, *several], rules)
        whole = one.prompt.trace.logits[-1]
        size = abs(float(case.metric(whole[list(case.ids)])))
        phrases = iter(scores[len(pieces) :].tolist())
        for index, word in enumerate(words):
            alone = sum(float(scores[p]) for p in word)
            score = alone if len(word) == 1 else next(phrases)
            text = tokens_text(model, [case.tokens[p] for p in word])
            rows.append((case.index, index, word[0], word[-1], text, score, score / max(size, 1e-12), score - alone))
    columns = ["prompt", "word", "first_position", "last_position", "text", "relevance", "share", "interaction"]
    return pd.DataFrame(rows, columns=columns)
