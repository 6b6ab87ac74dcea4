"""The model that a session names."""

from __future__ import annotations

from analyses.running.model_spec import ModelSpec
from probes.errors import OptionError


def named_model(text: str) -> ModelSpec:
    """Return the model that a session's `model` line names: a name, perhaps with flags such as `--dtype bfloat16`.

    Raises:
        OptionError: flags that are none; a model that runs code of its own, since a session may come by a link.
    """
    spec = ModelSpec.parse(text)
    if spec.trust_remote_code:
        raise OptionError(
            f"model {text!r}: a session may come by a link, so it runs no code that comes with a checkpoint. "
            f"In Python: Session({spec.python()}, text)"
        )
    return spec


def model_line(session: str) -> str:
    """Return what a session's text names as its model: read off its first line, since pages start without the parser's torch."""
    return session.partition("\n")[0].removeprefix("model ")


def model_of(session: str) -> ModelSpec:
    """Return the model of a session, given as `str` gives it.

    Raises:
        OptionError: as `named_model`.
    """
    return named_model(model_line(session))
