"""Thousands of malformed inputs: each is used or refused in the project's own words, and none is a fault."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from checkpoints import llama_folder, llama_gguf
from families import make
from hypothesis import given
from hypothesis import strategies as st
from malformed import cases, damaged, refusing, values
from study_makers import BASE, model_folder, prompt_file
from tiny import native

from analyses.base import as_prompts
from analyses.options import types_of
from analyses.registry import every_analysis
from analyses.studies import expand, read_study
from probes.models import load_model
from probes.models.sources.gguf import check_gguf
from probes.models.sources.model_folder import check_folder, read_config
from probes.points import expand as expand_points
from probes.prompts import check_fields, read_prompts, tokenize
from probes.strict_json import JsonFault, check_tree

SHARED = pytest.mark.filterwarnings("ignore")
LINE = b'{"tokens": [5, 6, 7], "answer_tokens": [8], "group": "a"}\n{"text": "caf\xc3\xa9", "label": 1}\n'
analyses = st.sampled_from(every_analysis())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("malformed")


@cases(300)
@given(damaged(LINE))
def test_prompt_files_with_damage(place: Path, data: bytes) -> None:
    (place / "p.jsonl").write_bytes(data)
    with refusing:
        tokenize(read_prompts(place / "p.jsonl"), native())


@cases(250)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["tokens", "text", "label", "x"]), values, max_size=3) | values, max_size=3
    )
)
def test_prompt_lines_of_any_values(place: Path, lines: list[Any]) -> None:
    try:
        text = "\n".join(json.dumps(line) for line in lines)
    except ValueError:  # a key that is no text
        return
    (place / "p.jsonl").write_text(text)
    with refusing:
        read = read_prompts(place / "p.jsonl")
        for line in read:
            assert (line.text is None) != (line.tokens is None)
        tokenize([line for line in read if line.tokens is not None], native())


@cases(120)
@given(analyses, st.data())
def test_fields_of_any_values(analysis: Any, data: st.DataObject) -> None:
    names = sorted(analysis.prompt_fields) or ["x"]
    fields = data.draw(st.dictionaries(st.sampled_from(names), values, max_size=3))
    with refusing:
        check_fields(fields, "line 1", analysis.prompt_fields)
        prompt = tokenize([(5, 6, 7)], native())[0]
        as_prompts([dataclasses.replace(prompt, fields=fields)], native(), analysis.prompt_fields)


@cases(300)
@given(analyses, st.data())
def test_options_of_any_values(analysis: Any, data: st.DataObject) -> None:
    names = st.sampled_from(list(types_of(analysis)))
    options = data.draw(
        st.dictionaries(names, values.map(lambda v: tuple(v) if isinstance(v, list) else v), max_size=2)
    )
    with refusing:
        analysis(**options)


@cases(150)
@given(st.text(max_size=12) | st.from_regex(r"[a-z_]{1,10}\.(\*|\d{1,40}|\d{1,20}-\d{1,20})", fullmatch=True))
def test_points_of_any_form(pattern: str) -> None:
    with refusing:
        expand_points(pattern, 3)


@cases(200)
@given(values)
def test_nothing_breaks_the_walk_of_a_tree(value: Any) -> None:
    with suppress(JsonFault):
        check_tree(value)


@SHARED
@cases(90)
@given(family=st.sampled_from(["llama", "gpt2"]), data=st.data())
def test_configurations_of_any_values(place: Path, family: str, data: st.DataObject) -> None:
    folder = place / family
    if not folder.exists():
        make(family).save_pretrained(folder)
        (folder / "whole.json").write_bytes((folder / "config.json").read_bytes())
    config = json.loads((folder / "whole.json").read_text())
    change = data.draw(st.dictionaries(st.sampled_from(sorted(config)), values, min_size=1, max_size=2))
    try:
        (folder / "config.json").write_text(json.dumps({**config, **change}))
    except ValueError:
        return
    with refusing:
        load_model(str(folder), device="cpu")


@cases(150)
@given(st.data())
def test_model_folders_with_damage(place: Path, data: st.DataObject) -> None:
    folder = place / "damaged"
    if not folder.exists():
        llama_folder(folder)
        for name in ("config.json", "model.safetensors"):
            (place / f"whole-{name}").write_bytes((folder / name).read_bytes())
        (place / "whole-model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model.safetensors"}})
        )
    name = data.draw(st.sampled_from(["config.json", "model.safetensors", "model.safetensors.index.json"]))
    for whole in ("config.json", "model.safetensors"):
        (folder / whole).write_bytes((place / f"whole-{whole}").read_bytes())
    if name.endswith("index.json"):
        (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / name).write_bytes(data.draw(damaged((place / f"whole-{name}").read_bytes()[:3000])))
    with refusing:
        check_folder(folder)
        read_config(folder)


@cases(200)
@given(st.data())
def test_gguf_files_with_damage(place: Path, data: st.DataObject) -> None:
    if not (place / "whole.gguf").exists():
        llama_gguf(place / "whole.gguf")
    whole = (place / "whole.gguf").read_bytes()
    head = whole.rindex(b"weight") + 64
    (place / "x.gguf").write_bytes(data.draw(damaged(whole[:head])) + whole[head:])
    with refusing:
        check_gguf(place / "x.gguf")


STUDY = (
    'title = "t"\nseeds = [0, 1]\n'
    + BASE
    + '[[analyses]]\nanalysis = "voids"\noptions.alpha = 0.5\nvary.mode = ["skip"]\n'
    '[[overrides]]\nanalysis = "voids"\noptions.seed = 3\n'
)
TOML = [
    "1" * 5000,
    "-1",
    "nan",
    "[" * 3000,
    "{}",
    "true",
    "1979-05-27",
    '"\\u0000"',
    '"x"',
    "[]",
    "[[]]",
    "2" * 25,
    '"../.."',
    "9999-99-99",
]


@cases(150)
@given(st.data())
def test_study_files_with_damage(place: Path, data: st.DataObject) -> None:
    if not (place / "model").exists():
        model_folder(place / "model")
        prompt_file(place / "ids.jsonl")
    text = STUDY
    if data.draw(st.booleans()):
        line = data.draw(st.sampled_from([line for line in text.split("\n") if "=" in line]))
        text = text.replace(line, f"{line.partition('=')[0]} = {data.draw(st.sampled_from(TOML))}", 1)
    else:
        text = data.draw(damaged(text.encode())).decode("utf-8", "replace")
    (place / "study.toml").write_text(text)
    with refusing:
        expand(read_study(place / "study.toml"))
