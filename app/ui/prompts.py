"""Choosing prompts: the same choice serves every analysis."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from analyses.base import Analysis
from app.prompt_sets import MAX_LINES, PromptSet, check, shipped, typed, uploaded
from app.ui.keep import begin
from probes.errors import PromptError
from probes.html_card import count

TYPED, UPLOADED, SHIPPED, NONE = "Typed", "Uploaded", "Shipped", "Made by the analysis"
EXAMPLE = "The capital of France is"


def draw_prompts(cls: type[Analysis]) -> PromptSet | None:
    """The prompts chosen, or None where the analysis is to make its own.

    Raises:
        PromptError: a fault, with its line.
    """
    how = st.segmented_control(
        "Prompts", [TYPED, UPLOADED, SHIPPED, NONE], key=begin("keep:prompts:how", TYPED),
        help="The same prompts are offered on every page, so that a second analysis finds their rows in the store.",
    )  # fmt: skip
    fields = ", ".join(f"`{name}`" for name in cls.prompt_fields)
    if fields:
        meanings = "\n".join(f"- `{name}`: {field.help}" for name, field in cls.prompt_fields.items())
        st.caption(f'A line may also carry {fields}, written as JSON: `{{"text": …, …}}`.', help=meanings)
    if how == TYPED:
        text = st.text_area(
            "One prompt a line", key=begin("keep:prompts:text", EXAMPLE), height=120,
            help='Plain text, or JSON objects such as {"text": "…"} or {"tokens": [5, 6]} for token ids as they are.',
        )  # fmt: skip
        prompts = typed(text, cls.prompt_fields)
    elif how == UPLOADED:
        prompts = _upload(cls)
    elif how == SHIPPED:
        prompts = _shipped(cls)
    else:
        st.caption("The analysis makes its own prompts, from its options, or works on weights alone.")
        return None
    st.caption(count(prompts.count, "prompt"))
    return prompts


def _upload(cls: type[Analysis]) -> PromptSet:
    given = st.file_uploader(
        "A file of JSON lines, or of plain text (.txt), one prompt a line", type=["jsonl", "json", "txt"], key="upload",
        help=f"At most {MAX_LINES:,} lines here; the command line takes more.",
    )  # fmt: skip
    if given is not None:
        prompts = uploaded(given.name, given.getvalue(), {})
        st.session_state["uploaded"] = (prompts.source, str(prompts.save()))
    if "uploaded" not in st.session_state:
        raise PromptError("no file yet: upload one, or choose another source of prompts")
    source, path = st.session_state["uploaded"]
    if given is None:
        st.caption(f"Still using `{source}`.")
    return check(Path(path).read_text(encoding="utf-8"), source, cls.prompt_fields)


def _shipped(cls: type[Analysis]) -> PromptSet:
    sets = shipped()
    name = st.selectbox("Prompt set", list(sets), key="keep:prompts:shipped", help="Sets that come with the package.")
    return check(sets[name].read_text(encoding="utf-8"), f"{name}.jsonl", cls.prompt_fields)
