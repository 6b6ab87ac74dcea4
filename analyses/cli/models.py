"""`bathyscope models`: what is at hand, in full or by name."""

from __future__ import annotations

from dataclasses import asdict
from json import dumps
from typing import Annotated

import typer

from analyses.cli.console import PLAIN, JsonLines, say, warn
from probes.html_card import aligned, size
from probes.models.sources.locate import ModelInfo, fetch_model, list_models, model_info
from probes.planted.registry import PREFIX, tasks

group = typer.Typer(help="Models at hand.", no_args_is_help=True, **PLAIN)
Ref = Annotated[
    str, typer.Argument(metavar="REF", help="A named model, a folder, a .gguf file, a hub id, or planted:ID@SEED.")
]


LISTED = ("model", "at hand", "size", "licence", "from", "what it is")
SIZES = {"n_layers": "layers", "d_model": "wide", "n_heads": "heads"}


@group.command("ls")
def ls(
    json: JsonLines = False,
) -> None:
    """Models that can be named, and whether they are already here."""
    if json:
        for model in list_models():
            say(dumps({**asdict(model), "path": None if model.path is None else str(model.path)}))
        return
    say(*aligned(LISTED, [_listed(model) for model in list_models()]))
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
