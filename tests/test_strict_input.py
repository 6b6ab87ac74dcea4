"""Input read strictly: one reader of JSON, one of paths, one check of sizes; each refuses in a line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.errors import SHOWN, ModelError, PointError, PromptError, shown, unknown
from probes.input_files import kind_of, make_folder, read_text
from probes.models.sources.config_sizes import check_sizes
from probes.points import expand
from probes.prompts import read_prompts
from probes.strict_json import MAX_DEPTH, JsonFault, parse

DEEP = "[" * 100_000 + "]" * 100_000
SOUND = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(), part, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(SOUND)
def test_sound_json_is_read_as_the_standard_library_does(value: object) -> None:
    text = json.dumps(value)
    assert parse(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEEP, "deep"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "deep"),
        ("9" * 5000, "does not fit 64 bits"),
        (f"[{2**63}]", "does not fit 64 bits"),
        ("NaN", "no finite number"),
        ("[Infinity]", "no finite number"),
        ("1e999", "no finite number"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('"\\ud800"', "lone surrogate"),
        ('{"\\udfff": 1}', "lone surrogate"),
        ("{", "not JSON"),
        ("", "not JSON"),
    ],
    ids=range(12),
)
def test_what_two_readers_could_take_for_different_things(text: str, said: str) -> None:
    with pytest.raises(JsonFault, match=said) as error:
        parse(text)
    assert len(str(error.value)) < 3 * SHOWN


def test_a_nest_as_deep_as_is_legal() -> None:
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None


@pytest.mark.parametrize("text", ["x" * 10_000, 10**5000, [10**5000], ["y" * 999] * 99], ids=range(4))
def test_a_long_value_is_quoted_in_short(text: object) -> None:
    assert len(shown(text)) < 2 * SHOWN
    assert len(unknown("name", text if isinstance(text, str) else shown(text), ["a", "b"])) < 3 * SHOWN


@pytest.mark.parametrize(
    "name",
    ["n" * 5000, "a\0b", "folder", "pipe", "loop", "dangling", "device", "latin", "unreadable"],
    ids=range(9),
)
def test_what_stands_at_a_path_is_said(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "unreadable").symlink_to("/proc/self/mem")
    with pytest.raises(PromptError, match="prompt file"):
        read_prompts(f"{tmp_path}/{name}")
    with pytest.raises(ModelError, match="text"):
        read_text(f"{tmp_path}/{name}", "text", ModelError)
    assert kind_of(tmp_path / "folder") == "folder"


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"tokens": [1]}\r\n{"tokens": [2]}\r\n')
    assert [line.tokens for line in read_prompts(tmp_path / "p.jsonl")] == [(1,), (2,)]


@pytest.mark.parametrize("place", ["file/below", "x" * 300, "a\0b", "null"], ids=range(4))
def test_a_folder_that_cannot_be_made(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PromptError, match="cannot be made"):
        make_folder(Path("/dev/null/x") if "null" in place else tmp_path / place, "folder", PromptError)


@pytest.mark.parametrize(
    "pattern", ["z.0-999999999", "z.0-99999999999999", "z." + "9" * 5000, "z.-1", "z.1-0", "x" * 5000]
)
def test_layers_past_the_last_are_refused_before_they_are_counted_out(pattern: str) -> None:
    with pytest.raises(PointError) as error:
        expand(pattern, 3)
    assert len(str(error.value)) < 6 * SHOWN


SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
SHAPES = {"embed": (32, 16), "0.up": (24, 16), "1.up": (24, 16)}


def test_sizes_that_fit_are_let_through() -> None:
    check_sizes(SIZES, SHAPES, "config.json")
    check_sizes({"text_config": SIZES, "n_inner": None, "intermediate_size": [24, 24]}, SHAPES, "config.json")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, 10**9, 10**30, 1.5, "64", None, True, float("nan"), [], {}, [0]])
def test_no_size_is_believed_that_its_tensors_cannot_have(name: str, value: object) -> None:
    if value is None and name == "num_key_value_heads":
        check_sizes({**SIZES, name: value}, SHAPES, "config.json")
        return
    for config in ({**SIZES, name: value}, {"text_config": {**SIZES, name: value}}):
        with pytest.raises(ModelError, match=f"config.json: {name} is .*legal are whole numbers from 1 to"):
            check_sizes(config, SHAPES, "config.json")


@pytest.mark.parametrize("change", [{"num_attention_heads": 3}, {"num_key_value_heads": 3}])
def test_heads_that_do_not_divide(change: dict[str, int]) -> None:
    with pytest.raises(ModelError, match="do not divide"):
        check_sizes({**SIZES, **change}, SHAPES, "config.json")
