"""The command line and the Python that make a result again."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analyses.base import Analysis
from analyses.options import defaults_of
from analyses.registry import get_analysis
from analyses.results.result import Result

PROMPTS = "PROMPTS.jsonl"
"""Stands for a prompt file that a result does not name."""


def with_source(result: Result, prompts: Path | None) -> Result:
    """The result, whose provenance names the prompt file it was given."""
    named = None if prompts is None else str(prompts.resolve())
    return dataclasses.replace(result, provenance={**result.provenance, "prompts_file": named})


def changed(analysis: type[Analysis], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not at their default; lists become tuples."""
    known = defaults_of(analysis)
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    return {name: value for name, value in values.items() if name in known and value != known[name]}


def loading(provenance: Mapping[str, Any]) -> dict[str, str]:
    """How the model was loaded, as keyword arguments of `load_model`; the ones at their default are left out."""
    revision = provenance["model"].get("revision")
    named = {
        "backend": (provenance["backend"], "native"),
        "dtype": (provenance["dtype"], "auto"),
        "attention": (provenance["attention"], "sdpa"),
        "device": (provenance["device"], "auto"),
        "revision": (None if not revision or str(revision).startswith("sha256:") else revision, None),
    }
    return {name: str(value) for name, (value, default) in named.items() if value is not None and value != default}


def command(result: Result, out: str | Path, store: str | Path | None = None) -> str:
    """The command line that makes `result` again, into `out`."""
    provenance, analysis = result.provenance, get_analysis(result.analysis)
    parts = ["bathyscope", "run", result.analysis, "--model", provenance["model"]["ref"]]
    given = prompts_of(result)
    parts += [] if given is None else ["--prompts", given]
    for name, value in {**loading(provenance), **changed(analysis, result.options)}.items():
        parts += _flag(name, value)
    parts += [] if store is None else ["--store", str(store)]
    return shlex.join([*parts, "--out", str(out)])


def python(result: Result, out: str | Path, store: str | Path | None = None) -> str:
    """The Python that makes `result` again, into `out`."""
    analysis, given = get_analysis(result.analysis), prompts_of(result)
    options = ", ".join(f"{name}={value!r}" for name, value in changed(analysis, result.options).items())
    how = "".join(f", {name}={value!r}" for name, value in loading(result.provenance).items())
    return "\n".join(
        [
            f"from analyses.{result.analysis} import {analysis.__name__}",
            "from probes.models import load_model",
            "from probes.store import ActivationStore",
            "",
            f"model = load_model({result.provenance['model']['ref']!r}{how})",
            f"store = ActivationStore({'' if store is None else repr(str(store))})",
            f"result = {analysis.__name__}({options}).run(model, {[] if given is None else given!r}, store=store)",
            f"result.save({str(out)!r})",
        ]
    )


def prompts_of(result: Result) -> str | None:
    """The prompt file the result names, None where it had none, `PROMPTS` where it does not say."""
    named: str | None = result.provenance.get("prompts_file", PROMPTS)
    return named


def _flag(name: str, value: Any) -> list[str]:
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    flag = f"--{name.replace('_', '-')}"
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]
