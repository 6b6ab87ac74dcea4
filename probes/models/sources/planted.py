"""A planted model brought to a folder: its weights, its tokenizer, and the record of what is true of it."""

from __future__ import annotations

from pathlib import Path

from probes.errors import ModelError
from probes.models.silence_loggers import silence_loggers
from probes.models.sources.model_cache import Source, install
from probes.planted.registry import PREFIX, build, parse, task

TRUTH = "truth.json"
"""The file of a planted model's folder that holds its record."""


def is_planted(ref: str) -> bool:
    """Return whether a reference names a planted model."""
    return ref.startswith(PREFIX)


def planted_folder(ref: str) -> tuple[Path, str]:
    """Return the folder of a planted model and the digest of its weights; it is built, certified and saved on first use.

    Raises:
        ModelError: no such task, or a seed whose truth exhaustive intervention refutes.
    """
    name, seed = parse(ref)
    digest = str(build(name, seed).record.model["digest"])

    def fill(work: Path, folder: Path) -> None:
        planted = task(name, seed)
        with silence_loggers():
            planted.module.save_pretrained(folder)  # type: ignore[operator]
            planted.tokenizer.save_pretrained(folder)
        (folder / TRUTH).write_text(planted.record.to_json(), encoding="utf-8")

    source = Source(f"planted-{name}@{seed}", digest, "weights set by hand in probes.planted")
    return install(source, fill, n_bytes=20_000_000), digest


def check_precision(ref: str, dtype: str) -> None:
    """Refuse a planted model in half precision, in which the constants of its norms overflow.

    Raises:
        ModelError: a dtype other than float32 or auto.
    """
    if is_planted(ref) and dtype not in ("auto", "float32"):
        raise ModelError(f"dtype {dtype!r}: planted models are exact in float32 alone; give float32 or auto")
