"""The command line, called as a user would."""

from __future__ import annotations

import ast
import json
import shlex
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest

from analyses.base import Analysis
from analyses.cli import main
from analyses.cli.commands import COMMANDS
from analyses.cli.console import ConsoleProgress
from analyses.cli.outline import _Names, options_of
from analyses.options import types_of
from analyses.registry import SHIPPED, every_analysis, get_analysis, titles
from analyses.results.result import Result
from analyses.running.reproduce import command, python
from probes.models import BACKENDS
from probes.points import POINTS
from probes.store import ActivationStore

IDS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps({"tokens": ids}) + "\n" for ids in IDS))
    return path


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATHYSCOPE_STORE", str(tmp_path / "default-store"))


def test_voids_on_token_ids_needs_no_tokenizer(
    llama_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["run", "voids", "--model", str(llama_folder), "--prompts", str(prompts), "--out", str(tmp_path / "run")]
    assert main([*args, "--alpha", "0.8,0.2", "--alpha", "0.5", "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr()
    assert f"report: {tmp_path / 'run' / 'report.html'}" in said.out
    assert "3 of 3 prompts to run" in said.err
    activity = pd.read_parquet(tmp_path / "run" / "tables" / "activity.parquet")
    assert activity["alpha"].drop_duplicates().tolist() == [0.8, 0.2, 0.5]
    assert activity["token"].iloc[0] == "<5>"
    assert len(pd.read_parquet(tmp_path / "run" / "tables" / "readout.parquet"))
    assert main(args) == 0
    assert "no forward pass" in capsys.readouterr().err


def test_texts_stand_for_a_file_and_are_in_the_command_that_makes_the_run_again(
    word_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    texts = ["--text", "w5 w6 w7", "--text", "w8 w9"]
    args = ["run", "logit_lens", "--model", str(word_folder), *texts, "--out", str(out)]
    assert main([*args, "--json", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    answer = json.loads(said.out)
    assert answer["folder"] == str(out)
    assert answer["counts"]["prompts"] == 2
    assert answer["tables"]["top"] == len(pd.read_parquet(out / "tables" / "top.parquet"))
    assert shlex.join(texts) in command(Result.load(out), "again")
    assert "['w5 w6 w7', 'w8 w9']" in python(Result.load(out), "again")


def test_texts_and_a_file_are_not_both_given(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "logit_lens", "--model", "x", "--text", "a", "--prompts", str(prompts)]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_every_step_has_a_line_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for every_step, n_lines in ((False, 4), (True, 8)):
        progress = ConsoleProgress("2 of 9", every_step)
        progress.start(8, "skip")
        for _ in range(8):
            progress.advance()
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == n_lines
        assert lines[-1] == "2 of 9 · skip: 8 of 8"


def test_a_benchmark_gets_its_own_flags_and_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "bench_echo.py"
    (tmp_path / "echo_place.py").write_text(f"SAID = {str(tmp_path / 'said')!r}")
    script.write_text(
        "import sys, pathlib, echo_place; pathlib.Path(echo_place.SAID).write_text(' '.join(sys.argv[1:]))"
    )
    monkeypatch.setattr("analyses.cli.bench.benchmarks", lambda: {"echo": script})
    assert main(["bench", "echo", "--rounds", "3", "--quick", "DIR"]) == 0
    assert (tmp_path / "said").read_text() == "--rounds 3 --quick DIR"


def test_lists_are_objects_for_programs(
    llama_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "ls", "--json"]) == 0
    models = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert models[0]["ref"] == "smollm2-135m"
    assert main(["capture", "--model", str(llama_folder), "--prompts", str(prompts), "--points", "embed"]) == 0
    capsys.readouterr()
    assert main(["store", "ls", "--json"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["model"], row["backend"]) == (str(llama_folder), "native")


def test_truth_values_are_flags(llama_folder: Path, prompts: Path, tmp_path: Path) -> None:
    base = ["run", "voids", "--model", str(llama_folder), "--prompts", str(prompts), "--mode", "measure"]
    counts = {}
    for flag in ("--first-token", "--no-first-token"):
        assert main([*base, flag, "--out", str(tmp_path / flag)]) == 0
        counts[flag] = pd.read_parquet(tmp_path / flag / "tables" / "usage.parquet")["n_tokens"].iloc[0]
    assert counts == {"--first-token": 9, "--no-first-token": 6}


def test_a_dry_run_prints_the_cost_and_runs_nothing(
    llama_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        "run",
        "logit_lens",
        "--model",
        str(llama_folder),
        "--prompts",
        str(prompts),
        "--dry-run",
        "--out",
        str(tmp_path / "x"),
    ]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "forwards           3 prompts, 9 tokens" in out
    assert "rows to capture    27 (3.4 KiB)" in out
    assert "already held       0" in out
    assert not (tmp_path / "x").exists()
    assert ActivationStore().bytes_held() == 0


def test_weights_alone_need_no_prompts(llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "run",
        "communication_channels",
        "--model",
        str(llama_folder),
        "--out",
        str(tmp_path / "c"),
        "--task",
        "none",
    ]
    assert main([*args, "--dry-run"]) == 0
    assert "forwards           0 prompts, 0 tokens" in capsys.readouterr().out
    assert main(args) == 0
    scores = pd.read_parquet(tmp_path / "c" / "tables" / "composition.parquet")
    contract = ["kind", "source_layer", "source_head", "target_layer", "target_head", "score"]
    assert set(contract) <= set(scores.columns)
    assert (scores["source_layer"] < scores["target_layer"]).all()


def test_capture_fills_the_store_ahead(
    llama_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["capture", "--model", str(llama_folder), "--prompts", str(prompts), "--points", "resid_pre.0,resid_post.*"]
    assert main(args) == 0
    assert "3 forward passes, 36 rows" in capsys.readouterr().out
    assert main([*args, "--dry-run"]) == 0
    assert "forwards           0 prompts" in capsys.readouterr().out
    assert main([*args, "--reduce", "norm"]) == 0
    assert "0 forward passes" in capsys.readouterr().out
    run = ["run", "voids", "--model", str(llama_folder), "--prompts", str(prompts), "--out", str(tmp_path / "r")]
    assert main(run) == 0
    assert "no forward pass" in capsys.readouterr().err


def test_check_prints_the_identities(llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(llama_folder)]) == 0
    out = capsys.readouterr().out
    for backend in BACKENDS:
        assert f"LlamaForCausalLM · 3 layers · {backend} · float32" in out
    assert out.count("holds   resid_pre[l+1] == resid_post[l]") == len(BACKENDS)
    lines = {line.split()[0]: line.split()[1:] for line in out.partition("points by backend")[2].splitlines()[1:]}
    assert lines.pop("point") == list(BACKENDS)
    assert list(lines) == list(POINTS)
    assert all(cells[0] == "read" and all(float(cell) < 1e-5 for cell in cells[1:]) for cells in lines.values())


def test_check_says_what_a_backend_lacks(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nnsight", None)
    assert main(["check", str(llama_folder)]) == 0
    out = capsys.readouterr().out
    assert "nnsight · refused: backend 'nnsight' needs a package that is missing" in out
    assert "pip install 'bathyscope[nnsight]'" in out
    assert "transformer_lens · float32" in out


@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_an_analysis_runs_on_every_backend_with_its_stamp(
    backend: str, llama_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["run", "voids", "--model", str(llama_folder), "--prompts", str(prompts), "--max-new-tokens", "2"]
    for name in ("native", backend):
        assert main([*args, "--backend", name, "--out", str(tmp_path / name)]) == 0
    assert "no forward pass" not in capsys.readouterr().err, "rows of one backend are not those of another"
    tables = [pd.read_parquet(tmp_path / name / "tables" / "activity.parquet") for name in ("native", backend)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-4, atol=1e-5)
    said = json.loads((tmp_path / backend / "result.json").read_text())["provenance"]
    assert said["backend"] == backend
    assert said["faithfulness"]["holds"]
    assert said["faithfulness"]["identities"]


def test_store_commands(llama_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["capture", "--model", str(llama_folder), "--prompts", str(prompts), "--points", "resid_post.1"])
    capsys.readouterr()
    assert main(["store", "ls"]) == 0
    assert "native" in capsys.readouterr().out
    assert main(["store", "verify"]) == 0
    assert "0 damaged" in capsys.readouterr().out
    assert main(["store", "rebuild"]) == 0
    assert "catalogue rebuilt from 2 shards\n" in capsys.readouterr().out
    assert main(["store", "export", str(tmp_path / "out"), "--format", "parquet"]) == 0
    assert list((tmp_path / "out").rglob("*.parquet"))
    shard = next((tmp_path / "default-store" / "shards").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    assert main(["store", "verify"]) == 0
    assert f"damaged, set aside: {shard.stem}" in capsys.readouterr().out
    assert main(["store", "gc", "--max-bytes", "1GB"]) == 0
    assert "removed 0 shards least recently used, 1 damaged shard and 0 leftover files" in capsys.readouterr().out


def test_the_store_names_the_models_and_their_keys_do_not(
    llama_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    args = ["--prompts", str(prompts), "--points", "resid_post.1"]
    assert main(["capture", "--model", str(llama_folder), *args]) == 0
    llama_folder.rename(moved)
    capsys.readouterr()
    assert main(["capture", "--model", str(moved), *args]) == 0
    assert capsys.readouterr().out.startswith("0 forward passes")
    assert main(["store", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["model", "weights"]
    assert lines[2].startswith(f"{llama_folder}, {moved}  ")
    assert len(lines) == 3
    names = tmp_path / "default-store" / "names.jsonl"
    names.write_bytes(b'\xff[\n["torn\n' + names.read_bytes()[:20])
    assert main(["store", "ls"]) == 0
    assert "(no name)" in capsys.readouterr().out


def test_a_collection_is_a_summary_and_names_shards_when_asked(
    llama_folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for flags in ([], ["--verbose"]):
        main(["capture", "--model", str(llama_folder), "--prompts", str(prompts), "--points", "resid_post.1"])
        capsys.readouterr()
        assert main(["store", "gc", "--max-bytes", "1B", *flags]) == 0
        said.append(capsys.readouterr().out.splitlines())
    assert len(said[0]) == 2
    assert said[0][0].startswith("removed 2 shards least recently used, 0 damaged shards and 0 leftover files: ")
    assert all(line.startswith("evicted: ") for line in said[1][:2])
    assert said[1][2:] == said[0]


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bathyscope {version('bathyscope')}\n"


def test_no_command_is_answered_with_help_in_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) > 10


def test_models_commands(llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "ls"]) == 0
    out = capsys.readouterr().out
    assert "smollm2-135m" in out
    assert "gemma3-270m" in out
    assert "ModelInfo" not in out
    head, first, *_ = out.splitlines()
    assert [first[head.index(name) :].split()[0] for name in ("model", "size", "from")] == [
        "smollm2-135m",
        "30",
        "bundled",
    ]
    assert main(["models", "info", str(llama_folder)]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["n_layers"] == "3"
    assert facts["path"] == str(llama_folder)


@pytest.mark.parametrize("name", SHIPPED)
def test_an_outline_has_the_options_of_its_analysis(name: str) -> None:
    outline, analysis = options_of(name), get_analysis(name)
    assert outline is not analysis, "the analysis spells an option in a way that its source alone does not tell"
    assert (outline.name, outline.title) == (name, analysis.title)
    assert types_of(outline) == types_of(analysis)
    assert outline().makes_prompts == analysis().makes_prompts
    for one, other in zip(fields(outline), fields(analysis), strict=True):
        assert (one.name, one.default, one.metadata) == (other.name, other.default, other.metadata)


@pytest.mark.parametrize("body", ["(made()):\n  pass", ":\n  top: int = 3", ":\n  top: Kind = option(3, '')"])
def test_an_analysis_whose_options_its_source_does_not_spell_is_imported(
    body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = _Names(ast.parse(f"from analyses.options import option\n@dataclass\nclass LogitLens{body}"))
    monkeypatch.setattr("analyses.cli.outline._source", lambda _: names)
    assert options_of("logit_lens") is get_analysis("logit_lens")


def test_lists_say_what_the_commands_say_of_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert titles() == {analysis.name: analysis.title for analysis in every_analysis()}
    for name, (_, line) in COMMANDS.items():
        assert main([name, "--help"]) == 0
        assert line.rstrip(".") in " ".join(capsys.readouterr().out.split())


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "voids", "--help"]) == 0
    out = capsys.readouterr().out
    for flag in ("--alpha", "--mode", "--max-new-tokens", "--backend", "--dtype", "--dry-run"):
        assert flag in out


@pytest.mark.parametrize("analysis", every_analysis(), ids=lambda analysis: analysis.name)
def test_help_says_what_a_prompt_line_may_carry(analysis: type[Analysis], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", analysis.name, "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "A prompt line carries its text or its tokens" in words
    for name, field in analysis.prompt_fields.items():
        assert f"{name} {field.help}" in words
        assert field(object()) is not None


def test_an_interruption_is_said_in_a_line(
    llama_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("analyses.voids.analysis.capture", interrupted)
    assert main(["run", "voids", "--model", str(llama_folder), "--prompts", str(prompts)]) == 130
    err = capsys.readouterr().err
    assert "what was committed stays" in err
    assert "Traceback" not in err


def test_a_fault_of_ours_exits_with_one(
    llama_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("analyses.voids.analysis.capture", broken)
    assert main(["run", "voids", "--model", str(llama_folder), "--prompts", str(prompts)]) == 1
    assert "fault of Bathyscope" in capsys.readouterr().err
