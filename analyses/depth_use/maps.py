"""Which layer of another model each layer predicts best, by an affine map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyses.results.statistics import cluster_bootstrap
from probes.capture.activations import Activations
from probes.errors import OptionError
from probes.linear.affine_maps import CrossMoments, relative_error
from probes.models.protocol import Model
from probes.points import Address

HELD_OUT = 0.25
"""Share of the prompts on which maps are scored."""

GROUP_ROWS = 2048
"""Tokens whose rows of all layers are in memory at once."""


def check_pair(source: Model, target: Model) -> None:
    """Check that the two models read the same token ids.

    Raises:
        OptionError: they do not.
    """
    vocabularies = [m.tokenizer.get_vocab() if m.tokenizer is not None else m.shape.d_vocab for m in (source, target)]
    if vocabularies[0] != vocabularies[1]:
        raise OptionError(
            f"target_model {target.ref}: its tokens differ from those of {source.ref}, so rows of the two are no pairs; "
            "choose models that share a tokenizer"
        )


def map_table(
    source: Activations, target: Activations, stride: int, ridge: float, first_token: bool, seed: int
) -> pd.DataFrame:
    """Fit affine maps from every stride-th layer's stream of one model to every layer's of the other, and score them.

    Returns:
        Columns source_layer, target_layer, error (mean relative error on held-out tokens), ci_low, ci_high, train_error,
        mean_error (of always predicting the training mean), train_tokens, test_tokens.

    Raises:
        OptionError: fewer than two prompts.
    """
    n = len(source.sequences)
    if n < 2:
        raise OptionError("target_model needs at least two prompts, some to fit the maps and some to score them")
    order = np.random.default_rng(seed).permutation(n).tolist()
    n_test = min(n - 1, max(1, round(HELD_OUT * n)))
    test, train = sorted(order[:n_test]), sorted(order[n_test:])
    n_target, width = target.model.shape.n_layers, target.model.shape.d_model
    streams = [target.get(Address("resid_post", layer)) for layer in range(n_target)]
    frames = []
    for layer in range(0, source.model.shape.n_layers, stride):
        pairs = Pairs(source.get(Address("resid_post", layer)), streams, first_token)
        moments = CrossMoments(source.model.shape.d_model, n_target * width)
        for x, y, _ in pairs.of(train):
            moments.add(x, y)
        fit, mean = moments.solve(ridge), moments.mean_target
        learned = torch.cat([_errors(fit(x), y, width) for x, y, _ in pairs.of(train)])
        scored = [(_errors(fit(x), y, width), _errors(mean.expand_as(y), y, width), i) for x, y, i in pairs.of(test)]
        errors, trivial, owners = (list(column) for column in zip(*scored, strict=True))
        interval = cluster_bootstrap(torch.cat(errors).numpy(), np.concatenate(owners), seed=seed, resamples=300)
        columns = {
            "source_layer": layer,
            "target_layer": np.arange(n_target),
            "error": interval.mean,
            "ci_low": interval.low,
            "ci_high": interval.high,
            "train_error": learned.mean(0).numpy(),
            "mean_error": torch.cat(trivial).mean(0).numpy(),
        }
        sizes = {"train_tokens": len(learned), "test_tokens": sum(map(len, errors))}
        frames.append(pd.DataFrame({**columns, **sizes}))
    return pd.concat(frames, ignore_index=True)


@dataclass(frozen=True)
class Pairs:
    """Rows of one source layer beside those of all target layers, some prompts at a time."""

    source: Sequence[Tensor]
    """Per prompt, [pos, d_in]."""
    targets: Sequence[Sequence[Tensor]]
    """Per target layer and prompt, [pos, d_out]."""
    first_token: bool

    def of(self, prompts: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, NDArray[np.int64]]]:
        """Yield (source rows [n, d_in], target rows [n, layers * d_out], the prompt of each [n])."""
        group: list[int] = []
        size = 0
        for index in prompts:
            group.append(index)
            size += len(self.source[index])
            if size >= GROUP_ROWS or index == prompts[-1]:
                x = self._rows(self.source, group)
                y = torch.cat([self._rows(layer, group) for layer in self.targets], dim=1)
                yield x, y, np.concatenate([np.full(len(self._rows(self.source, [i])), i) for i in group])
                group, size = [], 0

    def _rows(self, rows: Sequence[Tensor], prompts: Sequence[int]) -> Tensor:
        whole = [self.first_token or len(rows[i]) == 1 for i in prompts]
        return torch.cat([rows[i] if all_of_it else rows[i][1:] for i, all_of_it in zip(prompts, whole, strict=True)])


def _errors(predicted: Tensor, target: Tensor, width: int) -> Tensor:
    """Return the relative errors [tokens, layers] of predictions [tokens, layers * width]."""
    parts = zip(torch.split(predicted, width, dim=1), torch.split(target, width, dim=1), strict=True)
    return torch.stack([relative_error(p, t) for p, t in parts], dim=1)
