"""The model flags that every command shares."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from analyses.cli.option_flags import build, flags
from analyses.running.model_spec import ModelSpec


def with_model(command: Callable[..., None], *, ref: bool = True) -> Callable[..., None]:
    """A command whose keyword `spec` is given by one flag per field of `ModelSpec`.

    Args:
        ref: whether `--model` is among them; a command without it takes the reference as its keyword `ref`.
    """
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "spec"]
    shared = [p for p in flags(ModelSpec) if ref or p.name != "ref"]
    names = [p.name for p in flags(ModelSpec)]

    def wrapped(**values: Any) -> None:
        spec = build(ModelSpec, {name: values[name] for name in names})
        command(spec=spec, **{p.name: values[p.name] for p in own})

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *shared)]
    parameters.sort(key=lambda p: p.default is not inspect.Parameter.empty)
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped
