"""`bathyscope lens`: lenses fitted, checked, imported and shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from analyses.cli.console import PLAIN, ConsoleProgress, say
from analyses.cli.imports import importing
from analyses.cli.model_flags import with_model
from analyses.cli.run import Prompts
from analyses.cli.store_flag import StoreDir
from analyses.running.model_spec import ModelSpec
from probes.errors import OptionError
from probes.html_card import count
from probes.input_files import opened
from probes.lenses.card_files import check_free, read_card

if TYPE_CHECKING:
    from analyses.reading.texts import Texts
    from probes.lens_fits.jacobian import Estimator
    from probes.lenses.files import FittedLens
    from probes.models.protocol import Model
    from probes.store import ActivationStore

group = typer.Typer(
    help="Lenses: fitted on a model's text, kept as files, read by analyses.", no_args_is_help=True, **PLAIN
)
LensFolder = Annotated[Path, typer.Argument(metavar="LENS", help="The folder of a lens, such as T.lens.")]
FitTexts = Annotated[
    Path | None, typer.Option("--prompts", help="JSON lines of text to fit on; the shipped sentences by default.")
]

CHECK_TEXTS = 50
CHECKED = ("kl_to_final", "top1_agreement")
"""Measures that a check prints; the analysis `lenses` has them all."""


@with_model
def fit(
    spec: ModelSpec,
    out: Annotated[Path, typer.Option("--out", help="Folder of the lens, such as T.lens.")],
    kind: Annotated[Literal["tuned", "jacobian"], typer.Option(help="Which lens.")] = "tuned",
    prompts: FitTexts = None,
    texts: Annotated[int, typer.Option(min=2, help="How many texts to fit on, at most.")] = 150,
    offsets: Annotated[
        str, typer.Option(help="tuned: how many tokens ahead to read, such as 0,1,2; 0 is the next token.")
    ] = "0",
    refine: Annotated[
        int,
        typer.Option(min=0, max=5000, help="tuned: steps of gradient descent on the divergence after the closed form."),
    ] = 0,
    layers: Annotated[
        str, typer.Option(help="Which layers, such as 0-28 or 4,8; all below the last (or the target) by default.")
    ] = "",
    target: Annotated[
        Literal["last", "penultimate"], typer.Option(help="jacobian: the block whose output is differentiated.")
    ] = "last",
    positions: Annotated[
        Literal["later", "self", "future"],
        typer.Option(help="jacobian: what a row does to its own position, to later ones, or to both (later)."),
    ] = "later",
    freeze_qk: Annotated[bool, typer.Option(help="jacobian: take attention's weights as constants.")] = False,
    skip: Annotated[int, typer.Option(min=0, help="jacobian: first positions of a text left out.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="jacobian: tokens of a text, at most.")] = 128,
    dim_batch: Annotated[int, typer.Option(min=1, help="jacobian: cotangents carried back at once.")] = 64,
    cotangents: Annotated[
        Literal["one_hot", "rademacher"], typer.Option(help="jacobian: one per dimension, or as many random signs.")
    ] = "one_hot",
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of sentences, held-out folds and random signs.")] = 0,
    store: StoreDir = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="jacobian: print what the fit would cost, and stop.")
    ] = False,
) -> None:
    """Fit a lens of a model and write it with its card.

    A tuned lens needs no forward where its rows are stored. A Jacobian lens goes on after an interruption.
    """
    steps, chosen = _offsets(offsets), _layers(layers)
    Prompts(prompts).read()
    check_free(out)
    spec.check()
    with importing():
        from analyses.cli.lens_lines import cost_lines, described
        from analyses.reading.texts import file_texts, packed_texts, shipped_texts
        from analyses.reading.tuned import fit_tuned_on
        from probes.lens_fits.jacobian import Estimator
        from probes.lens_fits.jacobian_fit import fit_cost
        from probes.lenses.files import save_lens
        from probes.store import ActivationStore
    model = spec.load()
    progress = ConsoleProgress()
    try:
        if kind == "jacobian":
            n_layers = model.shape.n_layers
            last = n_layers - 1 if target == "last" else n_layers - 2
            estimator = Estimator(
                last, chosen or tuple(range(last)), positions, skip, length, dim_batch, cotangents, freeze_qk, seed
            )
            corpus = file_texts(model, prompts, texts) if prompts else packed_texts(model, length, texts, seed)
            if dry_run:
                say(*cost_lines(fit_cost(model, corpus.sequences, estimator)))
                return
            lens = _fit_jacobian(model, corpus, estimator, out, ActivationStore(store), progress)
        else:
            corpus = file_texts(model, prompts, texts) if prompts else shipped_texts(model, texts, seed)
            fitted, captured = fit_tuned_on(
                model, corpus, ActivationStore(store), offsets=steps, layers=chosen or tuple(range(model.shape.n_layers - 1)),
                refine=refine, seed=seed, progress=progress,
            )  # fmt: skip
            lens = save_lens(fitted.lens, out)
            say(f"{count(captured.done.forwards, 'forward pass')}, {count(fitted.rows_fitted, 'row')} fitted")
    finally:
        progress.stop()
    say(*described(lens.card))
    say(f"lens: {out}")


def _fit_jacobian(
    model: Model, texts: Texts, estimator: Estimator, out: Path, store: ActivationStore, progress: ConsoleProgress
) -> FittedLens:
    """Fit and save a Jacobian lens; its running sums lie beside it until it is whole."""
    from analyses.cli.lens_lines import cost_lines
    from analyses.reading.jacobian import held_out_rows, with_halves
    from probes.lens_fits.jacobian_fit import fit_cost, fit_jacobian
    from probes.lenses.files import save_lens

    running = out.with_name(f"{out.name}.partial")
    say(*cost_lines(fit_cost(model, texts.sequences, estimator)))
    unembedding = model.unembedding()  # refused before the fit, not after it
    fitted = fit_jacobian(
        model, texts.sequences, estimator, corpus=texts.name, licence=texts.licence, checkpoint=running, progress=progress,
    )  # fmt: skip
    judged = held_out_rows(model, texts, store, estimator.seed, progress)
    progress.stop()
    if fitted.resumed:
        say(f"went on after {count(fitted.resumed, 'text')} of an interrupted fit")
    if fitted.skipped:
        say(f"{count(fitted.skipped, 'text')} left out: too short, or given twice")
    lens = save_lens(with_halves(fitted, judged, unembedding), out)
    running.unlink(missing_ok=True)
    return lens


def _layers(text: str) -> tuple[int, ...]:
    """Layers of text such as 0-5,8; none where it is empty.

    Raises:
        OptionError: text of another form.
    """
    if not text.strip():
        return ()
    layers: set[int] = set()
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        if not (low.isdecimal() and (high or low).isdecimal()):
            raise OptionError(f"layers {text!r}: give layers such as 4,8 or a range such as 0-28")
        layers |= set(range(int(low), int(high or low) + 1))
    return tuple(sorted(layers))


def _offsets(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) <= 8 for part in parts) or "0" not in parts:
        raise OptionError(f"offsets {text!r}: give whole numbers from 0 to 8, 0 among them, such as 0,1,2")
    return tuple(sorted({int(part) for part in parts}))


@group.command("show")
def show(lens: LensFolder) -> None:
    """Print the card of a lens: what it was fitted on and how, and how well it reads held-out text."""
    read_card(lens)
    with importing():
        from analyses.cli.lens_lines import described
        from probes.lenses.files import load_lens
    say(*described(load_lens(lens).card))


@group.command("check")
@with_model
def check(
    lens: LensFolder,
    spec: ModelSpec,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="JSON lines of text to judge by; the shipped sentences by default.")
    ] = None,
    texts: Annotated[int, typer.Option(min=10, help="How many texts to judge by, at most.")] = CHECK_TEXTS,
    store: StoreDir = None,
) -> None:
    """Check that a lens is of a model, and how far its reading is from the model's output on text it was not fitted on."""
    read_card(lens)
    Prompts(prompts).read()
    spec.check()
    with importing():
        from analyses.cli.lens_lines import quality_lines
        from analyses.reading.quality import quality_rows, read_texts
        from analyses.reading.texts import file_texts, shipped_texts, without
        from probes.lenses.files import load_lens
        from probes.store import ActivationStore
    loaded = load_lens(lens)
    model = spec.load()
    loaded.card.check_model(model)
    progress = ConsoleProgress()
    try:
        drawn = file_texts(model, prompts) if prompts else shipped_texts(model, 10**6)
        judged = without(drawn, [loaded.card.corpus])
        kept = replace(judged, sequences=judged.sequences[:texts], groups=judged.groups[:texts])
        read = read_texts(model, kept, {loaded.card.kind: loaded}, ActivationStore(store), progress=progress)
    finally:
        progress.stop()
    say(
        f"{lens}: of {model.ref}, tensors as on its card; {count(len(kept.sequences), 'text')} that it was not fitted on"
    )
    say(*quality_lines([row for row in quality_rows(read) if row["measure"] in CHECKED]))


@group.command("import")
@with_model
def import_lens(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A public Jacobian lens (.pt) or the checkpoint of its fit.")
    ],
    spec: ModelSpec,
    out: Annotated[Path, typer.Option("--out", help="Folder of the lens, such as J.lens.")],
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="JSON lines of text for the spot check; shipped sentences by default."),
    ] = None,
    target: Annotated[
        Literal["last", "penultimate"],
        typer.Option(help="The block its matrices lead to, which the file does not say."),
    ] = "last",
    skip: Annotated[int, typer.Option(min=0, help="First positions of a text left out.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a text of the check, at most.")] = 128,
) -> None:
    """Convert a lens that another program fitted, after comparing some of its rows with rows estimated here."""
    check_free(out)
    Prompts(prompts).read()
    with opened(file, "lens file", OptionError):
        pass
    spec.check()
    with importing():
        from analyses.cli.lens_lines import described
        from analyses.reading.texts import file_texts, packed_texts
        from probes.lens_fits.foreign import import_jacobian
        from probes.lenses.files import save_lens
    model = spec.load()
    texts = file_texts(model, prompts) if prompts else packed_texts(model, length, 4)
    last = model.shape.n_layers - (1 if target == "last" else 2)
    lens, _ = import_jacobian(model, file, texts.sequences, target=last, skip=skip, length=length)
    say(*described(save_lens(lens, out).card))
    say(f"lens: {out}")


group.command("fit")(fit)
