"""What `bathyscope lens` prints of a lens: its card, its held-out numbers, and what a fit would take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from probes.edits.line import spans
from probes.html_card import aligned, count, size
from probes.lens_fits.jacobian_fit import FitCost
from probes.lenses.card import LensCard

HOUR = 3600.0


def cost_lines(cost: FitCost) -> Iterator[str]:
    """What a Jacobian fit would take, and what would fit into an hour where it is longer."""
    yield (
        f"{count(cost.texts, 'text')}, {count(cost.backwards_per_text, 'batch', 'batches')} of cotangents each: about "
        f"{cost.texts * cost.flops_per_text / 1e12:.3g} TFLOP, {size(cost.bytes)} of memory"
    )
    yield f"about {cost.seconds_per_text:.3g} s a text on this machine, {cost.seconds:.3g} s in all"
    if cost.seconds > HOUR:
        yield f"within an hour: --texts {max(2, int(HOUR / cost.seconds_per_text))}, or the upper layers only by --layers"


def described(card: LensCard) -> Iterator[str]:
    """The lines of a card, and its held-out numbers by layer."""
    corpus = card.corpus
    facts = {
        "kind": card.kind,
        "model": f"{card.ref} (weights {card.weights})" + (", fitted by another program" if card.foreign else ""),
        "reads": f"{card.point}, {count(card.n_layers, 'layer')} of width {card.d_model}; maps for layers {spans(card.layers)}; to layer {card.target}",
        "text": f"{corpus.name}{f' ({corpus.licence})' if corpus.licence else ''}: {count(corpus.texts, 'text')}, "
        f"{count(corpus.tokens, 'token')}, digest {corpus.digest or 'unknown'}",
        "numbers": f"model in {card.dtype}, sums in {card.accumulation}, seed {card.seed}, Bathyscope {card.package}",
        "options": ", ".join(f"{name}={value}" for name, value in card.options.items() if name != "choice") or "none",
        "tensors": card.tensors,
    }
    for name, value in facts.items():
        yield f"{name:9}{value}"
    yield card.sentence()
    if card.quality:
        yield from quality_lines(card.quality)


def quality_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Held-out numbers with 95 % intervals: a line a layer, a column a lens or control."""
    yield ""
    for measure in dict.fromkeys(str(row["measure"]) for row in rows):
        own = [row for row in rows if row["measure"] == measure]
        names = list(dict.fromkeys(_label(row) for row in own))
        known = any(row["ci_low"] is not None for row in own)
        yield f"{measure}, {'95 % intervals over ' if known else 'over '}{own[0]['n_texts']} texts"
        cells = {(row["layer"], _label(row)): _cell(row) for row in own}
        layers = sorted({int(row["layer"]) for row in own})
        yield from aligned(("layer", *names), [(str(at), *(cells.get((at, n), "") for n in names)) for at in layers])


def _label(row: Mapping[str, Any]) -> str:
    return " ".join(str(row[part]) for part in ("lens", "control") if row.get(part))


def _cell(row: Mapping[str, Any]) -> str:
    low, high = row["ci_low"], row["ci_high"]
    known = low is not None and math.isfinite(low)
    return f"{row['value']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if known else "")
