"""What the resident process answers: sessions of loaded models, read and edited."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from analyses.reading.choice import chosen_lens
from app.jobs.models import in_memory, loaded
from app.live.named_model import named_model
from app.live.protocol import Action, Answer, Question
from probes.edits import Edit, legal_forms, parse_edits, read
from probes.edits.line import watched
from probes.errors import OptionError, UserError
from probes.lenses.protocol import Lens
from probes.points import Address
from probes.session import LensGrid, Session, State, Step
from probes.session.session import Kept, step_name
from probes.weights.direct_effects import head_effects

SESSIONS = 6
"""Prompts whose runs are kept, of all windows together."""
MOST_CELLS = 40_000
"""Cells of a grid, at most: layers times positions."""
THREADS = torch.get_num_threads()
"""Threads of an answer, also where a job in the same process has just left some of its own to others."""

_KEPT: OrderedDict[tuple[int, object, object], Kept] = OrderedDict()


def answer(question: Question) -> Answer:
    """Return the answer to a question; what cannot be is said in it, and the session stays as it was."""
    torch.set_num_threads(THREADS)
    try:
        state = changed(State.parse(question.session), question.actions)
        session = opened(state)
        data = VIEWS[question.kind](session, **question.options)
        return Answer(str(session), data)
    except UserError as error:
        return Answer(question.session, refusal=str(error))
    except MemoryError:
        return Answer(question.session, refusal="Out of memory: use a shorter prompt or a smaller model.")


def opened(state: State) -> Session:
    """Return the session of a state, with what is known of its prompts."""
    model = loaded(named_model(state.model))
    key = (id(model), state.text, state.other)
    for old in [k for k, kept in _KEPT.items() if not in_memory(kept.prompt.model)]:
        del _KEPT[old]
    session = Session.of(model, state, _KEPT.get(key))
    assert session.kept is not None
    if len(session.prompt.tokens) * model.shape.n_layers > MOST_CELLS:
        raise OptionError(f"a prompt of {len(session.prompt.tokens)} tokens is too long for a live grid: shorten it")
    _KEPT[key] = session.kept
    _KEPT.move_to_end(key)
    for other in list(_KEPT.values())[:-1]:
        other.distributions = None
    while len(_KEPT) > SESSIONS:
        _KEPT.popitem(last=False)
    return session


def changed(state: State, actions: Sequence[Action]) -> State:
    """Return a state after some changes.

    Raises:
        UserError: a change that cannot be, such as text that is no edit.
    """
    for action in actions:
        match action.kind:
            case "add":
                n = loaded(named_model(state.model)).shape.n_layers
                state = state.edit(*parse_edits(str(action.value), n))
            case "toggle":
                state = state.toggle(action.at)
            case "strength":
                state = state.with_strength(action.at, float(action.value))
            case "move":
                state = state.moved(action.at, int(action.value))
            case "remove":
                state = state.with_step(action.at)
            case "clear":
                state = replace(state, steps=())
            case "text":
                state = replace(state, text=str(action.value))
            case "other":
                state = replace(state, other=str(action.value) or None)
            case "watch":
                state = replace(state, watch=watched(str(action.value)))
            case "model":
                state = replace(state, model=str(action.value))
    return state


def view(session: Session, lens: str = "logit") -> dict[str, Any]:
    """Return what the page shows of a session at once: before and after, and its stack; `grids` take longer.

    Raises:
        UserError: a lens that cannot read this model.
    """
    began = time.perf_counter()
    _lens(lens, session.ref)
    session.readable()
    comparison = session.compare(layers=False)
    shape = session.model.shape
    return {
        "comparison": comparison.data(),
        "rows": [step_name(step) for step in session.run.steps],
        "steps": [_step(step) for step in session.steps],
        "text": session.text,
        "other": session.other,
        "other_tokens": [session.token(t) for t in session.prompt.texts.other or ()],
        "watch": list(session.watch),
        "layers": shape.n_layers,
        "heads": shape.n_heads,
        "causal": shape.causal,
        "forms": legal_forms(),
        "seconds": time.perf_counter() - began,
    }


def grids(session: Session, lens: str = "logit") -> dict[str, Any]:
    """Return every layer's reading at every position, before the edits and after them."""
    through = _lens(lens, session.ref)
    before = session.grid(before=True, lens=through)
    return {"before": _grid(session, before), "after": _grid(session, session.grid(lens=through))}


@lru_cache(maxsize=4)
def _lens(name: str, model: str) -> Lens:
    return chosen_lens(name, loaded(named_model(model)), "resid_post")


def _step(step: Step) -> dict[str, Any]:
    edit: Edit = step.edit
    strength = None if edit.strength is None else float(getattr(edit, edit.strength))
    return {"text": str(edit), "on": step.on, "strength": strength, "strength_name": edit.strength}


def _grid(session: Session, grid: LensGrid) -> dict[str, Any]:
    tokens = [[[session.token(t) for t in cell] for cell in row] for row in grid.top_ids.tolist()]
    arrays = {
        name: getattr(grid, name).numpy()
        for name in ("top_logprobs", "entropy_bits", "norms", "watched", "ranks", "kl", "changed")
    }
    return {"steps": [step_name(step) for step in grid.steps], "tokens": tokens, **arrays}


def attention(session: Session, layer: int, edited: bool = True) -> dict[str, Any]:
    """Return the attention probabilities [head, query, key] of a layer.

    Raises:
        PointError: a model whose patterns cannot be read.
    """
    return {"pattern": _read(session, [Address("pattern", layer)], edited)[Address("pattern", layer)].numpy()}


def heads(session: Session, edited: bool = True) -> dict[str, Any]:
    """Return every head's direct effect [layer, head] on the logit of the most probable next token, in logits.

    What a head adds to the last position's stream, read by the final norm (at its scale there) and the unembedding.
    """
    top = int(session.prompt.clean.logprobs.argmax())
    z, scale = [Address("z", layer) for layer in range(session.model.shape.n_layers)], Address("final_scale")
    rows = _read(session, [*z, scale], edited)
    effects = head_effects(session.model, {i: rows[a][-1] for i, a in enumerate(z)}, float(rows[scale][-1]), top)
    return {"effects": effects.numpy(), "token": session.token(top)}


def _read(session: Session, addresses: Sequence[Address], edited: bool) -> dict[Address, torch.Tensor]:
    for address in addresses:
        if reason := session.model.refusal(address):
            raise OptionError(f"{session.model.ref} has no {address}: {reason}")
    edits = session.prompt.ready(session.edits) if edited else []
    rows = read(session.model, session.prompt.ids, list(addresses), edits)
    return {address: tensor[0].float().cpu() for address, tensor in rows.items()}


def everywhere(session: Session, at: int = -1, by_head: bool | None = None) -> dict[str, Any]:
    """Return the effect of one edit at every place."""
    effect = session.everywhere(at, by_head)
    return {
        "edit": effect.edit, "columns": effect.columns, "kl": effect.kl.numpy(), "top": effect.top.numpy(),
        "watched": effect.watched.numpy(), "top_token": session.token(int(session.prompt.clean.logprobs.argmax())),
    }  # fmt: skip


def written(session: Session, new_tokens: int) -> dict[str, Any]:
    """Return what the model writes before and after the edits."""
    comparison = session.compare(new_tokens, layers=False)
    return {"before": comparison.before.written, "after": comparison.after.written}


def other(session: Session, lens: str = "logit") -> dict[str, Any]:
    """Return the other prompt's grid, without edits.

    Raises:
        OptionError: there is no other prompt.
    """
    if session.other is None:
        raise OptionError("there is no other prompt: write one to see its grid")
    there = opened(replace(session.state, text=session.other, other=None, steps=()))
    return {"grid": _grid(there, there.grid(before=True, lens=_lens(lens, session.ref))), "tokens": list(there.tokens)}


VIEWS: dict[str, Callable[..., dict[str, Any]]] = {
    "view": view,
    "grids": grids,
    "attention": attention,
    "heads": heads,
    "everywhere": everywhere,
    "written": written,
    "other": other,
}
