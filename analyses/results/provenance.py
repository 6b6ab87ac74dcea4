"""Where a number comes from: everything needed to make it again."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import xxhash

from probes.edits import EditedModel
from probes.idle_threads import waiting
from probes.models.protocol import LayerMajor, Model
from probes.prompts import Prompt

PACKAGES = ("bathyscope", "torch", "transformers", "transformer-lens", "nnsight", "safetensors", "numpy", "pandas")


@cache
def versions() -> Mapping[str, str]:
    """Return the versions of the installed packages that decide numbers."""
    return {"python": platform.python_version(), **dict(_installed())}


@cache
def _installed() -> tuple[tuple[str, str], ...]:
    """Read versions from the packages' own files, once a process: each result says them."""
    installed = []
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed.append((package, version(package)))
    return tuple(installed)


@lru_cache(maxsize=8)
def tokenizer_digest(tokenizer: Any) -> str | None:
    """A digest of the vocabulary and its special tokens, or None without a tokenizer."""
    if tokenizer is None:
        return None
    entries = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return xxhash.xxh3_128_hexdigest(repr((entries, tokenizer.all_special_ids)).encode())


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """A digest of the prompts in their order: of their texts, or of their token ids where there is no text."""
    return xxhash.xxh3_128_hexdigest(repr([prompt.text or prompt.tokens for prompt in prompts]).encode())


def describe(
    model: Model,
    *,
    started: float,
    seed: int | None,
    store_keys: Sequence[str],
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """Return the provenance of a result.

    Args:
        started: `time.perf_counter()` when the run began.
        counts: what was done: prompts, tokens, forwards, rows held before.
    """
    context = model.context
    stamp = model.faithfulness
    return {
        "model": {
            "ref": model.ref,
            "revision": model.revision,
            "weights": context.weights,
            "architecture": model.shape.architecture,
            "layers": model.shape.n_layers,
        },
        "tokenizer": tokenizer_digest(model.tokenizer),
        "backend": context.backend,
        "dtype": context.dtype,
        "attention": context.attention,
        "device": str(model.device),
        "streamed": isinstance(model, LayerMajor),
        **({"edits": [str(edit) for edit in model.edits]} if isinstance(model, EditedModel) else {}),
        "threads": {"count": torch.get_num_threads(), **waiting()},
        "seed": seed,
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 3),
        "counts": dict(counts),
        "faithfulness": {
            "holds": stamp.holds,
            "identities": [
                {"name": i.name, "error": i.error, "tolerance": i.tolerance, "holds": i.holds} for i in stamp.identities
            ],
            "refused": dict(stamp.refused),
        },
        "store_keys": list(store_keys),
    }
