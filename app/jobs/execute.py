"""What the worker does for each kind of request, through the same functions as the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from analyses.base import Analysis
from analyses.options import with_options
from analyses.registry import get_analysis
from analyses.results.output_folder import check_output
from analyses.running.runner import dry_run, lines_of, run
from app.jobs.models import is_loaded, loaded
from app.jobs.progress import JobProgress
from app.jobs.protocol import Request
from probes.models import Model
from probes.store import ActivationStore


def do(request: Request, progress: JobProgress) -> dict[str, Any]:
    """Does what was asked; returns what the dashboard shows of it.

    Raises:
        UserError: bad input.
        Cancelled: somebody asked for it.
    """
    if request.kind == "check":
        return stamp_of(_model(request, progress))
    analysis: Analysis = with_options(get_analysis(request.analysis), request.options)
    prompts = Path(request.prompts) if request.prompts else None
    lines = lines_of(analysis, prompts)
    if request.kind == "run":
        check_output(Path(request.out))
    store, spec, model = ActivationStore(request.store), request.model, _model(request, progress)
    if request.kind == "estimate":
        progress.enter("planning")
        progress.status = replace(
            progress.status, lines=tuple(dry_run(spec, analysis, lines, store, model=model, edits=request.edits))
        )
        progress.publish()
        return {}
    progress.enter("running")
    result = run(
        spec, analysis, lines, store, model=model, prompts_file=prompts, edits=request.edits, progress=progress
    )
    progress.enter("saving")
    result.save(request.out)
    return {"counts": dict(result.provenance["counts"]), "seconds": result.provenance["seconds"]}


def stamp_of(model: Model) -> dict[str, Any]:
    """What a loaded model is and keeps, as the dashboard shows it."""
    stamp, shape = model.faithfulness, model.shape
    return {
        "ref": model.ref,
        "architecture": shape.architecture,
        "layers": shape.n_layers,
        "heads": shape.n_heads,
        "d_model": shape.d_model,
        "vocabulary": shape.d_vocab,
        "window": shape.n_ctx,
        "backend": model.context.backend,
        "dtype": model.context.dtype,
        "attention": model.context.attention,
        "weights": model.context.weights,
        "tokenizer": model.tokenizer is not None,
        "identities": [
            {"name": i.name, "error": i.error, "tolerance": i.tolerance, "holds": i.holds} for i in stamp.identities
        ],
        "refused": dict(stamp.refused),
    }


def _model(request: Request, progress: JobProgress) -> Model:
    if not is_loaded(request.model):
        progress.enter("loading", request.model.ref)
    return loaded(request.model, progress.note)
