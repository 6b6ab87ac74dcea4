"""`bathyscope models` and `bathyscope check`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from analyses.cli.console import say, warn
from analyses.running.model_spec import ModelSpec
from probes.errors import ModelError
from probes.html_card import aligned, count, size
from probes.models import BACKENDS, Model, fetch_model, list_models, model_info, on_backend
from probes.models.protocol import Identity
from probes.models.sources.locate import ModelInfo
from probes.models.verify.parity import parity, table
from probes.planted.registry import PREFIX, tasks

group = typer.Typer(help="Models at hand.", no_args_is_help=True)
Ref = Annotated[
    str, typer.Argument(metavar="REF", help="A named model, a folder, a .gguf file, a hub id, or planted:ID@SEED.")
]


LISTED = ("model", "at hand", "size", "licence", "from", "what it is")
SIZES = {"n_layers": "layers", "d_model": "wide", "n_heads": "heads"}


@group.command("ls")
def ls() -> None:
    """Models that can be named, and whether they are already here."""
    for line in aligned(LISTED, [_listed(model) for model in list_models()]):
        say(line)
    say(f"Planted models, whose answers are known by construction: {PREFIX}ID@SEED with ID of {', '.join(tasks())}.")
    say("A folder, a .gguf file and a hub id are models too; `bathyscope models info REF` says more of one.")


def _listed(model: ModelInfo) -> tuple[object, ...]:
    here = (
        "yes"
        if model.at_hand
        else "no"
        if model.download_bytes is None
        else f"no ({size(model.download_bytes)} to fetch)"
    )
    licence = (
        ""
        if model.licence is None
        else model.licence.split(" (")[0] + (" (must be accepted)" if model.must_accept else "")
    )
    facts = [f"{model.facts[name]} {noun}" for name, noun in SIZES.items() if name in model.facts]
    return model.ref, here, ", ".join(facts) or "-", licence or "-", model.source, model.description


@group.command("fetch")
def fetch(
    ref: Ref,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Accept the model's licence where it asks for that.")
    ] = False,
) -> None:
    """Fetch a named model into the user cache, verified and converted once."""
    say(f"{ref}: {fetch_model(ref, accept_license=accept_license, progress=warn)}")


@group.command("info")
def info(ref: Ref) -> None:
    """What a model is and where it lies, without loading its weights."""
    model = model_info(ref)
    here = {"at hand": "yes" if model.at_hand else "no", "path": model.path, "licence": model.licence}
    fetched = {"to fetch": None if model.download_bytes is None else size(model.download_bytes)}
    facts = {
        "model": model.ref,
        "source": model.source,
        "what it is": model.description,
        **here,
        **fetched,
        **model.facts,
    }
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        if value is not None:
            say(f"{name:{width}}{value}")


def check(ref: Ref, spec: ModelSpec) -> None:
    """The identities of a model on every backend, the points it refuses, and how far the backends agree."""
    first = replace(spec, backend="native").load()
    models: dict[str, Model] = {}
    for backend in BACKENDS:
        try:
            models[backend] = first if backend == "native" else on_backend(first, backend)
        except ModelError as error:
            say(f"{ref} · {backend} · refused: {error}")
        else:
            _stamp(models[backend])
    say("")
    say("points by backend: read, refused, or the largest deviation from native relative to its largest magnitude")
    for line in table(parity(models)):
        say(line)
    if failed := [backend for backend, model in models.items() if not model.faithfulness.holds]:
        raise ModelError(f"{ref}: identities fail on {', '.join(failed)}; its numbers cannot be trusted there")


def _stamp(model: Model) -> None:
    context = model.context
    say(
        f"{model.ref} · {model.shape.architecture} · {count(model.shape.n_layers, 'layer')} · {context.backend} · {context.dtype} "
        f"· {context.attention}"
    )
    for identity in model.faithfulness.identities:
        say(_line(identity))
    for point, reason in model.faithfulness.refused.items():
        say(f"  refused  {point}: {reason}")


def _line(identity: Identity) -> str:
    verdict = "holds " if identity.holds else "FAILS "
    return f"  {verdict}  {identity.name}: relative error {identity.error:.1e} (tolerance {identity.tolerance:.0e})"
