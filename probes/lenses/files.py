"""Lenses on disk: a folder with the tensors and the card, written whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from probes.errors import OptionError
from probes.lenses.card_files import CARD, check_free, read_card
from probes.lenses.jacobian import JacobianLens
from probes.lenses.tuned import TunedLens

TENSORS = "lens.safetensors"
HALF_LIMIT = 65504.0
"""The largest float16."""

FittedLens = TunedLens | JacobianLens


def save_lens(lens: FittedLens, path: str | Path) -> FittedLens:
    """Write a lens; an earlier lens at the same path is replaced. Returns it with the digest of its tensors on its card.

    Jacobians are kept in float16, or in float32 where an entry does not fit; tuned maps in float32.

    Raises:
        OptionError: the path is there and is no lens.
    """
    path = Path(path)
    check_free(path)
    half = lens.card.kind == "jacobian" and all(t.abs().max() <= HALF_LIMIT for t in lens.tensors().values())
    dtype = torch.float16 if half else torch.float32
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in lens.tensors().items()}
    card = replace(lens.card, tensors=tensors_digest(tensors))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        draft = Path(scratch) / "new"
        draft.mkdir()
        save_file(tensors, draft / TENSORS)
        (draft / CARD).write_text(json.dumps(card.as_json(), indent=1, allow_nan=True), encoding="utf-8")
        if path.exists():
            path.rename(Path(scratch) / "old")
        draft.rename(path)
    return type(lens).of(card, tensors)


def load_lens(path: str | Path) -> FittedLens:
    """Read a lens that `save_lens` wrote.

    Raises:
        OptionError: no lens there, a card of another format, or tensors that are not those of the card.
    """
    card, path = read_card(path), Path(path)
    try:
        tensors = load_file(path / TENSORS)
    except (OSError, SafetensorError) as error:
        raise OptionError(f"lens {str(path)!r}: its tensors cannot be read ({error}); fit it again") from None
    if tensors_digest(tensors) != card.tensors:
        raise OptionError(f"lens {str(path)!r}: its tensors are not those of its card; fit or import it again")
    return TunedLens.of(card, tensors) if card.kind == "tuned" else JacobianLens.of(card, tensors)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of tensors by name, dtype, shape and bytes."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return str(digest.hexdigest())
