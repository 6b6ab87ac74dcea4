"""A Jacobian lens over many texts: running sums that survive a kill, and split halves that say how settled they are."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from probes.blocks.cached_prompt import CachedPrompt
from probes.errors import OptionError, PromptError
from probes.lens_fits.jacobian import Estimator, check_differentiable, text_jacobians, whole_jacobians
from probes.lenses.card import Corpus, LensCard, card_of, text_digest
from probes.lenses.jacobian import JacobianLens
from probes.locked_files import replacing
from probes.models.protocol import Model
from probes.progress import QUIET, Progress

Text = Sequence[int]
SAVE_SECONDS = 300.0
"""The running sums are written after a text, but no more often than this."""
TIMED_BLOCKS = 2
"""Blocks through which all cotangents are carried for an estimate."""


@dataclass(eq=False)
class Sums:
    """Sums of per-text Jacobians, those of even and of odd texts apart; float64."""

    halves: tuple[dict[int, Tensor], dict[int, Tensor]]
    squares: dict[int, float]
    """Per layer, the sum of squared Frobenius norms."""
    texts: list[str] = field(default_factory=list)
    """Digest of each text done, in order."""

    @classmethod
    def empty(cls, layers: Sequence[int], d_model: int) -> Sums:
        """Return the sums over no texts."""
        zero = tuple({layer: torch.zeros(d_model, d_model, dtype=torch.float64) for layer in layers} for _ in range(2))
        return cls((zero[0], zero[1]), dict.fromkeys(layers, 0.0))

    def add(self, digest: str, jacobians: Mapping[int, Tensor]) -> None:
        """Take in one text."""
        half = self.halves[len(self.texts) % 2]
        for layer, matrix in jacobians.items():
            half[layer] += matrix.double()
            self.squares[layer] += float(matrix.double().square().sum())
        self.texts.append(digest)

    def mean(self) -> dict[int, Tensor]:
        """Return the mean Jacobian by layer, float32."""
        even, odd = self.halves
        return {layer: ((even[layer] + odd[layer]) / len(self.texts)).float() for layer in even}

    def half_means(self) -> tuple[dict[int, Tensor], dict[int, Tensor]] | None:
        """Return the means of even and of odd texts; None from fewer than two texts."""
        n = len(self.texts)
        if n < 2:
            return None
        even, odd = (
            {layer: (half[layer] / size).float() for layer in half}
            for half, size in zip(self.halves, ((n + 1) // 2, n // 2), strict=True)
        )
        return even, odd

    def relative_error(self) -> dict[int, float]:
        """Return the standard error of the mean relative to its norm, by layer, from the spread over texts."""
        n, mean = len(self.texts), self.mean()
        if n < 2:
            return dict.fromkeys(mean, float("nan"))
        errors = {}
        for layer, matrix in mean.items():
            square = float(matrix.double().square().sum())
            spread = max(0.0, self.squares[layer] / n - square) * n / (n - 1)
            errors[layer] = (spread / n / square) ** 0.5
        return errors


@dataclass(frozen=True, eq=False)
class JacobianFit:
    """A fitted lens, and its halves fitted on every other text."""

    lens: JacobianLens
    halves: tuple[JacobianLens, JacobianLens] | None
    """None from a single text."""
    relative_error: Mapping[int, float]
    skipped: int
    """Texts too short to count."""
    resumed: int
    """Texts whose Jacobians an earlier, interrupted fit had added."""


@dataclass(frozen=True)
class FitCost:
    """What a fit would take, from timed passes over its longest text."""

    texts: int
    seconds_per_text: float
    backwards_per_text: int
    flops_per_text: float
    bytes: int
    """Of the running sums and of the gradients of a text."""

    @property
    def seconds(self) -> float:
        """Of the whole fit."""
        return self.texts * self.seconds_per_text


def usable(texts: Sequence[Text], estimator: Estimator) -> list[tuple[int, ...]]:
    """Return the texts that are long enough, cut to the estimator's length.

    Raises:
        PromptError: none is.
    """
    kept = [tuple(text[: estimator.length]) for text in texts if estimator.counted(len(text))]
    if not kept:
        longest = max(map(len, texts), default=0)
        raise PromptError(
            f"no text has the {estimator.skip + 2} tokens that a Jacobian with skip {estimator.skip} needs (the longest has "
            f"{longest}): give longer texts, or a smaller --skip"
        )
    return list(dict.fromkeys(kept))


def fit_jacobian(
    model: Model,
    texts: Sequence[Text],
    estimator: Estimator,
    *,
    corpus: str,
    licence: str = "",
    checkpoint: Path | None = None,
    save_seconds: float = SAVE_SECONDS,
    progress: Progress = QUIET,
) -> JacobianFit:
    """Average the Jacobians of texts, one after the other.

    Args:
        model: a causal model whose blocks can be differentiated.
        texts: token ids; those too short are left out and counted.
        estimator: what is averaged.
        corpus: name of the text, for the card.
        licence: of the text.
        checkpoint: file of the running sums; a fit that finds one of the same model, estimator and first texts goes on.
        save_seconds: least time between two writes of it.
        progress: told of every text.

    Raises:
        PointError: blocks that cannot be differentiated.
        PromptError: no text is long enough.
        OptionError: an estimator that is none, or a checkpoint of another fit.
    """
    estimator.check(model.shape.n_layers)
    check_differentiable(model)
    kept = usable(texts, estimator)
    digests = [text_digest(text) for text in kept]
    card = card_of(
        "jacobian", model, layers=estimator.layers, target=estimator.target, options=estimator.as_options(),
        seed=estimator.seed, corpus=Corpus.of(corpus, kept, licence),
    )  # fmt: skip
    key = _key(card, estimator)
    sums = _resumed(checkpoint, key, digests) or Sums.empty(estimator.layers, model.shape.d_model)
    resumed, saved = len(sums.texts), time.monotonic()
    progress.start(len(kept) - resumed, "text")
    for text, digest in zip(kept[resumed:], digests[resumed:], strict=True):
        sums.add(digest, whole_jacobians(model, text, estimator))
        progress.advance()
        if checkpoint is not None and time.monotonic() - saved >= save_seconds:
            save_sums(sums, checkpoint, key)
            saved = time.monotonic()
    lens = JacobianLens(card, sums.mean())
    parts = sums.half_means()
    halves = None if parts is None else (JacobianLens(card, parts[0]), JacobianLens(card, parts[1]))
    return JacobianFit(lens, halves, sums.relative_error(), len(texts) - len(kept), resumed)


def fit_cost(model: Model, texts: Sequence[Text], estimator: Estimator) -> FitCost:
    """Carry the longest text's cotangents through a few blocks, as the fit does, and return what all would take.

    Raises what `fit_jacobian` raises.
    """
    estimator.check(model.shape.n_layers)
    check_differentiable(model)
    kept = usable(texts, estimator)
    d_model, longest = model.shape.d_model, max(kept, key=len)
    blocks = estimator.target - min(estimator.layers)
    timed = min(TIMED_BLOCKS, blocks)
    few = replace(estimator, layers=(estimator.target - timed,))
    text_jacobians(model, longest, few, torch.eye(d_model)[: estimator.dim_batch])  # the first pass also warms up
    passes = 2 if estimator.positions == "future" else 1
    started = time.perf_counter()
    CachedPrompt(model, longest, estimator.skip)
    forward = passes * (time.perf_counter() - started)
    started = time.perf_counter()
    with _Products() as products:
        whole_jacobians(model, longest, few)
    block = max(time.perf_counter() - started - forward, 1e-9) / timed
    counted = [len(estimator.counted(len(text))) for text in kept]
    share = sum(counted) / (len(counted) * max(counted))
    carried = 2 * 4 * max(counted) * d_model**2  # gradients, and one MLP's matrices
    return FitCost(
        texts=len(kept),
        seconds_per_text=(forward + block * blocks) * share,
        backwards_per_text=-(-d_model // estimator.dim_batch) * passes,
        flops_per_text=products.flops * blocks / timed * share,
        bytes=2 * len(estimator.layers) * d_model**2 * 8 + carried,
    )


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations of all products inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def save_sums(sums: Sums, path: Path, key: str) -> None:
    """Write running sums whole or not at all, and durably."""
    tensors = {f"{half}.{layer}": matrix for half, of in enumerate(sums.halves) for layer, matrix in of.items()}
    squares = {str(layer): value.hex() for layer, value in sums.squares.items()}
    metadata = {"key": key, "texts": json.dumps(sums.texts), "squares": json.dumps(squares)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=True) as draft:
        save_file(tensors, draft, metadata)


def _resumed(path: Path | None, key: str, digests: Sequence[str]) -> Sums | None:
    """The sums of an earlier fit over the first of these texts; None where there is none."""
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (OSError, SafetensorError) as error:
        raise OptionError(f"{path}: cannot be gone on with ({error}); remove it to fit from the first text") from None
    done = json.loads(metadata["texts"])
    if metadata["key"] != key or done != list(digests[: len(done)]):
        raise OptionError(
            f"{path}: the sums of a fit with another model, other options or other first texts; remove it, or give --out elsewhere"
        )
    squares = {int(layer): float.fromhex(value) for layer, value in json.loads(metadata["squares"]).items()}
    halves = tuple({layer: tensors[f"{half}.{layer}"] for layer in squares} for half in range(2))
    return Sums((halves[0], halves[1]), squares, done)


def _key(card: LensCard, estimator: Estimator) -> str:
    """Everything but the texts that decides the sums."""
    options = {name: value for name, value in asdict(estimator).items() if name != "dim_batch"}
    return json.dumps({"weights": card.weights, "dtype": card.dtype, **options}, sort_keys=True)
