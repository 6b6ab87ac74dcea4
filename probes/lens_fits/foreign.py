"""Jacobian lenses that other programs wrote: read without running code, and believed only after a spot check.

A public file holds no digest of the model and no target layer. What it claims is compared with rows of the Jacobian that
are estimated here: they have to look like those of the same layer more than like those of any other.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.errors import OptionError
from probes.lens_fits.jacobian import Estimator, check_differentiable, text_jacobians
from probes.lens_fits.jacobian_fit import usable
from probes.lenses.card import Corpus, card_of
from probes.lenses.jacobian import JacobianLens
from probes.models.protocol import Model

CHECKED_ROWS = 8
"""Output dimensions whose rows are estimated anew."""
CHECKED_TEXTS = 4


@dataclass(frozen=True, eq=False)
class ForeignLens:
    """What a public file says of itself."""

    maps: Mapping[int, Float[Tensor, "d_model d_model"]]
    n_texts: int
    named: Mapping[str, Any]
    """Further fields, such as the model's name."""


@dataclass(frozen=True)
class SpotCheck:
    """Cosines of a file's rows with rows estimated here."""

    own: Mapping[int, float]
    """By layer, with the rows of the same layer."""
    other: Mapping[int, float]
    """By layer, the best with the rows of any other layer."""

    @property
    def passed(self) -> bool:
        """Whether every layer's rows look like its own more than like another's."""
        return all(self.own[layer] > self.other[layer] for layer in self.own)


def read_foreign(path: str | Path) -> ForeignLens:
    """Read a public Jacobian lens, or the checkpoint of a public fit; nothing in the file is executed.

    Raises:
        OptionError: no such file, one that needs more than tensors and plain values, or one of another form.
    """
    try:
        values = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise OptionError(
            f"lens file {str(path)!r} cannot be read as tensors and plain values ({str(error).splitlines()[0][:120]}); no file is "
            "opened that could run code"
        ) from None
    if not isinstance(values, dict):
        raise OptionError(
            f"lens file {str(path)!r} holds no mapping: give a file with J, or with jacobian_sum and n_done"
        )
    if "J" in values:
        maps, n_texts = values["J"], values.get("n_prompts", 0)
    elif {"jacobian_sum", "n_done"} <= set(values) and values["n_done"]:
        n_texts = values["n_done"]
        maps = {layer: matrix.float() / n_texts for layer, matrix in values["jacobian_sum"].items()}
    else:
        raise OptionError(
            f"lens file {str(path)!r} has {', '.join(map(str, values))[:120]}: needed are J, or jacobian_sum and n_done"
        )
    if not isinstance(maps, dict) or not all(_square(matrix) for matrix in maps.values()):
        raise OptionError(f"lens file {str(path)!r}: its matrices are not square, one a layer")
    named = {name: value for name, value in values.items() if isinstance(value, str | int | float)}
    return ForeignLens({int(layer): matrix.float() for layer, matrix in maps.items()}, int(n_texts), named)


def _square(matrix: Any) -> bool:
    return isinstance(matrix, Tensor) and matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]


def spot_check(
    model: Model, maps: Mapping[int, Tensor], texts: Sequence[Sequence[int]], estimator: Estimator
) -> SpotCheck:
    """Compare some random rows of a lens's matrices with the same rows estimated on a few texts; raises as the estimator does."""
    check_differentiable(model)
    generator = torch.Generator().manual_seed(estimator.seed)
    dims = torch.randperm(model.shape.d_model, generator=generator)[:CHECKED_ROWS]
    cotangents = torch.eye(model.shape.d_model)[dims]
    kept = usable(texts, estimator)[:CHECKED_TEXTS]
    sums = [text_jacobians(model, text, estimator, cotangents) for text in kept]
    estimated = {layer: torch.stack([one[layer] for one in sums]).mean(0).flatten() for layer in estimator.layers}
    own, other = {}, {}
    for layer in maps:
        rows = maps[layer][dims].float().flatten()
        # An identity tells no layer from another: what a block changes is compared.
        plain = cotangents.flatten()
        cosines = {
            at: float(torch.nn.functional.cosine_similarity(rows - plain, matrix - plain, dim=0))
            for at, matrix in estimated.items()
        }
        own[layer] = cosines.pop(layer)
        other[layer] = max(cosines.values(), default=-1.0)
    return SpotCheck(own, other)


def import_jacobian(
    model: Model, path: str | Path, texts: Sequence[Sequence[int]], *, target: int, skip: int, length: int
) -> tuple[JacobianLens, SpotCheck]:
    """Return a public Jacobian lens as one of this model, marked as foreign, where its spot check passes.

    Args:
        model: the model that the file is said to be of.
        path: the file.
        texts: token ids to check on.
        target: the layer that the file's matrices lead to, which it does not say.
        skip: first positions left out.
        length: tokens of a text.

    Raises:
        OptionError: a file of another form or width, or one that fails its check.
    """
    foreign = read_foreign(path)
    shape = model.shape
    width = {matrix.shape[0] for matrix in foreign.maps.values()}
    if width != {shape.d_model} or not all(0 <= layer < target for layer in foreign.maps):
        raise OptionError(
            f"lens file {str(path)!r} has layers {sorted(foreign.maps)} of width {sorted(width)}; {model.ref} has layers 0 to "
            f"{target - 1} below layer {target}, of width {shape.d_model}"
        )
    layers = tuple(sorted(foreign.maps))
    estimator = Estimator(target, tuple(range(target)), skip=skip, length=length)
    check = spot_check(model, foreign.maps, texts, estimator)
    if not check.passed:
        worst = min(check.own, key=lambda layer: check.own[layer] - check.other[layer])
        raise OptionError(
            f"lens file {str(path)!r} is not of {model.ref}, or counts its layers otherwise: rows of layer {worst} have cosine "
            f"{check.own[worst]:.2f} with those estimated here for the layer, {check.other[worst]:.2f} with another layer's"
        )
    name = str(foreign.named.get("corpus", "unknown"))
    card = card_of(
        "jacobian", model, layers=layers, target=target, foreign=True, corpus=Corpus(name, texts=foreign.n_texts),
        options={"file": Path(path).name, **{k: v for k, v in foreign.named.items() if k in ("model_name", "model_revision")}},
        accumulation="unknown",
        quality=tuple(
            {
                "lens": "jacobian", "layer": layer, "measure": measure, "value": values[layer], "ci_low": None, "ci_high": None,
                "n_texts": min(len(texts), CHECKED_TEXTS), "n_rows": CHECKED_ROWS,
            }
            for measure, values in (("spot_check_cosine", check.own), ("spot_check_other_layer", check.other))
            for layer in layers
        ),
    )  # fmt: skip
    return JacobianLens(card, foreign.maps), check
