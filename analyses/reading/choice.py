"""The lens that an option names: a kind that needs no fit, or a file."""

from __future__ import annotations

from probes.errors import OptionError
from probes.lenses.card import LensCard, card_of
from probes.lenses.files import load_lens
from probes.lenses.logit import LogitLens
from probes.lenses.protocol import Lens
from probes.models.protocol import Model


def chosen_lens(name: str, model: Model, point: str = "resid_post", allow_other_weights: bool = False) -> Lens:
    """Return the lens of that name for rows of `point` of `model`.

    Raises:
        OptionError: no such lens, or one of another point.
        ModelError: a lens of another model.
    """
    if name == "logit":
        return LogitLens(card_of("logit", model))
    lens = load_lens(name)
    lens.card.check_model(model, allow_other_weights)
    if lens.card.point != point:
        raise OptionError(
            f"lens {name!r} reads {lens.card.point}, not {point}: give lens logit, or fit one for {point}"
        )
    return lens


def reading_note(card: LensCard) -> str:
    """Return what a fitted lens reads, and on what it was fitted."""
    origin = " by another program" if card.foreign else ""
    return (
        f"{card.sentence()} This one was fitted{origin} on {card.corpus.texts:,} texts of {card.corpus.name}, on {card.ref} "
        f"(weights {card.weights[:12]})."
    )
