"""One edit of a stack repeated at every layer and position, or every head: what it does there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.blocks.cached_prompt import CachedPrompt
from probes.edits import Edit, FreezeNorm, KnockOut, Other, PointEdit, Replace, SkipBlocks, composed, resolve, writes_of
from probes.edits.attention import BlockedRows
from probes.edits.positions import chosen
from probes.errors import OptionError, UserError
from probes.models.protocol import Write
from probes.points import POINTS, Address
from probes.session.open_prompt import OpenPrompt, altered_blocks, program_of
from probes.session.state import Step

ROW_POSITIONS = 8192
"""Rows times positions that run at once, which bounds memory."""
LATER = ("k", "v", "attn_in", "resid_pre")
"""Points that later positions read in the same block, so that more than one row of it changes."""


@dataclass(frozen=True, eq=False)
class EffectMap:
    """The effect of an edit at each place, against the stack without it."""

    edit: str
    """The edit that was repeated."""
    columns: str
    """What the columns are: position, head, or nothing more than the layer."""
    kl: Float[Tensor, "layer column"]
    """KL(without || with) of the next token, in nats; NaN where the edit cannot stand."""
    watched: Float[Tensor, "layer column token"]
    """Change of each watched token's log-probability, in nats."""
    top: Float[Tensor, "layer column"]
    """Change of the log-probability of the token that is most probable without the edit, in nats."""

    def data(self) -> dict[str, Any]:
        """Return the value for JSON; places without a number are null."""
        return {
            "edit": self.edit,
            "columns": self.columns,
            "kl": _listed(self.kl),
            "watched": _listed(self.watched),
            "top": _listed(self.top),
        }

    def lines(self, tokens: Sequence[str]) -> list[str]:
        """Return the ten places with the largest effect, as lines."""
        flat = self.kl.flatten().nan_to_num(-1)
        best = flat.topk(min(10, len(flat)))
        lines = [f"{self.edit}, everywhere: the places with the largest KL"]
        for kl, at in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            layer, column = divmod(at, self.kl.shape[1])
            place = {"position": f" @{column} {tokens[column]!r}" if column < len(tokens) else "", "head": f".{column}"}
            lines.append(f"  layer {layer}{place.get(self.columns, '')}: {kl:.4g} nats")
        return lines


def _listed(values: Tensor) -> Any:
    return [_listed(row) for row in values] if values.dim() else (None if values.isnan() else float(values))


@dataclass(frozen=True)
class Variant:
    """The edit at one place."""

    layer: int
    column: int
    edit: Edit
    ready: Edit | None = None
    """The edit with its values read."""


def sweep(
    prompt: OpenPrompt, steps: Sequence[Step], ids: Sequence[int], index: int = -1, heads: bool | None = None
) -> EffectMap:
    """Return the effect of one edit of a stack at every place, on tokens that are watched; see `Session.everywhere`."""
    on = [i for i, step in enumerate(steps) if step.on]
    if not on:
        raise OptionError("there is no edit to repeat everywhere: add one to the stack")
    at = on[-1] if index == -1 else index % len(steps)
    edit = steps[at].edit
    before = [step.edit for i, step in enumerate(steps) if step.on and i < at]
    after = [step.edit for i, step in enumerate(steps) if step.on and i > at]
    variants, columns, name = places(prompt, edit, heads)
    variants = _possible(prompt, variants)
    rest = prompt.run([*before, *after])
    rows = _last_logprobs(prompt, variants, before, after)
    base, tokens = rest.logprobs, list(ids)
    shape = (prompt.model.shape.n_layers, columns)
    kl, top = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    watched = torch.full((*shape, len(tokens)), torch.nan)
    p = base.double()
    for variant, row in zip(variants, rows, strict=True):
        place = (variant.layer, variant.column)
        kl[place] = float((p.exp() * (p - row.double())).sum().clamp_min(0))
        top[place] = float(row[base.argmax()] - base.max())
        watched[place] = (row[tokens] - base[tokens]).cpu()
    return EffectMap(str(edit), name, kl, watched, top)


def places(prompt: OpenPrompt, edit: Edit, heads: bool | None = None) -> tuple[list[Variant], int, str]:
    """Return the edit at every place, how many columns these have, and what the columns are.

    Raises:
        OptionError: an edit that stands at no place, such as an order of blocks.
    """
    shape, length = prompt.model.shape, len(prompt.tokens)
    layers = range(shape.n_layers)
    if isinstance(edit, PointEdit) and edit.address.layer is not None:
        dims = POINTS[edit.address.point].dims
        by_head = len(dims) == 3 and (edit.heads is not None if heads is None else heads)
        columns = shape.width(dims[1]) if by_head else length
        edit = _from_same_place(edit)
        where = [{"heads": (c,)} if by_head else {"positions": (c,)} for c in range(columns)]
        variants = [
            Variant(layer, c, replace(edit, address=Address(edit.address.point, layer), **where[c]))  # type: ignore[arg-type]
            for layer in layers
            for c in range(columns)
        ]
        return variants, columns, "head" if by_head else "position"
    if isinstance(edit, KnockOut):
        n = shape.n_heads
        return [Variant(at, h, replace(edit, layers=(at,), heads=(h,))) for at in layers for h in range(n)], n, "head"
    if isinstance(edit, SkipBlocks):
        return [Variant(layer, 0, SkipBlocks((layer,))) for layer in layers], 1, "layer"
    if isinstance(edit, FreezeNorm) and "." in edit.site:
        kind = edit.site.partition(".")[0]
        return [Variant(layer, 0, FreezeNorm(f"{kind}.{layer}")) for layer in layers], 1, "layer"
    raise OptionError(f"{str(edit)!r} stands at no single layer and position, so it cannot be repeated everywhere")


def _from_same_place(edit: PointEdit) -> PointEdit:
    """Return a patch whose source moves with it, where it is copied from the position that it stands at."""
    same = isinstance(edit, Replace) and isinstance(edit.value, Other) and edit.value.positions == edit.positions
    return replace(edit, value=Other()) if same else edit  # type: ignore[call-arg]


def _possible(prompt: OpenPrompt, variants: Sequence[Variant]) -> list[Variant]:
    """Return the variants that can stand where they are, with their values read.

    Raises:
        UserError: the reason of the first, where none can.
    """
    possible, refused = [], list[UserError]()
    for variant in variants:
        try:
            ready = resolve(prompt.model, [variant.edit], prompt.texts)
        except UserError as error:
            refused.append(error)
        else:
            possible.append(replace(variant, ready=ready[0]))
    if not possible:
        raise refused[0]
    return possible


@torch.no_grad()
def _last_logprobs(
    prompt: OpenPrompt, variants: Sequence[Variant], before: Sequence[Edit], after: Sequence[Edit]
) -> list[Float[Tensor, " d_vocab"]]:
    """Return the next token's log-probabilities under each variant."""
    batched = [isinstance(v.edit, PointEdit | KnockOut) for v in variants]
    if not prompt.resumable or not all(batched):
        return [prompt.run([*before, v.edit, *after]).logprobs for v in variants]
    grid = not before and not after and all(_one_position(v.edit) for v in variants)
    out: dict[Variant, Tensor] = {}
    by_layer: dict[int, list[Variant]] = {}
    for variant in variants:
        by_layer.setdefault(variant.layer, []).append(variant)
    if grid:
        return _grid(prompt, variants)
    rest = prompt.run([*before, *after])
    earlier, later = ([*resolve(prompt.model, part, prompt.texts)] for part in (before, after))
    ready = resolve(prompt.model, [*before, *after], prompt.texts)
    program = program_of(ready, prompt.model.shape.n_layers)
    width = max(1, ROW_POSITIONS // len(prompt.tokens))
    with altered_blocks(prompt.model, ready):
        for layer, own in by_layer.items():
            start = next((i for i, step in enumerate(program.steps) if layer in step), len(program.steps))
            for first in range(0, len(own), width):
                part = own[first : first + width]
                writes = composed(
                    [writes_of(prompt.model, earlier), _by_row(prompt, part), writes_of(prompt.model, later)]
                )
                hidden = rest.streams[start][None].expand(len(part), -1, -1)
                for step in program.steps[start:]:
                    hidden = prompt.step(step, program, hidden, writes)
                rows = prompt.logprobs(hidden, writes)
                out.update(zip(part, rows if len(part) > 1 else rows[None], strict=True))
    return [out[variant] for variant in variants]


def _one_position(edit: Edit) -> bool:
    return isinstance(edit, PointEdit) and isinstance(edit.positions, tuple) and len(edit.positions) == 1


def _grid(prompt: OpenPrompt, variants: Sequence[Variant]) -> list[Float[Tensor, " d_vocab"]]:
    """Return the same, each variant run from its own block and position on, where no other edit acts."""
    base = prompt.base
    assert base is not None
    last = base.entering[-1][-1].expand(len(variants), -1).clone()
    for variant in variants:
        # What a write may look at is read before any block runs alone.
        assert isinstance(variant.edit, PointEdit)
        prompt.rows(prompt.tokens, variant.edit.address)
    by_position: dict[int, list[int]] = {}
    for i, variant in enumerate(variants):
        assert isinstance(variant.edit, PointEdit)
        by_position.setdefault(int(chosen(len(prompt.tokens), variant.edit.positions)[0]), []).append(i)
    for position, indices in sorted(by_position.items()):
        opened = base if position == 0 else base.narrowed(position)
        alone = opened.narrowed(position, position + 1)
        hidden = torch.stack([opened.entering[variants[i].layer + 1] for i in indices])
        for row, i in enumerate(indices):
            hidden[row] = _leaving(prompt, variants[i], position, opened, alone)
        first = [variants[i].layer + 1 for i in indices]
        last[indices] = opened.resume(first, hidden).last
    return list(prompt.logprobs(last[:, None], {}).reshape(len(variants), -1))


def _leaving(prompt: OpenPrompt, variant: Variant, position: int, opened: CachedPrompt, alone: CachedPrompt) -> Tensor:
    """Return what leaves the variant's block from its position on, [pos, d_model]."""
    edit = variant.ready
    assert isinstance(edit, PointEdit)
    address, block = edit.address, variant.layer
    write = {address: _at_start(edit, prompt)}
    out = opened.entering[block + 1].clone()
    if address.point == "resid_post":
        out[:1] = write[address](out[None, :1])[0]
        return out
    run = opened if address.point in LATER else alone
    left = run.through(block, run.entering[block][None], write)[0]
    out[: len(left)] = left
    return out


def _at_start(edit: PointEdit, prompt: OpenPrompt) -> Write:
    """Return the edit's write for a tensor whose first position is the edited one."""
    address, length = edit.address, len(prompt.tokens)
    at = int(chosen(length, edit.positions)[0])

    def write(tensor: Tensor) -> Tensor:
        # The write sees the whole prompt, as it would in a forward of its own.
        whole = prompt.rows(prompt.tokens, address).to(tensor)[None].clone()
        whole[:, at : at + tensor.shape[1]] = tensor
        return edit.writes(prompt.model.shape)[address](whole)[:, at : at + tensor.shape[1]]

    return write


def _by_row(prompt: OpenPrompt, variants: Sequence[Variant]) -> dict[Address, Write]:
    """Return the writes that put each variant into its row of a batch."""
    rows: dict[Address, list[tuple[int, Edit]]] = {}
    for row, variant in enumerate(variants):
        edit = variant.ready
        assert edit is not None
        for address in edit.writes(prompt.model.shape):
            rows.setdefault(address, []).append((row, edit))
    if any(address.point == "pattern" for address in rows):
        shape = prompt.model.shape
        blocked = {
            address: [(row, edit.writes(shape)[address]) for row, edit in placed] for address, placed in rows.items()
        }
        return {address: BlockedRows(tuple(placed)) for address, placed in blocked.items()}

    def write(address: Address) -> Write:
        def put(tensor: Tensor) -> Tensor:
            out = tensor.clone()
            for row, edit in rows[address]:
                out[row : row + 1] = edit.writes(prompt.model.shape)[address](tensor[row : row + 1])
            return out

        return put

    return {address: write(address) for address in rows}
