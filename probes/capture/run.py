"""The capture: what the store lacks is run through the model and written, then all of it can be read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from probes.batches import Batch, batches
from probes.capture.activations import Activations, CaptureReport
from probes.capture.canary import check_canary, put_canary
from probes.capture.device_capture import DeviceCapture
from probes.capture.forward import (
    PENDING_BYTES,
    asynchronous,
    axis_sizes,
    forward,
    number_size,
    out_of_memory,
    row_size,
    sized,
)
from probes.capture.layer_major import layer_major
from probes.capture.lookup import Lookup, Tokens
from probes.capture.needs import CapturePlan, Feature, Need, as_needs, make_plan
from probes.capture.thread_share import ThreadShare
from probes.capture.writer import Writer
from probes.device_to_host import Transport
from probes.edits import Edit, altered, resolve, writes_of
from probes.errors import ModelError, PointError
from probes.models.protocol import LayerMajor, Model
from probes.progress import QUIET, Progress
from probes.prompts import token_ids
from probes.store import RowStore

Sequences = Sequence[str | Sequence[int]]
"""Texts, or token ids as given."""
Needs = Need | str | Iterable[Need | str]
"""What to capture: needs, or points whose rows are kept, such as `resid_post.*`."""


def context_of(model: Model, edits: Sequence[Edit] = ()) -> dict[str, str]:
    """Return everything but the tokens that decides a row's numbers now, as the store keys it.

    Raises:
        ModelError: no key can say what the model computes, as under a hook of somebody else.
    """
    context = model.current()
    texts = [context.edits, *(edit.text() for edit in edits)]
    return asdict(replace(context, edits=";".join(text for text in texts if text != "none") or "none"))


def plan_capture(
    model: Model, sequences: Sequences, needs: Needs, store: RowStore, edits: Sequence[Edit] = ()
) -> CapturePlan:
    """Return the plan of the forwards that remain before every sequence has every need.

    Raises:
        PointError: a need that names no points, or a point this model refuses, with its reason.
        PromptError: a sequence that cannot be run.
        ModelError: rows that could not be told from another model's, or that the model does not reproduce.
    """
    lookup = Lookup(store, context_of(model, edits), model.shape.causal)
    check_canary(model, lookup.context, store)
    return _planned(model, token_ids(sequences, model), as_needs(needs), lookup)


def _planned(model: Model, sequences: Sequence[Tokens], needs: Sequence[Need], lookup: Lookup) -> CapturePlan:
    for need in needs:
        for feature in need.features(model.shape.n_layers):
            reason = model.refusal(feature.address)
            if reason:
                raise PointError(f"{model.ref} has no point {str(feature.address)!r}: {reason}")
    return make_plan(sequences, needs, model.shape.n_layers, lookup.stored)


def capture(
    model: Model,
    sequences: Sequences,
    needs: Needs,
    store: RowStore,
    *,
    edits: Sequence[Edit] = (),
    prompt_lengths: Sequence[int] | None = None,
    progress: Progress = QUIET,
    batch_tokens: int | None = None,
) -> Activations:
    """Capture what the store lacks, and return access to all of it.

    The model is examined anew at every call: rows of a module that was changed in place go under a key of their own, and
    stored rows are believed only where the model reproduces the store's canary.

    Rows are committed packet by packet: after an interruption the same call does only the rest.

    On CUDA, rows leave the device beside the forward (see `probes.capture.device_capture`); elsewhere batch follows batch.

    Args:
        model: the model to run.
        sequences: texts, as the model's tokenizer encodes them, or token ids.
        needs: the points to capture, and how they are reduced; points as text stand for all their rows.
        store: where rows are looked up and written.
        edits: interventions under which the model runs.
        prompt_lengths: per sequence, how many of its tokens are the prompt, the others being the response to it; a later
            capture of the prompt alone then reads its rows from these.
        progress: told of every sequence that was run.
        batch_tokens: padded tokens per forward, at most.

    Raises:
        PointError: a need that names no points, or a point this model refuses.
        PromptError: a sequence that cannot be run.
        ModelError: rows that could not be told from another model's, or that the model does not reproduce.
        StoreError: not enough space, before the run or during it.
    """
    needs, sequences = as_needs(needs), token_ids(sequences, model)
    with ThreadShare() as share, ExitStack() as stack:
        stack.enter_context(store.pin())
        lookup = Lookup(store, context_of(model, edits), model.shape.causal)
        check_canary(model, lookup.context, store)
        plan = _planned(model, sequences, needs, lookup)
        size = plan.bytes(axis_sizes(model), row_size(model))
        store.check_space(size)
        progress.note(plan.summary(size))
        progress.start(plan.forwards, "forward")
        if plan.missing:
            put_canary(model, lookup.context, store)
        lengths = dict(zip(sequences, prompt_lengths or map(len, sequences), strict=True))
        resolved = resolve(model, edits) if plan.missing else []
        with Writer(lookup, lengths) as writer, _transport(model, plan, writer) as transport:
            if isinstance(model, LayerMajor):
                for members, rows in layer_major(model, plan, resolved, batch_tokens, progress):
                    writer.put(members, rows)
            else:
                for missing in plan.missing:
                    runner = BatchRunner(model, missing.features, resolved, progress, transport, writer, share)
                    limit = batch_tokens or progress.batch_tokens
                    for batch in sized(model, missing.sequences, missing.features, limit):
                        runner.run(batch, missing.sequences)
                        progress.advance(len(batch.indices))
        store.names.add(model.context.weights, model.ref)
        done = CaptureReport(plan, plan.forwards, writer.bytes)
        again = partial(capture, model, sequences, needs, store, edits=edits, batch_tokens=batch_tokens)
        live = partial(context_of, model, edits)
        return Activations(model, sequences, lookup, done, live, lambda: again().done, stack.pop_all())


@contextmanager
def _transport(model: Model, plan: CapturePlan, writer: Writer) -> Iterator[Transport | None]:
    """The way from the model's devices to the host, or None where the model is on the host."""
    if not plan.missing or not asynchronous(model) or isinstance(model, LayerMajor):
        yield None
        return
    width, size = axis_sizes(model), number_size(model)
    alone = max(f.row_values(width, max(map(len, m.sequences))) * size for m in plan.missing for f in m.features)
    largest = max(alone, min(PENDING_BYTES, plan.bytes(width, size)))
    poison = os.environ.get("BATHYSCOPE_POISON", "0") not in ("", "0")
    transport = Transport(largest, poison=poison)
    writer.failed = transport.fail
    try:
        yield transport
    finally:
        # Tensors still on their way are read by the writer, whose end comes after this one.
        transport.close()


@dataclass(frozen=True)
class BatchRunner:
    """Runs batches of sequences that lack the same features, one after another, and sends their rows to the writer."""

    model: Model
    features: Sequence[Feature]
    edits: Sequence[Edit]
    progress: Progress
    transport: Transport | None
    writer: Writer
    share: ThreadShare

    def run(self, batch: Batch, sequences: Sequence[tuple[int, ...]]) -> None:
        """Run one forward over a batch of `sequences`, or one over each half of it where memory does not suffice."""
        members = tuple(sequences[i] for i in batch.indices)
        device_capture = (
            DeviceCapture(self.model, batch, members, self.transport, self.writer) if self.transport else None
        )
        try:
            with altered(self.model, self.edits):
                writes = writes_of(self.model, self.edits, batch.lengths)
                rows = forward(self.model, batch, self.features, writes, device_capture, self.share)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self._run_halves(batch, members)
            return
        if rows:
            self.writer.put(members, rows)

    def _run_halves(self, batch: Batch, members: tuple[tuple[int, ...], ...]) -> None:
        if len(members) == 1:
            size = batch.lengths[0]
            raise ModelError(
                f"out of memory on one prompt of {size} tokens with {self.model.ref}; about {size // 2} tokens may "
                "fit: shorten the prompt, ask for fewer points, or use a smaller dtype"
            ) from None
        half = len(members) // 2
        self.progress.note(f"out of memory: batch halved from {len(members)} to {half} prompts")
        for part in (members[:half], members[half:]):
            for smaller in batches(part, max(map(len, part)) * len(part)):
                self.run(smaller, part)
