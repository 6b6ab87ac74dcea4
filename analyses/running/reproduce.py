"""The command line and the Python that make a result again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analyses.base import Analysis
from analyses.options import as_flag, defaults_of, flag_of, renewed
from analyses.registry import get_analysis, paths
from analyses.results.result import Result
from analyses.running.model_spec import ModelSpec

PROMPTS = "PROMPTS.jsonl"
"""Stands for a prompt file that a result does not name."""


def changed(analysis: type[Analysis], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not at their default; lists become tuples."""
    known = defaults_of(analysis)
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in renewed(analysis, options).items()}
    return {name: value for name, value in values.items() if name in known and value != known[name]}


def command(result: Result, out: str | Path, store: str | Path | None = None) -> str:
    """Return the command line that makes `result` again, into `out`."""
    provenance, analysis = result.provenance, get_analysis(result.analysis)
    parts = ["bathyscope", "run", result.analysis, *ModelSpec.of(provenance).flags()]
    given = prompts_of(result)
    parts += [part for text in texts_of(result) for part in ("--text", text)]
    parts += [] if given is None else ["--prompts", given]
    parts += [part for edit in provenance.get("edits", ()) for part in ("--edit", edit)]
    for name, value in changed(analysis, result.options).items():
        parts += as_flag(flag_of(analysis, name), value)
    parts += [] if store is None else ["--store", str(store)]
    return shlex.join([*parts, "--out", str(out)])


def python(result: Result, out: str | Path, store: str | Path | None = None) -> str:
    """Return the Python that makes `result` again, into `out`."""
    analysis, given = get_analysis(result.analysis), prompts_of(result)
    prompts = texts_of(result) or ([] if given is None else given)
    options = ", ".join(f"{name}={value!r}" for name, value in changed(analysis, result.options).items())
    edits = list(result.provenance.get("edits", ()))
    model = ModelSpec.of(result.provenance).python()
    return "\n".join(
        [
            f"from {paths()[result.analysis].partition(':')[0]} import {analysis.__name__}",
            "from probes import ActivationStore, load_model",
            *(["from probes.edits import Edit, EditedModel"] if edits else []),
            "",
            f"model = {model}",
            *([f"model = EditedModel(model, [Edit.parse(line) for line in {edits!r}])"] if edits else []),
            f"store = ActivationStore({'' if store is None else repr(str(store))})",
            f"result = {analysis.__name__}({options}).run(model, {prompts!r}, store=store)",
            f"result.save({str(out)!r})",
        ]
    )


def texts_of(result: Result) -> list[str]:
    """Return the prompts that were given as texts; empty where a file, or nothing, was given."""
    return list(result.provenance.get("texts", ()))


def prompts_of(result: Result) -> str | None:
    """Return the prompt file that the result names, None where it had none, `PROMPTS` where it does not say."""
    named: str | None = result.provenance.get("prompts_file", PROMPTS)
    return named
