"""What is selected: layers, prompts, tokens and heads. Chosen anywhere, kept for the session and in the address, followed everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import streamlit as st

KEY = "selection"
KINDS = ("layers", "prompts", "tokens", "heads")
OF = "of"
"""The address's word for which prompts are meant."""
LAYERS = ("layer", "source_layer", "target_layer", "skipped", "affected", "start")
"""Columns that hold a layer."""
HEADS = (("source_layer", "source_head"), ("target_layer", "target_head"), ("layer", "head"))
"""Pairs of columns that together hold a head."""


@dataclass(frozen=True)
class Selection:
    """Empty means everything."""

    layers: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    """Indices of prompts."""
    tokens: tuple[int, ...] = ()
    """Positions within a prompt."""
    heads: tuple[str, ...] = ()
    """Each `layer.head`, both from 0."""
    of: str = ""
    """Which prompts the indices and positions are of, as `Run.prompts` says it; empty where nobody said."""

    def of_run(self, prompts: str) -> Selection:
        """The selection as it holds for a run of those prompts: indices of other prompts mean nothing there."""
        return self if self.of in ("", prompts) else replace(self, prompts=(), tokens=(), of="")

    def left_out(self, prompts: str) -> str:
        """What is not followed by a run of those prompts, in a sentence; empty where all is."""
        kinds = [kind for kind in ("prompts", "tokens") if getattr(self, kind)]
        if not kinds or self.of in ("", prompts):
            return ""
        return f"The selected {' and '.join(kinds)} are of another set of prompts than this run's: they are not followed here."

    def __bool__(self) -> bool:
        return any(getattr(self, kind) for kind in KINDS)

    def text(self) -> str:
        """What is selected, in words."""
        parts = [f"{kind} {', '.join(map(str, getattr(self, kind)))}" for kind in KINDS if getattr(self, kind)]
        return "; ".join(parts) or "everything"


def parse(params: Mapping[str, str]) -> Selection:
    """The selection that an address names; what is not a number is passed over."""
    numbers = {kind: _numbers(params.get(kind, "")) for kind in KINDS[:3]}
    heads = [part.strip() for part in params.get("heads", "").split(",")]
    of = params.get(OF, "") if numbers["prompts"] or numbers["tokens"] else ""
    chosen = tuple(dict.fromkeys(h for h in heads if _is_head(h)))
    return Selection(**numbers, heads=chosen, of=of if of.isalnum() and len(of) <= 32 else "")


def params_of(selection: Selection) -> dict[str, str]:
    """The address's part for a selection."""
    params = {kind: ",".join(map(str, getattr(selection, kind))) for kind in KINDS if getattr(selection, kind)}
    return {**params, OF: selection.of} if selection.of and (selection.prompts or selection.tokens) else params


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(part) for part in text.split(",") if part.strip().isdecimal() and len(part) < 8}))


def _is_head(text: str) -> bool:
    layer, dot, head = text.partition(".")
    return bool(dot) and layer.isdecimal() and head.isdecimal()


def current() -> Selection:
    """This session's selection, at first the one the address names."""
    if KEY not in st.session_state:
        st.session_state[KEY] = parse(st.query_params.to_dict())
    selection: Selection = st.session_state[KEY]
    return selection


def select(
    *,
    layers: Iterable[int] | None = None,
    prompts: Iterable[int] | None = None,
    tokens: Iterable[int] | None = None,
    heads: Iterable[str] | None = None,
    of: str = "",
) -> None:
    """Replace the given kinds of this session's selection, keeping the others.

    Args:
        of: which prompts the given `prompts` and `tokens` are of; those of other prompts are dropped.
    """
    renewed = prompts is not None or tokens is not None
    now = current().of_run(of) if renewed else current()
    st.session_state[KEY] = Selection(
        now.layers if layers is None else tuple(sorted(set(layers))),
        now.prompts if prompts is None else tuple(sorted(set(prompts))),
        now.tokens if tokens is None else tuple(sorted(set(tokens))),
        now.heads if heads is None else tuple(dict.fromkeys(heads)),
        of if renewed else now.of,
    )


def settle(of: str) -> None:
    """Say which prompts a selection is of that came without a word about it: those of the page that it first met."""
    now = current()
    if (now.prompts or now.tokens) and not now.of:
        st.session_state[KEY] = replace(now, of=of)


def clear() -> None:
    """Select everything again."""
    select(layers=(), prompts=(), tokens=(), heads=())
