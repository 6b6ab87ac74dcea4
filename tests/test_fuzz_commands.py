"""Thousands of command lines with something wrong: each runs or is refused in one line, and none is a fault.

`BATHYSCOPE_FUZZ=20 python -m pytest tests/test_fuzz_commands.py` draws 4,000, other ones each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from malformed import HOSTILE, cases
from study_makers import BASE, model_folder, prompt_file
from tiny import native

from analyses.cli import main
from analyses.options import types_of
from analyses.registry import every_analysis
from probes.errors import ModelError

TEXTS = [text for text in HOSTILE if isinstance(text, str) and "\0" not in text] + [
    "-1", "1", "9" * 25, "9" * 5000, "1e999", "nan", "-inf", "1.5", "true", "a,b", "1,2", "１", "0x10", "\udcff", "a" * 300 + "/b", "/dev/null",
    "-", "--", "--help", "--x", "[", "*", "resid_post.*", "resid_post.99", "~0", "zero:0", "planted:A1@0", "planted:", "@", "file://x", "a=b",
]  # fmt: skip
"""Words in place of a flag, a value or an argument."""
SHARED = [
    "--model",
    "--prompts",
    "--out",
    "--store",
    "--text",
    "--device",
    "--dtype",
    "--attention",
    "--device-map",
    "--max-memory",
    "--revision",
    "--backend",
]
SWITCHES = ["--dry-run", "--json", "--quiet", "--verbose", "--streamed", "--remote", "--no-chat", "--chat"]
COMMANDS = [
    "run voids --model MODEL --prompts GOOD --store STORE --out OUT --alpha 0.5",
    "run logit_lens --model MODEL --prompts GOOD --store STORE --out OUT --top-k 2",
    "capture --model MODEL --prompts GOOD --store STORE --points resid_post.* --reduce norm",
    "capture --model MODEL --prompts GOOD --store STORE --points attn_out.0,z.1 --reduce last --dry-run",
    "check MODEL --backend native",
    "report RUN RUN --out PAGE --title t",
    "batch STUDY --dry-run --store STORE",
    "store ls --store STORE --json",
    "store verify --store STORE",
    "store rebuild --store STORE",
    "store gc --store STORE --max-bytes 1GB --verbose",
    "store export DEST --store STORE --format npz --features resid_post.*",
    "store import datasets ROWS --of x --store STORE --tokens GOOD",
    "store import vllm ROWS --of x --store STORE --layers 1,2",
    "models info MODEL",
    "models ls --json",
    "lens fit --kind jacobian --model MODEL --prompts GOOD --store STORE --out LENS --layers 0 --texts 1 --dry-run",
    "lens show LENS",
    "lens check LENS --model MODEL --prompts GOOD --texts 1 --store STORE",
]  # fmt: skip
"""Command lines in order, as words; capitals stand for paths of the test."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The paths that stand for the capitals of `COMMANDS`, with a model, a prompt file, a study and a saved run."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "good.jsonl").write_text('{"tokens": [5, 6, 7], "answer_tokens": [8], "targets": {"en": [4]}}\n')
    prompt_file(folder / "ids.jsonl")
    (folder / "study.toml").write_text(
        f'title = "t"\n{BASE}[[analyses]]\nanalysis = "voids"\noptions.alpha = 0.5\n'.replace(
            "ids.jsonl", str(folder / "ids.jsonl")
        )
    )
    model_folder(folder / "model")
    names = ["store", "out", "run", "page.html", "dest", "rows", "lens"]
    paths = {name.partition(".")[0].upper(): str(folder / name) for name in names}
    return paths | {
        "MODEL": str(folder / "model"), "GOOD": str(folder / "good.jsonl"), "STUDY": str(folder / "study.toml"),
    }  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def surroundings(places: Mapping[str, str]) -> Iterator[None]:
    """Nothing is fetched, nothing is timed, and what is written by default goes to the test's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATHYSCOPE_CACHE", f"{places['STORE']}-cache")
        patch.setattr("probes.capture.dry_run.PROBE_SECONDS", 0.0)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        # What needs no model is in order, or refused, before a model is asked for.
        patch.setattr("probes.models.load.load_model", loaded)
        patch.chdir(Path(places["STORE"]).parent)
        assert (
            main(["run", "voids", "--model", places["MODEL"], "--prompts", places["GOOD"], "--out", places["RUN"]]) == 0
        )
        yield


def loaded(ref: str, **_: Any) -> Any:
    if not Path(ref).is_dir():
        raise ModelError(f"no model {ref!r}")
    return native()


def check(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command: it does its work, or says in one line of its own why not."""
    code = main(words)
    said = capsys.readouterr()
    assert code in (0, 2), said.err
    assert code == 0 or said.err.count("error: ") >= 1 or "Usage: " in said.err, said.err


@cases(100)
@given(analysis=st.sampled_from(every_analysis()), data=st.data())
def test_options_of_analyses(places: Mapping[str, str], capsys, analysis: Any, data: st.DataObject) -> None:
    flags = [f"--{name.replace('_', '-')}" for name in types_of(analysis)] + SHARED
    chosen = data.draw(st.dictionaries(st.sampled_from(flags), st.sampled_from(TEXTS), min_size=1, max_size=2))
    args = {"--model": places["MODEL"], "--prompts": places["GOOD"], "--store": places["STORE"], **chosen}
    check(["run", analysis.name, "--dry-run", *(part for pair in args.items() for part in pair)], capsys)


@cases(100)
@given(st.data())
def test_commands_with_words_changed(places: Mapping[str, str], capsys, data: st.DataObject) -> None:
    words = [places.get(word, word) for word in data.draw(st.sampled_from(COMMANDS)).split()]
    for _ in range(data.draw(st.integers(1, 3))):
        # Without it a study starts processes.
        at = data.draw(st.sampled_from([i for i in range(1, len(words)) if words[i] != "--dry-run"]))
        kind = data.draw(st.sampled_from(["change", "drop", "double", "insert", "switch", "cut", "swap"]))
        if kind == "change":
            words[at] = data.draw(st.sampled_from([*TEXTS, *places.values()]))
        elif kind == "drop" and len(words) > 2:
            del words[at]
        elif kind == "double":
            words.insert(at, words[at])
        elif kind == "insert":
            words.insert(at, data.draw(st.sampled_from([*TEXTS, *SHARED])))
        elif kind == "switch":
            words.append(data.draw(st.sampled_from(SWITCHES)))
        elif kind == "cut":
            words[at] = words[at][: len(words[at]) // 2]
        elif words[-1] != "--dry-run":
            words[at], words[-1] = words[-1], words[at]
    check(words, capsys)


def test_bytes_that_are_no_text_are_shown_by_their_numbers(places: Mapping[str, str], capsys) -> None:
    out = f"{places['OUT']}-\udcff"
    words = ["run", "voids", "--model", places["MODEL"], "--prompts", places["GOOD"], "--out", out]
    check([*words, "--store", places["STORE"]], capsys)
    with pytest.MonkeyPatch.context() as patch:
        written: list[str] = []
        patch.setattr("sys.stdout.write", lambda text: written.append(text.encode().decode()))
        main([*words, "--store", places["STORE"]])
    assert any("\\udcff/report.html" in line for line in written)
