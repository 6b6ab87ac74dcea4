"""The truth of a planted model as marks on the depth axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import streamlit as st

from analyses.results.depth_axis import Mark
from probes.errors import ModelError
from probes.planted.registry import PREFIX

if TYPE_CHECKING:
    from probes.planted.record import Question


@st.cache_data(show_spinner=False)
def true_marks(ref: str) -> tuple[Mark, ...]:
    """Return the marks of a planted model; none for other models, and for one that this version does not have."""
    if not ref.startswith(PREFIX):
        return ()
    from probes.planted import registry

    try:
        name, seed = registry.parse(ref)
        record = registry.build(name, seed).record
    except ModelError:
        return ()
    marks = [mark_of(question) for question in record.questions]
    return tuple(mark for mark in marks if mark is not None)


def mark_of(question: Question) -> Mark | None:
    """Return the mark of a question; None where there is nothing, or its answer is not of layers."""
    from probes.planted.record import Interval

    name = " ".join(
        filter(
            None, (question.kind, question.concept, question.position and f"at {question.position}", question.subset)
        )
    )
    if isinstance(question.truth, Interval):
        # The axis begins at block 0, and the embedding is below it.
        layers = tuple(range(max(0, question.truth.first), question.truth.last + 1))
        return Mark(name, layers, True) if layers else None
    if question.kind not in ("nodes", "written", "moved", "void") or not question.truth:
        return None
    return Mark(name, tuple(sorted({_layer(part) for part in question.truth})), False)


def in_words(marks: Sequence[Mark]) -> str:
    """Return what each number of the truth's panel stands for."""
    parts = [f"{number} {mark.name} {_layers(mark)}" for number, mark in enumerate(marks, 1)]
    return f"The truth that was built into this planted model, by layer: {'; '.join(parts)}."


def _layers(mark: Mark) -> str:
    if mark.whole and len(mark.layers) > 1:
        return f"{mark.layers[0]}–{mark.layers[-1]}"
    return ", ".join(map(str, mark.layers))


def _layer(name: str) -> int:
    """Return the block of a node (`7.2`, `mlp.4`) or of a void (`3`, `3:function`)."""
    front, _, back = name.partition(":")[0].partition(".")
    return int(back if front == "mlp" else front)
