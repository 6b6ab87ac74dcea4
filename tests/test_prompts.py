"""Prompts: validated by line, ragged, padded only inside a batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probes.batches import batches, select
from probes.errors import PromptError
from probes.prompts import Prompt, read_prompts, tokenize


@given(st.lists(st.lists(st.integers(1, 96), min_size=1, max_size=9), min_size=1, max_size=12), st.integers(1, 40))
def test_batches_hold_every_sequence_once_and_within_the_budget(sequences: list[list[int]], budget: int) -> None:
    unbatched: dict[int, list[int]] = {}
    for batch in batches(sequences, budget):
        assert batch.tokens.numel() <= budget or len(batch.indices) == 1
        for row, (index, length) in enumerate(zip(batch.indices, batch.lengths, strict=True)):
            assert index not in unbatched
            unbatched[index] = batch.tokens[row, :length].tolist()
    assert unbatched == dict(enumerate(sequences))


def test_row_index_never_names_a_pad() -> None:
    batch = next(batches([[1, 2, 3], [4], [5, 6]], 100))
    flat = batch.tokens.flatten()
    assert flat[batch.row_index()].tolist() == [4, 5, 6, 1, 2, 3]
    assert flat[batch.row_index("last")].tolist() == [4, 6, 3]
    assert flat[batch.row_index("after_first")].tolist() == [4, 6, 2, 3]
    assert flat[batch.row_index((0, -1))].tolist() == [4, 4, 5, 6, 1, 3]


def test_positions_outside_a_prompt_are_refused() -> None:
    assert select(4, (-4, 3)).tolist() == [0, 3]
    with pytest.raises(PromptError, match="position 4 is outside a prompt of 4 tokens: legal are -4 to 3"):
        select(4, (4,))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", 'either "text" or "tokens"'),
        ("{}", 'either "text" or "tokens"'),
        ('{"text": "a", "tokens": [1]}', 'either "text" or "tokens"'),
        ('{"text": ""}', "not empty"),
        ('{"text": 3}', "must be a string"),
        ('{"tokens": []}', "not empty"),
        ('{"tokens": [1, -2]}', "token id -2"),
        ('{"tokens": [true]}', "token id True"),
        ('{"text": "a", "label": 7}', "field 'label' is 7: must be 0 or 1"),
    ],
)
def test_a_fault_names_its_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    checks = {"label": lambda v: None if v in (0, 1) else "must be 0 or 1"}
    with pytest.raises(PromptError, match=message) as error:
        read_prompts(path, checks)
    assert str(error.value).startswith(f"{path}:3:")


def test_files_that_hold_no_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="does not exist"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(PromptError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(PromptError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.jsonl")


def test_further_fields_travel_with_the_prompt(tmp_path: Path, tiny: object) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"tokens": [3, 4], "label": 1, "note": "x"}))
    assert tokenize(read_prompts(path), tiny) == [Prompt((3, 4), None, {"label": 1, "note": "x"})]


def test_prompts_the_model_cannot_take_are_refused(tiny: object) -> None:
    with pytest.raises(PromptError, match=r"token id 97 is outside the vocabulary of tiny-llama: legal are 0 to 96"):
        tokenize([[1, 97]], tiny)
    with pytest.raises(PromptError, match="65 tokens, but the context window of tiny-llama is 64"):
        tokenize([[1] * 65], tiny)
    with pytest.raises(PromptError, match="no tokenizer"):
        tokenize(["hello"], tiny)


@pytest.mark.real
def test_the_chat_template_marks_the_users_own_tokens(real: object) -> None:
    [prompt] = tokenize(["Name three rivers."], real, chat=True)
    assert prompt.content is not None
    inside = [t for t, own in zip(prompt.tokens, prompt.content, strict=True) if own]
    assert real.tokenizer.decode(inside) == "Name three rivers."
    assert not prompt.content[0]
    assert not prompt.content[-1]
    assert torch.tensor(prompt.content).sum() < len(prompt.tokens)
