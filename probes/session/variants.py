"""One edit at many places: the next token's log-probabilities under each, blocks and positions shared as far as they can be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.from_anywhere import last_rows
from probes.blocks.ragged_run import NotRagged
from probes.edits import Edit, KnockOut, PointEdit, composed, resolve, writes_of
from probes.edits.attention import BlockedRows
from probes.edits.positions import chosen
from probes.models.protocol import Write
from probes.points import Address
from probes.session.open_prompt import OpenPrompt, altered_blocks, program_of

ROW_POSITIONS = 8192
"""Rows times positions that run at once, which bounds memory."""
READ_ROWS = 128
"""Rows that are read through the unembedding at once: enough for its product, and not far more logits than a processor's cache holds."""
LATER = ("k", "v", "attn_in", "resid_pre")
"""Points that later positions read in the same block, so that more than one row of it changes."""


@dataclass(frozen=True)
class Variant:
    """The edit at one place."""

    layer: int
    column: int
    edit: Edit
    ready: Edit | None = None
    """The edit with its values read."""


Rows = Iterator[tuple[Sequence[Variant], Float[Tensor, "variant d_vocab"]]]
"""Variants and the next token's log-probabilities under each."""


@torch.no_grad()
def logprobs_of(prompt: OpenPrompt, variants: Sequence[Variant], before: Sequence[Edit], after: Sequence[Edit]) -> Rows:
    """Give the next token's log-probabilities under each variant, some variants at a time.

    Args:
        prompt: the prompt.
        variants: one edit at several places.
        before: edits that act before it.
        after: edits that act after it.
    """
    if not prompt.resumable or not all(isinstance(v.edit, PointEdit | KnockOut) for v in variants):
        for variant in variants:
            yield [variant], prompt.run([*before, variant.edit, *after]).logprobs[None]
        return
    if all(_one_position(v.edit) for v in variants) and all(map(_inside, (*before, *after))):
        with suppress(NotRagged):
            yield from _from_its_place(prompt, variants, before, after)
            return
    yield from _from_its_block(prompt, variants, before, after)


def _one_position(edit: Edit) -> bool:
    return isinstance(edit, PointEdit) and isinstance(edit.positions, tuple) and len(edit.positions) == 1


def _inside(edit: Edit) -> bool:
    """Whether an edit is of a point that is below the last block's end."""
    return isinstance(edit, PointEdit) and (edit.address.layer is not None or edit.address.point == "embed")


def _by_layer(variants: Sequence[Variant]) -> dict[int, list[Variant]]:
    layers: dict[int, list[Variant]] = {}
    for variant in variants:
        layers.setdefault(variant.layer, []).append(variant)
    return layers


def _from_its_block(
    prompt: OpenPrompt, variants: Sequence[Variant], before: Sequence[Edit], after: Sequence[Edit]
) -> Rows:
    """Run the variants of a layer as a batch from its block on, the other edits in every row."""
    rest = prompt.run([*before, *after])
    earlier, later = ([*resolve(prompt.model, part, prompt.texts)] for part in (before, after))
    ready = resolve(prompt.model, [*before, *after], prompt.texts)
    program = program_of(ready, prompt.model.shape.n_layers)
    width = max(1, ROW_POSITIONS // len(prompt.tokens))
    with altered_blocks(prompt.model, ready):
        for layer, own in _by_layer(variants).items():
            start = next((i for i, step in enumerate(program.steps) if layer in step), len(program.steps))
            for first in range(0, len(own), width):
                part = own[first : first + width]
                writes = composed(
                    [writes_of(prompt.model, earlier), _by_row(prompt, part), writes_of(prompt.model, later)]
                )
                hidden = rest.streams[start][None].expand(len(part), -1, -1)
                for step in program.steps[start:]:
                    hidden = prompt.step(step, program, hidden, writes)
                yield part, prompt.logprobs(hidden, writes).reshape(len(part), -1)


def _from_its_place(
    prompt: OpenPrompt, variants: Sequence[Variant], before: Sequence[Edit], after: Sequence[Edit]
) -> Rows:
    """Run each variant from its own block and position on, the other edits at work in all of them.

    Nothing runs for a variant that leaves its block's output as it was, to the last bit.

    Raises:
        NotRagged: there are other edits, and the model's positions cannot be run apart.
    """
    earlier, later = (writes_of(prompt.model, resolve(prompt.model, part, prompt.texts)) for part in (before, after))
    others = composed([earlier, later])
    base = prompt.cached(others)
    moved: list[tuple[Variant, Tensor]] = []
    same: list[Variant] = []
    for layer, own in _by_layer(variants).items():
        plain = base.entering[layer + 1]
        for variant, rows in zip(own, _leaving(prompt, base, own, earlier, later), strict=True):
            position = _position(prompt, variant)
            if torch.equal(rows, plain[position : position + len(rows)]):
                same.append(variant)
            else:
                moved.append((variant, rows))
    if moved:
        first_block, begin = [v.layer + 1 for v, _ in moved], [_position(prompt, v) for v, _ in moved]
        last = last_rows(base, first_block, begin, [rows for _, rows in moved], others)
        for at in range(0, len(moved), READ_ROWS):
            part = [variant for variant, _ in moved[at : at + READ_ROWS]]
            yield part, prompt.logprobs(last[at : at + READ_ROWS, None], {}).reshape(len(part), -1)
    if same:
        yield same, prompt.run([*before, *after]).logprobs.expand(len(same), -1)


def _position(prompt: OpenPrompt, variant: Variant) -> int:
    assert isinstance(variant.edit, PointEdit)
    return int(chosen(len(prompt.tokens), variant.edit.positions)[0])


def _leaving(
    prompt: OpenPrompt,
    base: CachedPrompt,
    variants: Sequence[Variant],
    earlier: Mapping[Address, Write],
    later: Mapping[Address, Write],
) -> Iterator[Float[Tensor, "_changed d_model"]]:
    """Give what leaves a block under each of its variants, at the variant's position and as far behind it as it may differ.

    Args:
        prompt: the prompt.
        base: its run under the other edits.
        variants: of one block.
        earlier: writes of the edits that act before.
        later: writes of those that act after.
    """
    edit, layer = variants[0].edit, variants[0].layer
    assert isinstance(edit, PointEdit)
    entering = base.entering[layer][None]
    if edit.address.point in LATER:
        writes = composed([earlier, _by_row(prompt, variants), later])
        leaving = prompt.through(layer, entering.expand(len(variants), -1, -1), writes)
        yield from (rows[_position(prompt, variant) :] for rows, variant in zip(leaving, variants, strict=True))
        return
    # The edit of one position changes no other position's row, so that one run of the block serves all.
    writes = composed([earlier, _each_position(prompt, variants), later])
    leaving = prompt.through(layer, entering, writes)[0]
    for variant in variants:
        at = _position(prompt, variant)
        yield leaving[at : at + 1]


def _each_position(prompt: OpenPrompt, variants: Sequence[Variant]) -> dict[Address, Write]:
    """Return the write that makes each variant's change at its own position; each sees the rows as they were."""
    same: dict[PointEdit, list[int]] = {}
    for variant in variants:
        assert isinstance(variant.ready, PointEdit)
        same.setdefault(replace(variant.ready, positions="all"), []).append(_position(prompt, variant))
    shape = prompt.model.shape
    changes = [(at, replace(edit, positions=tuple(at)).writes(shape)) for edit, at in same.items()]

    def write(tensor: Tensor) -> Tensor:
        out = tensor.clone()
        for at, writes in changes:
            for change in writes.values():
                out[:, at] = change(tensor)[:, at]
        return out

    return dict.fromkeys((address for _, writes in changes for address in writes), write)


def _by_row(prompt: OpenPrompt, variants: Sequence[Variant]) -> dict[Address, Write]:
    """Return the writes that put each variant into its row of a batch."""
    rows: dict[Address, list[tuple[int, Write]]] = {}
    for row, variant in enumerate(variants):
        assert variant.ready is not None
        for address, change in variant.ready.writes(prompt.model.shape).items():
            rows.setdefault(address, []).append((row, change))
    if any(address.point == "pattern" for address in rows):
        return {address: BlockedRows(tuple(changes)) for address, changes in rows.items()}

    def write(changes: Sequence[tuple[int, Write]]) -> Write:
        def put(tensor: Tensor) -> Tensor:
            out = tensor.clone()
            for row, change in changes:
                out[row : row + 1] = change(tensor[row : row + 1])
            return out

        return put

    return {address: write(changes) for address, changes in rows.items()}
