"""What a lens was made from: model, method, text, options and measured quality, as data that travels with its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import xxhash

from probes.errors import ModelError, OptionError
from probes.models.protocol import Model

Kind = Literal["logit", "tuned", "jacobian", "patchscope"]

FORMAT = 1
"""Version of the file format."""


@dataclass(frozen=True)
class Corpus:
    """The text that a lens was fitted on."""

    name: str
    licence: str = ""
    digest: str = ""
    """Of the token ids of all texts, in order."""
    texts: int = 0
    tokens: int = 0
    first_tokens: tuple[int, ...] = ()
    """The token ids that texts begin with, where all begin with the same (a begin-of-sequence token); else empty."""
    members: tuple[str, ...] = ()
    """Digest of each text's token ids, so that no lens is judged on a text that it was fitted on."""

    @classmethod
    def of(cls, name: str, texts: Sequence[Sequence[int]], licence: str = "") -> Corpus:
        """Describe texts given as token ids."""
        first = {text[0] for text in texts if text}
        return cls(
            name, licence, digest(texts), len(texts), sum(map(len, texts)), tuple(first) if len(first) == 1 else (),
            tuple(text_digest(text) for text in texts),
        )  # fmt: skip


def _version() -> str:
    from importlib.metadata import version

    return version("bathyscope")


@dataclass(frozen=True)
class LensCard:
    """Everything that decides a lens's numbers, and what was measured of them."""

    kind: Kind
    weights: str
    """Digest of the model's weights and configuration, `Context.weights`."""
    ref: str
    d_model: int
    n_layers: int
    layers: tuple[int, ...]
    """Layers that the lens reads otherwise than the logit lens does; the last is never among them."""
    target: int
    """The layer whose rows the maps lead to."""
    point: str = "resid_post"
    options: Mapping[str, Any] = field(default_factory=dict)
    """The estimator and all its options."""
    corpus: Corpus = Corpus("none")
    dtype: str = "float32"
    """Of the model at the fit."""
    accumulation: str = "float64"
    """Of the sums over text."""
    seed: int = 0
    package: str = field(default_factory=_version)
    quality: tuple[Mapping[str, Any], ...] = ()
    """Held-out numbers: one mapping a layer and measure, with their interval."""
    tensors: str = ""
    """Digest of the tensors, by name, dtype, shape and bytes."""
    foreign: bool = False
    """Whether another program fitted it, so that its model is known by a spot check alone."""
    parents: tuple[str, ...] = ()
    """Digests of the tensors it was merged from."""
    format: int = FORMAT

    def as_json(self) -> dict[str, Any]:
        """Return the card as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> LensCard:
        """Return the card that `as_json` described.

        Raises:
            OptionError: another format, or fields that are missing or unknown.
        """
        if values.get("format") != FORMAT:
            raise OptionError(f"{where}: lens format {values.get('format')!r}; this version reads format {FORMAT}")
        try:
            corpus = {**values["corpus"]}
            for name in ("first_tokens", "members"):
                corpus[name] = tuple(corpus[name])
            lists = {name: tuple(values[name]) for name in ("layers", "quality", "parents")}
            return cls(**{**values, **lists, "corpus": Corpus(**corpus)})
        except (KeyError, TypeError) as error:
            raise OptionError(f"{where}: not the card of a lens ({error}); fit or import the lens again") from None

    def check_model(self, model: Model, allow_other_weights: bool = False) -> None:
        """Refuse a model that the lens was not fitted on.

        Args:
            model: the model whose rows are to be read.
            allow_other_weights: accept other weights of the same width and depth.

        Raises:
            ModelError: another model, by the digest of its weights, or another shape.
        """
        shape, live = model.shape, model.current().weights
        if (self.d_model, self.n_layers) != (shape.d_model, shape.n_layers):
            raise ModelError(
                f"this {self.kind} lens is of {self.ref}, {self.n_layers} layers of width {self.d_model}; {model.ref} has "
                f"{shape.n_layers} of width {shape.d_model}: fit one with `bathyscope lens fit --model {model.ref}`"
            )
        if self.weights != live and not allow_other_weights:
            raise ModelError(
                f"this {self.kind} lens is of {self.ref} (weights {self.weights[:12]}), not of {model.ref} (weights "
                f"{live[:12]}): fit one with `bathyscope lens fit --model {model.ref}`, or allow other weights"
            )

    def sentence(self) -> str:
        """Return what the lens reads and what it is judged by."""
        return SENTENCES[self.kind]


SENTENCES: Mapping[Kind, str] = {
    "logit": "The logit lens reads what the model would say if the remaining blocks did nothing; it is judged by its agreement "
    "with the output in the upper layers.",
    "tuned": "The tuned lens reads what the model will say next; it is judged by its held-out divergence from the output.",
    "jacobian": "The Jacobian lens reads what the row disposes the model to say here or later, to first order and on average "
    "over text; it is judged by known intermediates that it ranks high, not by its divergence from the output.",
    "patchscope": "A Patchscope reads what the model itself says when the row is put into another prompt; it is judged by its "
    "lift over the same prompt with a foreign row.",
}  # fmt: skip
"""Per kind, what it reads and by what it is judged."""


def card_of(kind: Kind, model: Model, **fields: Any) -> LensCard:
    """Return the card of a lens of `model`; fields as those of `LensCard`.

    Raises:
        ModelError: no digest can say what the model computes now.
    """
    shape, context = model.shape, model.current()
    known: dict[str, Any] = {"layers": (), "target": shape.n_layers - 1, "dtype": context.dtype, **fields}
    return LensCard(kind, context.weights, model.ref, shape.d_model, shape.n_layers, **known)


def text_digest(tokens: Iterable[int]) -> str:
    """Return the digest of one text's token ids."""
    return str(xxhash.xxh3_64_hexdigest(",".join(map(str, tokens)).encode()))


def digest(texts: Iterable[Iterable[int]]) -> str:
    """Return the digest of several texts' token ids, in order."""
    return str(xxhash.xxh3_128_hexdigest(";".join(text_digest(text) for text in texts).encode()))
