"""`bathyscope lens`: lenses fitted, checked, imported and shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from analyses.cli.console import ConsoleProgress, say
from analyses.cli.model_flags import with_model
from analyses.cli.run import StoreDir
from analyses.reading.texts import SENTENCES, Texts, file_texts, shipped_texts
from analyses.reading.tuned import fit_tuned_on
from analyses.running.model_spec import ModelSpec
from probes.errors import OptionError
from probes.html_card import aligned, count
from probes.lenses.card import LensCard
from probes.lenses.files import check_free, load_lens, save_lens
from probes.models.protocol import Model
from probes.store import ActivationStore

group = typer.Typer(help="Lenses: fitted on a model's text, kept as files, read by analyses.", no_args_is_help=True)
LensFolder = Annotated[Path, typer.Argument(metavar="LENS", help="The folder of a lens, such as T.lens.")]
FitTexts = Annotated[
    Path | None, typer.Option("--prompts", help="JSON lines of text to fit on; the shipped sentences by default.")
]


@with_model
def fit(
    spec: ModelSpec,
    out: Annotated[Path, typer.Option("--out", help="Folder of the lens, such as T.lens.")],
    kind: Annotated[Literal["tuned", "jacobian"], typer.Option(help="Which lens.")] = "tuned",
    prompts: FitTexts = None,
    texts: Annotated[int, typer.Option(min=2, help="How many texts to fit on, at most.")] = SENTENCES,
    offsets: Annotated[
        str, typer.Option(help="tuned: how many tokens ahead to read, such as 0,1,2; 0 is the next token.")
    ] = "0",
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of sentences and of the held-out folds.")] = 0,
    store: StoreDir = None,
) -> None:
    """Fit a lens of a model and write it with its card; a tuned lens needs no forward where its rows are stored."""
    check_free(out)
    steps = _offsets(offsets)
    model = spec.load()
    progress = ConsoleProgress()
    try:
        corpus = _texts(model, prompts, texts, seed)
        fitted, captured = fit_tuned_on(
            model, corpus, ActivationStore(store), offsets=steps, seed=seed, progress=progress
        )
    finally:
        progress.stop()
    lens = save_lens(fitted.lens, out)
    say(f"{count(captured.done.forwards, 'forward pass')}, {fitted.rows_fitted:,} rows fitted")
    for line in described(lens.card):
        say(line)
    say(f"lens: {out}")


def _texts(model: Model, prompts: Path | None, most: int, seed: int) -> Texts:
    return shipped_texts(model, most, seed) if prompts is None else file_texts(model, prompts, most)


def _offsets(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) <= 8 for part in parts) or "0" not in parts:
        raise OptionError(f"offsets {text!r}: give whole numbers from 0 to 8, 0 among them, such as 0,1,2")
    return tuple(sorted({int(part) for part in parts}))


@group.command("show")
def show(lens: LensFolder) -> None:
    """Print the card of a lens: what it was fitted on and how, and how well it reads held-out text."""
    for line in described(load_lens(lens).card):
        say(line)


def described(card: LensCard) -> Iterator[str]:
    """The lines of a card, and its held-out numbers by layer."""
    corpus = card.corpus
    facts = {
        "kind": card.kind,
        "model": f"{card.ref} (weights {card.weights})" + (", fitted by another program" if card.foreign else ""),
        "reads": f"{card.point}, {count(card.n_layers, 'layer')} of width {card.d_model}; maps for {_spans(card.layers)}; to layer {card.target}",
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
        yield from _quality(card.quality)


def _quality(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Held-out numbers with 95 % intervals: a line a layer, a column a lens or control."""
    yield ""
    for measure in dict.fromkeys(str(row["measure"]) for row in rows):
        own = [row for row in rows if row["measure"] == measure]
        names = list(dict.fromkeys(str(row["lens"]) for row in own))
        yield f"{measure}, 95 % intervals over {own[0]['n_texts']} held-out texts"
        cells = {(row["layer"], row["lens"]): _cell(row) for row in own}
        layers = sorted({int(row["layer"]) for row in own})
        yield from aligned(("layer", *names), [(str(at), *(cells.get((at, n), "") for n in names)) for at in layers])


def _cell(row: Mapping[str, Any]) -> str:
    low, high = row["ci_low"], row["ci_high"]
    return f"{row['value']:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")


def _spans(layers: Sequence[int]) -> str:
    if not layers:
        return "no layer"
    whole = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"layers {layers[0]} to {layers[-1]}" if whole else f"layers {', '.join(map(str, layers))}"


group.command("fit")(fit)
