"""The desk of the Live page: a window's sessions in order, what was answered of the present one, and what was refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from app.jobs.queue import queue
from app.live.client import ProcessEnded, ask
from app.live.kept import Kept, recall
from app.live.protocol import Action, Answer, Kind, Question
from app.offered import FIRST, put_off

KEY = "live:desk"
MOST = 200
"""Sessions remembered."""
PARTS = ("prompts", "strip", "stack", "tools", "grid")
"""Parts of the page, each drawn again only where it shows something else; the grid, which takes longest, last."""
PART_OF = {"prompt": "prompts", "outcome": "strip", "stack": "stack", "grid": "grid"}
"""Where a refusal is said, by what was asked for; the others are tools."""


def part(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return what makes a function draw a part of the page, which `redraw` then names."""
    return st.fragment(key=f"live:{name}")


def redraw(*parts: str) -> None:
    """End a callback of a button or field; the page then draws these parts again, and nothing else."""
    st.rerun([f"live:{name}" for name in PARTS if name in parts])


@dataclass
class Desk:
    """What one window has done."""

    history: list[Answer] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    """What each step of the history did."""
    at: int = -1
    turn: int = 0
    """How often another step was shown: part of the keys of what shows a step, since a browser that is busy may still send the
    value that a field of the same key had in an earlier one."""
    refusal: str = ""
    refused_at: str = ""
    """The part of the page whose button was refused."""
    kept: Kept | None = None
    """What is shown, where it is of an earlier session of the dashboard and the model still loads."""
    more: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further answers about the present session, by what was asked."""

    @property
    def now(self) -> Answer | None:
        """The present session; None before the first was answered."""
        return self.history[self.at] if self.history else None

    def act(self, words: str, *actions: Action, at: str = "stack", empties: str = "") -> None:
        """Change the session, and show what follows; a refusal keeps it as it was, and the text of the field `empties`."""
        if self.now is None:
            return
        with self._shown():
            self.look_at(words, self.now.session, actions, at)
            if empties and not self.refusal:
                st.session_state[empties] = ""

    def act_on_step(self, turn: int, words: str, action: Action) -> None:
        """Change a step of the stack that was drawn in that turn: a browser may still send what a widget of an earlier one held."""
        if turn == self.turn:
            self.act(words, action)

    def open(self, session: str, words: str, at: str = "prompt") -> None:
        """Open a session by its text, and show it."""
        with self._shown():
            self.look_at(words, session, (), at)

    def recall(self, session: str) -> bool:
        """Show what was kept of a session, where its model is being loaded; return whether there was something."""
        self.kept = recall(session) if FIRST.is_set() else None
        if self.kept is not None:
            self.kept.data["took"] = self.kept.data["seconds"]
            self.history, self.words, self.at = [Answer(self.kept.session, self.kept.data)], ["opened"], 0
        return self.kept is not None

    def settle(self) -> bool:
        """Once the model has answered, take its answer instead of what was kept; return whether it has."""
        if self.kept is None or FIRST.is_set():
            return False
        answer = self.answer_of("view", self.kept.session, at="prompt")
        self.kept = None
        if answer is not None:
            self.history[0] = answer
        return True

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Draw again what shows something else after the change inside, which a callback makes."""
        before, said = self.now, self.refused_at if self.refusal else ""
        yield
        if before is None or self.now is None:
            return
        parts = {PART_OF.get(at, "tools") for at in (said, self.refused_at if self.refusal else "") if at}
        if self.now is not before:
            parts |= {"strip", "stack", "grid"}
            if _prompts(self.now) != _prompts(before):
                parts |= {"prompts"}
            if st.session_state.get("live:tool", "Cell") != "Cell" or _buttons(self.now) != _buttons(before):
                parts |= {"tools"}
        if parts:
            redraw(*parts)

    def look_at(self, words: str, session: str, actions: tuple[Action, ...] = (), at: str = "prompt") -> None:
        """Have a changed session answered, as the next step; a refusal adds none."""
        answer = self.answer_of("view", session, actions, at, lens=st.session_state.get("keep:live:lens", "logit"))
        if answer is None:
            return
        self.history, self.words = self.history[: self.at + 1][-MOST:], self.words[: self.at + 1][-MOST:]
        self.history.append(answer)
        self.words.append(words)
        self.at, self.more = len(self.history) - 1, {}
        # A slider that was moved shows its step already, and stays where the finger or the focus is.
        self.turn += [action.kind for action in actions] != ["strength"]

    def answer_of(
        self, kind: Kind, session: str, actions: tuple[Action, ...] = (), at: str = "stack", **options: Any
    ) -> Answer | None:
        """Return an answer of the resident process, with the seconds that it took there and back; None where it was refused."""
        began = time.perf_counter()
        self.refusal, self.refused_at = "", at
        try:
            with put_off():
                answer = ask(queue(), Question(kind, session, actions, options))
        except ProcessEnded as error:
            self.refusal = str(error)
            return None
        answer.data["took"] = time.perf_counter() - began
        self.refusal = answer.refusal
        return None if answer.refusal else answer

    def grids(self, index: int) -> dict[str, Any] | None:
        """Return the lens grids of a step of the history, asked for once; None where they were refused."""
        data = self.history[index].data
        if "grids" not in data:
            lens = st.session_state.get("keep:live:lens", "logit")
            answer = self.answer_of("grids", self.history[index].session, at="grid", lens=lens)
            if answer is None:
                return None
            data["grids"] = answer.data
            data["took"] += answer.data["took"]
        grids: dict[str, Any] = data["grids"]
        return grids

    def look(self, kind: Kind, at: str, **options: Any) -> dict[str, Any] | None:
        """Return a further answer about the present session, asked for once."""
        name = f"{kind} {sorted(options.items())}"
        if name not in self.more and self.now is not None:
            answer = self.answer_of(kind, self.now.session, at=at, **options)
            if answer is None:
                return None
            self.more[name] = answer.data
        return self.more.get(name)

    def known(self, kind: Kind, **options: Any) -> dict[str, Any] | None:
        """Return a further answer that was asked for before."""
        return self.more.get(f"{kind} {sorted(options.items())}")

    def go(self, by: int) -> None:
        """Go back or forward in the history; nothing is computed."""
        with self._shown():
            at = min(max(self.at + by, 0), len(self.history) - 1)
            if at != self.at:
                self.at, self.more, self.refusal, self.turn = at, {}, "", self.turn + 1

    def say_refusal(self, at: str) -> None:
        """Say what was refused, where it was asked for."""
        if self.refusal and self.refused_at == at:
            # The legal forms fill a screen, and stand under a button of the page.
            words, _, forms = self.refusal.partition(" The forms: ")
            st.error(words + (" **What can I write?** has their forms." if forms else ""), icon=":material/block:")


def _prompts(answer: Answer) -> tuple[object, ...]:
    """Return what the fields of the prompts show of a step."""
    data = answer.data
    return answer.session.split("\n")[0], data["text"], data["other"], data["watch"], len(data["comparison"]["tokens"])


def _buttons(answer: Answer) -> tuple[object, ...]:
    """Return what the buttons of a cell show of a step."""
    data = answer.data
    return data["rows"], data["watch"], data["other"] is None, data["comparison"]["before"]["top"][0]


def desk() -> Desk:
    """This window's desk."""
    if KEY not in st.session_state:
        st.session_state[KEY] = Desk()
    own: Desk = st.session_state[KEY]
    return own
