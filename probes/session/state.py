"""What a session is about, as a value with one text form: model, prompts, edits and what is watched."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace

from probes.edits import Edit
from probes.edits.line import watched
from probes.errors import OptionError, PromptError, shown

PromptText = str | tuple[int, ...]
"""A prompt as text, or as token ids."""
WORDS = "model NAME; text 'PROMPT' or text [TOKEN, IDS]; other …; watch ' TOKEN' ' TOKEN'; edit …; off …"
LONGEST = 200_000
"""Characters of a session's text."""


@dataclass(frozen=True)
class Step:
    """One edit of a stack."""

    edit: Edit
    on: bool = True

    def __str__(self) -> str:
        return f"{'edit' if self.on else 'off'} {self.edit}"


@dataclass(frozen=True)
class State:
    """A session without its model; every action gives another one."""

    model: str
    """What the model is loaded by, as `Model.ref` has it or as a command line says it."""
    text: PromptText
    other: PromptText | None = None
    """A second prompt, to copy from."""
    steps: tuple[Step, ...] = ()
    """Edits in their order; those that are off act on nothing."""
    watch: tuple[str, ...] = ()
    """Tokens whose probability is followed, as text."""

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits that are on."""
        return tuple(step.edit for step in self.steps if step.on)

    def edit(self, *edits: Edit) -> State:
        """Return the state with more edits on top."""
        return replace(self, steps=(*self.steps, *map(Step, edits)))

    def toggle(self, index: int) -> State:
        """Return the state with one edit switched on or off."""
        step = self.steps[index]
        return self.with_step(index, replace(step, on=not step.on))

    def with_step(self, index: int, *steps: Step) -> State:
        """Return the state with one step replaced; by none, it is removed."""
        return replace(self, steps=(*self.steps[:index], *steps, *self.steps[index + 1 :]))

    def with_strength(self, index: int, strength: float) -> State:
        """Return the state with one edit acting as strongly.

        Raises:
            OptionError: an edit that acts or does not.
        """
        edit = self.steps[index].edit
        if edit.strength is None:
            raise OptionError(f"{str(edit)!r} has no strength: it acts, or it does not")
        return self.with_step(index, replace(self.steps[index], edit=replace(edit, **{edit.strength: strength})))  # type: ignore[type-var]

    def moved(self, index: int, by: int) -> State:
        """Return the state with one edit earlier (negative) or later in the stack."""
        steps = list(self.steps)
        step = steps.pop(index)
        steps.insert(min(max(index + by, 0), len(steps)), step)
        return replace(self, steps=tuple(steps))

    def __str__(self) -> str:
        lines = [f"model {self.model}", f"text {_prompt(self.text)}"]
        if self.other is not None:
            lines.append(f"other {_prompt(self.other)}")
        if self.watch:
            lines.append("watch " + " ".join(map(repr, self.watch)))
        return "\n".join([*lines, *map(str, self.steps)])

    @classmethod
    def parse(cls, text: str) -> State:
        """Return the state whose text this is.

        Raises:
            OptionError: text that is no session, with the line.
        """
        if len(text) > LONGEST:
            raise OptionError(f"a session of {len(text):,} characters: at most {LONGEST:,}")
        fields: dict[str, PromptText] = {}
        watch: tuple[str, ...] = ()
        steps: list[Step] = []
        for number, line in enumerate(text.strip().split("\n"), 1):
            word, _, rest = line.strip().partition(" ")
            if word in ("edit", "off"):
                steps.append(Step(Edit.parse(rest), word == "edit"))
            elif word == "watch" and not watch:
                watch = watched(rest)
            elif word == "model" and rest.strip() and word not in fields:
                fields[word] = rest.strip()
            elif word in ("text", "other") and word not in fields:
                fields[word] = _read_prompt(rest, number)
            else:
                raise OptionError(f"line {number} of a session: {shown(line)} is none of: {WORDS}")
        if absent := [word for word in ("model", "text") if word not in fields]:
            raise OptionError(f"a session without its {absent[0]}. Its lines are: {WORDS}")
        return cls(str(fields["model"]), fields["text"], fields.get("other"), tuple(steps), watch)


def _prompt(prompt: PromptText) -> str:
    return repr(prompt) if isinstance(prompt, str) else str(list(prompt))


def _read_prompt(text: str, number: int) -> PromptText:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(v) is int and v >= 0 for v in value):
        return tuple(value)
    raise PromptError(f"line {number} of a session: {shown(text)} is no prompt: give text in quotes, or [token, ids]")


def as_prompt(prompt: str | Sequence[int]) -> PromptText:
    """Return a prompt as a state keeps it."""
    return prompt if isinstance(prompt, str) else tuple(int(token) for token in prompt)
