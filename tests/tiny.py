"""The native backend on tiny random models, and prompts for them."""

from __future__ import annotations

import copy
from functools import cache

from families import shared

from probes.models import weights_digest
from probes.models.backends.native import NativeModel

PROMPTS = [(5, 6, 7, 8), (9, 10), (11, 12, 13, 14, 15, 16, 17), (20,)]
"""Ragged prompts of token ids for the tiny models."""


def native(family: str = "llama") -> NativeModel:
    """The native backend on a shared tiny random model; the wrapper is the caller's own."""
    return copy.copy(_examined(family))


@cache
def _examined(family: str) -> NativeModel:
    """The model whose examination, some 50 ms, all wrappers share."""
    module = shared(family)
    return NativeModel(module, ref=f"tiny-{family}", weights=weights_digest(module))
