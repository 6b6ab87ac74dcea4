"""Model and plan to packets of rows in the store, and reading them back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor

from probes.activations import Activations, Done
from probes.edits import Edit, altered, resolve, writes_of
from probes.errors import ModelError, PointError
from probes.kernels import reduce_rows
from probes.lookup import Lookup, Tokens
from probes.models.base import Context, Forward, LayerMajor, Model, Read, Write
from probes.models.gates import steps
from probes.needs import CapturePlan, Feature, Need, Reducer, make_plan
from probes.points import Address
from probes.progress import QUIET, Progress
from probes.prompts import Batch, batches, select
from probes.store import ActivationStore, Packet, Ragged

PACKET_BYTES = 64 * 2**20
"""Captured bytes per packet, which bounds the memory of a capture."""
BATCH_TOKENS = 2048
"""Padded tokens per forward, at most."""


def context_of(model: Model, edits: Sequence[Edit] = ()) -> dict[str, str]:
    """Everything but the tokens that decides a row's numbers, as the store keys it."""
    text = ";".join(edit.text() for edit in edits) or "none"
    context: Context = replace(model.context, edits=text)
    return asdict(context)


def plan_capture(
    model: Model,
    sequences: Sequence[tuple[int, ...]],
    needs: Iterable[Need],
    store: ActivationStore,
    edits: Sequence[Edit] = (),
) -> CapturePlan:
    """The forwards that remain before every sequence has every need.

    Raises:
        PointError: a point this model refuses, with its reason.
    """
    context = context_of(model, edits)
    needs = list(needs)
    for need in needs:
        for feature in need.features(model.shape.n_layers):
            reason = model.refusal(feature.address)
            if reason:
                raise PointError(f"{model.ref} has no point {str(feature.address)!r}: {reason}")
    return make_plan(sequences, needs, model.shape.n_layers, Lookup(store, context, model.shape.causal).held)


def axis_sizes(model: Model) -> dict[str, int]:
    """The size of each axis name of the point table."""
    names = ("d_model", "head", "kv_head", "d_head", "d_mlp", "d_vocab")
    return {name: model.shape.width(name) for name in names}


def row_size(model: Model) -> int:
    """Bytes of one captured number."""
    return int(getattr(torch, model.context.dtype).itemsize)


def capture(
    model: Model,
    sequences: Sequence[tuple[int, ...]],
    needs: Iterable[Need],
    store: ActivationStore,
    *,
    edits: Sequence[Edit] = (),
    prompt_lengths: Sequence[int] | None = None,
    progress: Progress = QUIET,
    batch_tokens: int = BATCH_TOKENS,
) -> Activations:
    """Captures what the store lacks, then gives access to all of it.

    Rows are committed packet by packet: after an interruption the same call does only the rest.

    Args:
        prompt_lengths: of each sequence that is a prompt and its response, the tokens of the prompt; a later run on the
            prompt alone then finds its rows in these.

    Raises:
        PointError: a point this model refuses.
        StoreError: not enough space, before the run or during it.
    """
    needs = list(needs)
    with ExitStack() as stack:
        stack.enter_context(store.pin())
        plan = plan_capture(model, sequences, needs, store, edits)
        size = plan.bytes(axis_sizes(model), row_size(model))
        store.check_space(size)
        progress.note(plan.summary(size))
        progress.start(plan.forwards, "forward")
        lookup = Lookup(store, context_of(model, edits), model.shape.causal)
        lengths = dict(zip(sequences, prompt_lengths or map(len, sequences), strict=True))
        written = _Writer(lookup, lengths)
        ready = resolve(model, edits) if plan.work else []
        with written:
            for sequences_done, values in _rows(model, plan, ready, batch_tokens, progress):
                written.put(sequences_done, values)
        done = Done(plan, plan.forwards, written.bytes)
        again = partial(capture, model, sequences, needs, store, edits=edits, batch_tokens=batch_tokens)
        return Activations(model, list(sequences), lookup, done, lambda: again().done, stack.pop_all())


def _rows(
    model: Model, plan: CapturePlan, edits: Sequence[Edit], limit: int, progress: Progress
) -> Iterator[tuple[tuple[Tokens, ...], dict[str, Ragged]]]:
    """(sequences, rows by feature key) of everything planned, in the order in which the model gives them."""
    if isinstance(model, LayerMajor):
        try:
            yield from _layer_major(model, plan, edits, limit, progress)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            raise ModelError(
                f"out of memory while streaming {model.ref}; what was committed stays: use a smaller dtype or shorter prompts"
            ) from None
        return
    for work in plan.work:
        for batch in _sized(model, work.sequences, work.features, limit):
            yield from _run(model, batch, work.sequences, work.features, edits, progress)
            progress.advance(len(batch.indices))


def _layer_major(
    model: Model, plan: CapturePlan, edits: Sequence[Edit], limit: int, progress: Progress
) -> Iterator[tuple[tuple[Tokens, ...], dict[str, Ragged]]]:
    """The same, all batches block by block; what is found is given away whenever a packet's bytes have gathered."""
    assert isinstance(model, LayerMajor)
    sequences: list[tuple[Tokens, ...]] = []
    found: list[dict[str, Ragged]] = []
    forwards: list[Forward] = []
    for work in plan.work:
        for batch in _sized(model, work.sequences, _heaviest(model, work.features), limit):
            found.append({})
            reads, writes = readers(model, batch, work.features, found[-1]), writes_of(model, edits, batch.lengths)
            forwards.append(Forward(batch.tokens, reads, writes, batch.lengths))
            sequences.append(tuple(work.sequences[i] for i in batch.indices))
    sizes = [0] * len(found)
    progress.start(sum(steps(forward, model.shape.n_layers) for forward in forwards), "block")
    with altered(model, edits):
        for index in model.run_all(forwards):
            progress.advance()
            sizes[index] = sum(rows.values.nbytes for rows in found[index].values())
            if sum(sizes) > PACKET_BYTES:
                yield from _taken(sequences, found)
                sizes = [0] * len(found)
    yield from _taken(sequences, found)


def _taken(
    sequences: Sequence[tuple[Tokens, ...]], found: Sequence[dict[str, Ragged]]
) -> Iterator[tuple[tuple[Tokens, ...], dict[str, Ragged]]]:
    for done, rows in zip(sequences, found, strict=True):
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


def _sized(
    model: Model, sequences: Sequence[tuple[int, ...]], features: Sequence[Feature], limit: int
) -> Iterator[Batch]:
    width, size = axis_sizes(model), row_size(model)
    longest = max(len(sequence) for sequence in sequences)
    per_sequence = sum(feature.row_values(width, longest) for feature in features) * size
    tokens = max(1, min(limit, PACKET_BYTES * longest // max(per_sequence, 1)))
    return batches(sequences, tokens)


def _run(
    model: Model,
    batch: Batch,
    sequences: Sequence[tuple[int, ...]],
    features: Sequence[Feature],
    edits: Sequence[Edit],
    progress: Progress,
) -> Iterator[tuple[tuple[tuple[int, ...], ...], dict[str, Ragged]]]:
    """(sequences, rows by feature key) of one batch: one forward, or halves of it where memory does not suffice."""
    try:
        with altered(model, edits):
            values = forward(model, batch, features, writes_of(model, edits, batch.lengths))
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        if len(batch.indices) == 1:
            size = batch.lengths[0]
            raise ModelError(
                f"out of memory on one prompt of {size} tokens with {model.ref}; about {size // 2} tokens may fit: "
                "shorten the prompt, ask for fewer points, or use a smaller dtype"
            ) from None
        half = len(batch.indices) // 2
        progress.note(f"out of memory: batch halved from {len(batch.indices)} to {half} prompts")
        parts = [tuple(sequences[i] for i in batch.indices[:half]), tuple(sequences[i] for i in batch.indices[half:])]
        for part in parts:
            for smaller in batches(part, max(map(len, part)) * len(part)):
                yield from _run(model, smaller, part, features, edits, progress)
        return
    yield tuple(sequences[i] for i in batch.indices), values


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def forward(
    model: Model, batch: Batch, features: Sequence[Feature], writes: Mapping[Address, Write] | None = None
) -> dict[str, Ragged]:
    """One forward over `batch`, each feature reduced where its tensor is; values on the CPU, by feature key."""
    found: dict[str, Ragged] = {}
    model.run(batch.tokens, readers(model, batch, features, found), writes, batch.lengths)
    return found


def readers(model: Model, batch: Batch, features: Sequence[Feature], found: dict[str, Ragged]) -> dict[Address, Read]:
    """Reads of a forward over `batch` that put each feature's rows into `found`, by feature key."""
    by_address: dict[Address, list[Feature]] = {}
    for feature in features:
        by_address.setdefault(feature.address, []).append(feature)

    def reader(address: Address) -> Read:
        def read(tensor: Tensor) -> None:
            for feature in by_address[address]:
                found[feature.key] = _reduce(model, tensor, batch, feature)

        return read

    return {address: reader(address) for address in by_address}


def _reduce(model: Model, tensor: Tensor, batch: Batch, feature: Feature) -> Ragged:
    reducer = feature.reducer
    if feature.address.point == "pattern":
        return _pattern(tensor, batch, reducer)
    wanted = tuple(len(select(n, reducer.positions)) for n in batch.lengths)
    index = batch.row_index(reducer.positions)
    values = reduce_rows(tensor.flatten(0, 1), index, wanted, reducer, model.unembedding)
    return Ragged(values.cpu().contiguous(), tuple(reducer.count(n) for n in batch.lengths))


def _pattern(tensor: Tensor, batch: Batch, reducer: Reducer) -> Ragged:
    """Attention probabilities as flat [head, query, key] blocks, one a sequence, without pad queries or keys."""
    parts = []
    for row, length in enumerate(batch.lengths):
        queries = select(length, reducer.positions).to(tensor.device)
        parts.append(tensor[row, :, :length, :length].index_select(1, queries).flatten().cpu())
    return Ragged(torch.cat(parts), tuple(len(part) for part in parts))


class _Writer:
    """Puts packets into the store on a thread of its own; at most two wait, so memory stays bounded."""

    def __init__(self, lookup: Lookup, prompt_lengths: Mapping[tuple[int, ...], int]) -> None:
        self.lookup, self.prompt_lengths, self.bytes = lookup, prompt_lengths, 0
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store-writer")
        self._pending: list[Future[int]] = []

    def put(self, sequences: tuple[tuple[int, ...], ...], features: dict[str, Ragged]) -> None:
        while len(self._pending) >= 2:
            self.bytes += self._pending.pop(0).result()
        self._pending.append(self._pool.submit(self._commit, sequences, features))

    def _commit(self, sequences: tuple[tuple[int, ...], ...], features: dict[str, Ragged]) -> int:
        size = self.lookup.store.put(Packet(self.lookup.context, sequences, features)).bytes_written
        self.lookup.remember(sequences, self.prompt_lengths)
        return size

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for pending in self._pending:
                if kind is None:
                    self.bytes += pending.result()
        finally:
            self._pool.shutdown(wait=True)
