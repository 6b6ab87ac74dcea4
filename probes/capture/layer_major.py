"""The schedule of a capture for a model that runs all forwards together, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from probes.blocks.single_block import steps
from probes.capture.forward import PACKET_BYTES, axis_sizes, out_of_memory, readers, sized
from probes.capture.lookup import Tokens
from probes.capture.needs import CapturePlan, Feature
from probes.edits import Edit, altered, writes_of
from probes.errors import ModelError
from probes.models.protocol import Forward, LayerMajor, Model
from probes.progress import Progress
from probes.store import Ragged


def layer_major(
    model: Model, plan: CapturePlan, edits: Sequence[Edit], limit: int | None, progress: Progress
) -> Iterator[tuple[tuple[Tokens, ...], dict[str, Ragged]]]:
    """Run everything planned, all batches together, block by block; yield (sequences, rows by feature key).

    Rows are yielded whenever a packet's bytes have gathered.

    Raises:
        ModelError: memory does not suffice.
    """
    assert isinstance(model, LayerMajor)
    sequences: list[tuple[Tokens, ...]] = []
    captured: list[dict[str, Ragged]] = []
    forwards: list[Forward] = []
    for missing in plan.missing:
        for batch in sized(model, missing.sequences, _heaviest(model, missing.features), limit):
            captured.append({})
            reads, writes = (
                readers(model, batch, missing.features, captured[-1]),
                writes_of(model, edits, batch.lengths),
            )
            forwards.append(Forward(batch.tokens, reads, writes, batch.lengths))
            sequences.append(tuple(missing.sequences[i] for i in batch.indices))
    sizes = [0] * len(captured)
    progress.start(sum(steps(forward, model.shape.n_layers) for forward in forwards), "block")
    with altered(model, edits), _refusing(model):
        for index in model.run_all(forwards):
            progress.advance()
            sizes[index] = sum(rows.values.nbytes for rows in captured[index].values())
            if sum(sizes) > PACKET_BYTES:
                yield from _taken(sequences, captured)
                sizes = [0] * len(captured)
    yield from _taken(sequences, captured)


@contextmanager
def _refusing(model: Model) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ModelError(
            f"out of memory while streaming {model.ref}; what was committed stays: use a smaller dtype or shorter prompts"
        ) from None


def _taken(
    sequences: Sequence[tuple[Tokens, ...]], captured: Sequence[dict[str, Ragged]]
) -> Iterator[tuple[tuple[Tokens, ...], dict[str, Ragged]]]:
    for done, rows in zip(sequences, captured, strict=True):
        if rows:
            yield done, dict(rows)
            rows.clear()


def _heaviest(model: Model, features: Sequence[Feature]) -> list[Feature]:
    """The features of the layer that keeps most."""
    width = axis_sizes(model)
    layers: dict[int | None, list[Feature]] = {}
    for feature in features:
        layers.setdefault(feature.address.layer, []).append(feature)
    return max(layers.values(), key=lambda own: sum(feature.row_values(width, 1) for feature in own))
