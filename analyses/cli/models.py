"""`bathyscope models` and `bathyscope check`."""

from __future__ import annotations

from typing import Annotated

import typer

from analyses.cli.console import say, warn
from analyses.cli.run import Attention, Device, DType, Loading, Revision, Trust
from probes.errors import ModelError
from probes.models import BACKENDS, fetch_model, list_models, model_info
from probes.models.base import Identity

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
    """The identities of a model on every backend, and the points it refuses."""
    failed = []
    for backend in BACKENDS:
        model = Loading(ref, backend, device, dtype, attention, revision, trust_remote_code).load()
        say(
            f"{model.ref} · {model.shape.architecture} · {model.shape.n_layers} layers · {backend} · {model.context.dtype} · {model.context.attention}"
        )
        for identity in model.faithfulness.identities:
            say(_line(identity))
        for point, reason in model.faithfulness.refused.items():
            say(f"  refused  {point}: {reason}")
        if not model.faithfulness.holds:
            failed.append(backend)
    if failed:
        raise ModelError(f"{ref}: identities fail on {', '.join(failed)}; its numbers cannot be trusted there")


def _line(identity: Identity) -> str:
    verdict = "holds " if identity.holds else "FAILS "
    return f"  {verdict}  {identity.name}: relative error {identity.error:.1e} (tolerance {identity.tolerance:.0e})"
