"""`bathyscope models` and `bathyscope check`."""

from __future__ import annotations

from typing import Annotated

import typer

from analyses.cli.console import say, warn
from analyses.cli.run import Attention, Device, DType, Loading, Revision, Trust
from probes.display import count
from probes.errors import ModelError
from probes.models import BACKENDS, Model, fetch_model, list_models, model_info
from probes.models.base import Identity
from probes.models.parity import parity, table

group = typer.Typer(help="Models at hand.", no_args_is_help=True)
Ref = Annotated[str, typer.Argument(metavar="REF", help="A named model, a folder, a .gguf file, or a hub id.")]


@group.command("ls")
def ls() -> None:
    """Models that can be named, and whether they are already here."""
    for model in list_models():
        say(f"{model}")


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
    say(f"{model_info(ref)}")


def check(
    ref: Ref,
    device: Device = "auto",
    dtype: DType = "auto",
    attention: Attention = "sdpa",
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """The identities of a model on every backend, the points it refuses, and how far the backends agree."""
    first = Loading(ref, "native", device, dtype, attention, revision, trust_remote_code).load()
    models: dict[str, Model] = {}
    for backend in BACKENDS:
        try:
            models[backend] = first if backend == "native" else first.on(backend)  # type: ignore[attr-defined]
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
