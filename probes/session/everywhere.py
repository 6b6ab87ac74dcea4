"""One edit of a stack repeated at every layer and position, or every head: what it does there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.edits import Edit, FreezeNorm, KnockOut, Other, PointEdit, Replace, SkipBlocks, resolve
from probes.errors import OptionError, UserError
from probes.points import POINTS, Address
from probes.session.open_prompt import OpenPrompt
from probes.session.state import Step
from probes.session.variants import Variant, logprobs_of


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
    base, tokens = prompt.run([*before, *after]).logprobs, list(ids)
    shape = (prompt.model.shape.n_layers, columns)
    kl, top = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    watched = torch.full((*shape, len(tokens)), torch.nan)
    p = base.exp()
    for part, rows in logprobs_of(prompt, variants, before, after):
        place = torch.tensor([(variant.layer, variant.column) for variant in part]).T.unbind()
        kl[place] = ((base - rows) @ p).clamp_min(0).cpu()
        top[place] = (rows[:, base.argmax()] - base.max()).cpu()
        watched[place] = (rows[:, tokens] - base[tokens]).cpu()
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
