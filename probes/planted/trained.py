"""T: models trained with the location of their computation enforced; weights, questions and certificates are shipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from probes.errors import ModelError
from probes.planted import trained_prompts as data
from probes.planted.hosts import BOS, tokenizer
from probes.planted.making import PROMPTS, model_digest, randint
from probes.planted.record import Record
from probes.planted.task import Example, PlantedTask
from probes.planted.vocabulary import words

DATA = Path(__file__).parent / "data"
TRAINED = tuple(f"T{number}" for number in range(1, 9))
_FACT_WORDS = (*words(e=data.ENTITIES, r=data.RELATIONS, a=data.ANSWERS, f=26), BOS, "ask")
_HOP_WORDS = (*words(w=32, b=8, a=data.ANSWERS, f=18), BOS, "ask")
SEEDS = {name: int(name[1:]) for name in TRAINED} | {"T1": 0}
"""The seed of each training: it draws the tables, the first weights and the batches."""


def build(task: str, seed: int = 0) -> PlantedTask:
    """Return a shipped model with its examples and its record, certificate included.

    Raises:
        ModelError: a seed but 0, of which there is no training.
    """
    if seed != 0:
        raise ModelError(f"planted model {task} was trained once: its seed is 0, not {seed}")
    record = Record.from_json((DATA / f"{task}.json").read_text(encoding="utf-8"))
    return task_of(record, load_weights(task))


def task_of(record: Record, module: Any) -> PlantedTask:
    """Return the task of a trained model and its record, with the examples that the model's training implies."""
    vocabulary, examples = prompts_of(record.task)
    return PlantedTask(record, module, tokenizer(vocabulary), tuple(examples))


def load_weights(task: str) -> Any:
    """Return the model of a task from its shipped weights, in float32; tensors left out are zero.

    Raises:
        ModelError: the weights are not those of the record.
    """
    from safetensors.torch import load_file

    module = untrained(task)
    stored = load_file(DATA / f"{task}.safetensors")
    state = {
        name: stored[name].float() if name in stored else torch.zeros_like(tensor)
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def untrained(task: str, seed: int | None = None) -> Any:
    """Return a Llama of a task's shape, drawn at random: of two narrow layers for T1, of six for all others."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if task == "T1":
        sizes = {"vocab_size": data.REPEATED_VOCAB, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    else:
        sizes = {"vocab_size": data.VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    with torch.random.fork_rng():
        torch.manual_seed(SEEDS[task] if seed is None else seed)
        return LlamaForCausalLM(LlamaConfig(**ends, **sizes, **heads, max_position_embeddings=64))


def description(task: str, module: Any) -> dict[str, Any]:
    """Return what a record says of its model."""
    config = module.config
    return {
        "class": type(module).__name__, "layers": config.num_hidden_layers, "d_model": config.hidden_size,
        "heads": config.num_attention_heads, "norm": "rms", "digest": model_digest(module),
    }  # fmt: skip


def prompts_of(task: str) -> tuple[tuple[str, ...], list[Example]]:
    """Return the vocabulary of a trained model and its 128 examples."""
    draw = torch.Generator().manual_seed(1000 + SEEDS[task])
    if task == "T1":
        return words(s=data.REPEATED_VOCAB), _repeated_examples(draw)
    if task in ("T3", "T4"):
        return _HOP_WORDS, _hop_examples(data.hops(SEEDS[task]), draw)
    table = data.latin_square(data.ENTITIES, data.ANSWERS, SEEDS[task])
    examples = _fact_examples(table, draw)
    if task == "T7":
        unused = data.latin_square(data.ENTITIES, data.ANSWERS, SEEDS[task] + 100)
        examples = [_with_unused(example, unused) for example in examples]
    if task == "T8":
        labels = (torch.randperm(PROMPTS, generator=draw) % data.ANSWERS).tolist()
        examples = [
            replace(example, answer=data.FIRST_ANSWER + label, values={"attribute": label})
            for example, label in zip(examples, labels, strict=True)
        ]
    return _FACT_WORDS, examples


def _fact_examples(table: Int[Tensor, "e r"], draw: torch.Generator) -> list[Example]:
    """128 of the 256 facts, equally many of each answer, with partners of which every mixture has another answer."""
    examples = []
    for value in range(data.ANSWERS):
        pairs = (table == value).nonzero()
        chosen = pairs[torch.randperm(len(pairs), generator=draw)[: PROMPTS // data.ANSWERS]]
        for number, (e, r) in enumerate(chosen.tolist()):
            others = _unlike(table, e, r)
            partner = others[randint(len(others), draw)]
            prompts = data.fact_prompts(torch.stack([torch.tensor([e, r]), partner]), draw).tolist()
            examples.append(Example(
                tuple(prompts[0]), data.FIRST_ANSWER + value, tuple(prompts[1]),
                data.FIRST_ANSWER + int(table[partner[0], partner[1]]), {"attribute": value}, f"e{e} r{r}",
                "fit" if number < len(chosen) // 2 else "test",
            ))  # fmt: skip
    return examples


def _unlike(table: Int[Tensor, "e r"], e: int, r: int) -> Int[Tensor, "pair 2"]:
    differs = table != table[e, r]
    return (differs & differs[:, r][:, None] & differs[e][None]).nonzero()


def _with_unused(example: Example, unused: Int[Tensor, "e r"]) -> Example:
    e, r = example.tokens[1], example.tokens[2] - data.FIRST_RELATION
    values: Mapping[str, int] = {**(example.values or {}), "unused": int(unused[e, r])}
    return replace(example, values=values)


def _hop_examples(hops: data.Hops, draw: torch.Generator) -> list[Example]:
    """Each of the 32 words four times; two of the four words of each bridge to fit."""
    examples = []
    place = {int(word): number for b in range(8) for number, word in enumerate((hops.bridge == b).nonzero())}
    for number in range(PROMPTS):
        word = number % 32
        others = (hops.answer != hops.answer[word]).nonzero().flatten().tolist()
        partner = others[randint(len(others), draw)]
        prompts = data.hop_prompts(torch.tensor([word, partner]), draw).tolist()
        examples.append(Example(
            tuple(prompts[0]), data.FIRST_END + int(hops.answer[word]), tuple(prompts[1]),
            data.FIRST_END + int(hops.answer[partner]),
            {"bridge": int(hops.bridge[word]), "answer": int(hops.answer[word])}, f"w{word}",
            "fit" if place[word] < 2 else "test",
        ))  # fmt: skip
    return examples


def _repeated_examples(draw: torch.Generator) -> list[Example]:
    """Sequences of one period cut at one length; in the partner every word is another one."""
    examples = []
    for number in range(PROMPTS):
        tokens = data.repeated(1, data.PERIOD, draw)[0, : data.CUT]
        partner = tokens
        while (partner == tokens).any():
            partner = data.repeated(1, data.PERIOD, draw)[0, : data.CUT]
        examples.append(Example(
            _ints(tokens), int(tokens[data.CUT - data.PERIOD]), _ints(partner),
            int(partner[data.CUT - data.PERIOD]), {}, f"sequence {number}", "fit" if number < PROMPTS // 2 else "test",
        ))  # fmt: skip
    return examples


def _ints(tokens: Tensor) -> tuple[int, ...]:
    return tuple(int(token) for token in tokens)
