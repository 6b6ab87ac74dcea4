"""Tables of what programs do for questions."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analyses.layer_programs.engine import Engine
from analyses.layer_programs.questions import Question
from analyses.tokens import token_text
from probes.prompts import Prompt


def question_table(prompts: Sequence[Prompt], questions: Sequence[Question], engine: Engine) -> pd.DataFrame:
    """Return columns prompt, text, group, answer, said, right, and the plain value of every metric."""
    rows = []
    for prompt, question, plain in zip(prompts, questions, engine.plain(), strict=True):
        answer = " ".join(token_text(engine.model, token) for token in question.answer)
        said, values = (
            token_text(engine.model, int(plain.said[0])),
            {name: values[0] for name, values in plain.values.items()},
        )
        right = values.pop("correct") > 0 if question.firsts else None
        row: dict[str, object] = {
            "prompt": question.prompt, "text": prompt.text, "group": question.group, "answer": answer, "said": said, "right": right,
        }  # fmt: skip
        rows.append(row | values)
    return pd.DataFrame(rows)
