"""`bathyscope check`: the identities of a model, and how far the backends agree."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from analyses.cli.console import say
from analyses.cli.imports import importing
from analyses.cli.model_flags import with_model
from analyses.cli.models import Ref
from analyses.running.model_spec import ModelSpec
from probes.errors import ModelError
from probes.html_card import count

if TYPE_CHECKING:
    from probes.models import Model
    from probes.models.protocol import Identity


@partial(with_model, ref=False)
def check(ref: Ref, spec: ModelSpec) -> None:
    """Check a model's identities on every backend, the points it refuses, and how far the backends agree."""
    spec.check()
    with importing():
        from probes.models import BACKENDS, on_backend
        from probes.models.verify.parity import parity, table
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
    say(*table(parity(models)))
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
