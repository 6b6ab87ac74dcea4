"""Whether a prompt's answer is right: by the logits right after the prompt, and by what is written."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

from jaxtyping import Float
from torch import Tensor

from analyses.answers import answer_after
from analyses.scoring import choice_answers, parse_choice
from probes.models.protocol import Model
from probes.prompts import Prompt


class Judge:
    """What one prompt's right answer is, and what else could be said.

    Args:
        model: the model whose tokenizer wrote the prompt.
        index: which prompt it is, for messages.
        prompt: with an `answer`, perhaps among `choices`; without one nothing is right or wrong.

    Raises:
        PromptError: an answer that is not among its choices, or that the tokenizer cannot write after the prompt.
    """

    def __init__(self, model: Model, index: int, prompt: Prompt) -> None:
        self._tokenizer, self._answer = model.tokenizer, prompt.fields.get("answer")
        self._choices: Sequence[str] = prompt.fields.get("choices", ()) if self._answer is not None else ()
        self._first: list[int] = []
        if self._choices:
            self._first = [answer.first for answer in choice_answers(model, index, prompt)]
        elif self._answer is not None:
            self._first = [answer_after(model, prompt, self._answer).first]

    def by_logits(self, logits: Float[Tensor, " d_vocab"]) -> float:
        """Tell whether the right choice has the highest logit, or, without choices, the answer begins with the most probable token."""
        if self._answer is None:
            return nan
        if self._choices:
            return float(self._choices[int(logits[self._first].argmax())] == self._answer)
        return float(int(logits.argmax()) == self._first[0])

    def by_text(self, tokens: Sequence[int]) -> float:
        """Tell whether a text names the right choice first, or, without choices, begins with the answer."""
        if self._answer is None:
            return nan
        text = str(self._tokenizer.decode(list(tokens)))
        if self._choices:
            return float(parse_choice(text, self._choices) == self._answer)
        return float(text.strip().lower().startswith(self._answer.strip().lower()))
