"""The parts of the dashboard that need no browser: selection, prompts, saved runs, jobs, and how a run is made again."""

from __future__ import annotations

import json
import shlex
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
from tiny import PROMPTS

from analyses import rebuild
from analyses.cli import main
from analyses.logit_lens import LogitLens
from analyses.registry import ANALYSES
from analyses.result import Result
from analyses.voids import Voids
from app import catalogue, places, prompt_sets, saved
from app.jobs import worker
from app.jobs.progress import Cancelled, JobProgress
from app.jobs.protocol import Request, Status, ask_to_cancel, read_status, write_request
from app.selection import Selection, named_by, narrowed, params_of, parse
from app.ui.figures import clicked_layers, data_of, drawn, mark
from probes.errors import OptionError, PromptError
from probes.models.native import NativeModel
from probes.store import ActivationStore


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATHYSCOPE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BATHYSCOPE_STORE", str(tmp_path / "store"))


@pytest.fixture
def result(tiny: NativeModel, store: ActivationStore) -> Result:
    return LogitLens().run(tiny, PROMPTS, store=store)


def test_the_catalogue_names_what_is_registered_without_importing_it() -> None:
    assert catalogue.names() == tuple(analysis.name for analysis in ANALYSES)


# Selection


def test_an_address_and_a_selection_say_the_same() -> None:
    selection = Selection((0, 7), (2,), (1, 3), ("8.0", "21.4"))
    assert parse(params_of(selection)) == selection
    assert parse({"layers": "3,x,-1,../2,99999999999", "heads": "8,a.b,1.2"}) == Selection((3,), heads=("1.2",))
    assert not Selection()


def test_rows_are_kept_by_every_column_that_can_tell() -> None:
    pairs = pd.DataFrame(
        {"source_layer": [0, 0, 1], "source_head": [1, 2, 1], "target_layer": [2, 1, 2], "target_head": [0, 0, 3]}
    )
    assert narrowed(pairs, Selection(layers=(1,))).index.tolist() == [1, 2]
    assert narrowed(pairs, Selection(heads=("0.1",))).index.tolist() == [0]
    assert narrowed(pairs, Selection(heads=("2.3",))).index.tolist() == [2]
    assert narrowed(pairs, Selection(prompts=(5,), tokens=(9,))).equals(pairs)
    tokens = pd.DataFrame({"prompt": [0, 0, 1], "position": [0, 1, 1], "layer": [0, 0, 1]})
    assert narrowed(tokens, Selection(prompts=(0,), tokens=(1,))).index.tolist() == [1]
    assert narrowed(tokens, Selection(layers=(4,))).empty
    names = pd.DataFrame({"position": ["t1", "t2"]})
    assert narrowed(names, Selection(tokens=(1,))).equals(names)


def test_chosen_rows_name_what_they_are_about() -> None:
    rows = pd.DataFrame({"prompt": [2, 2], "position": [0, 5], "layer": [3, 1], "head": [0, 7]})
    assert named_by(rows) == {"layers": [1, 3], "prompts": [2], "tokens": [0, 5], "heads": ["3.0", "1.7"]}
    assert named_by(pd.DataFrame({"accuracy": [0.5]})) == {}


# Figures that follow


def test_layers_are_marked_on_every_depth_axis(result: Result) -> None:
    figure, said = drawn(result, "convergence", Selection(layers=(1,)), "red")
    ends = {(shape.yref, shape.y0, shape.y1, shape.x0, shape.x1) for shape in figure.layout.shapes}
    assert ends == {("y", 0.5, 1.5, 0, 1), ("y2", 0.5, 1.5, 0, 1)}
    assert said == "Marked: layers 1."
    untouched = go.Figure().add_bar(x=["a"], y=[1]).update_xaxes(title="share of layers")
    assert not mark(untouched, (1,), "red", lambda title: "depth" in title)


def test_prompts_are_drawn_alone_where_tables_tell_them_apart(result: Result) -> None:
    whole, _ = drawn(result, "lens", Selection(), "red")
    one, said = drawn(result, "lens", Selection(prompts=(2,)), "red")
    assert len(whole.data) == len(PROMPTS)
    assert len(one.data) == 1
    assert len(one.data[0].x) == len(PROMPTS[2])
    assert "prompts 2" in said
    _, said = drawn(result, "lens", Selection(heads=("0.0",)), "red")
    assert "shows everything" in said


def test_a_click_names_a_layer_only_on_a_depth_axis(result: Result) -> None:
    figure = result.figure("convergence")
    assert clicked_layers(figure, [{"x": 0.3, "y": 2}, {"x": 0.1, "y": 0}]) == (0, 2)
    assert clicked_layers(figure, []) == ()
    assert clicked_layers(go.Figure().update_yaxes(title="accuracy"), [{"x": 1, "y": 2}]) is None


def test_the_numbers_of_a_figure_are_those_it_shows(result: Result) -> None:
    numbers = data_of(result.figure("convergence"))
    mean = result.tables["read"].groupby("layer")["entropy_bits"].mean()
    mine = numbers[numbers["trace"] == "entropy (bits)"]
    assert pd.to_numeric(mine["x"]).tolist() == pytest.approx(mean.tolist())
    cells = data_of(drawn(result, "lens", Selection(prompts=(0,)), "red")[0])
    assert len(cells) == 3 * len(PROMPTS[0])
    bars = go.Figure().add_bar(x=[1.0], y=[4], error_x={"array": [0.5], "arrayminus": [0.25]})
    assert data_of(bars)[["low", "high"]].to_numpy().tolist() == [[0.75, 1.5]]


# Prompts


def test_typed_lines_are_texts_or_objects() -> None:
    made = prompt_sets.typed('one "quoted"\n\n  {"tokens": [5, 6]}\n', {})
    assert [json.loads(line) for line in made.text.splitlines()] == [{"text": 'one "quoted"'}, {"tokens": [5, 6]}]
    path = made.save()
    assert path == made.save()
    assert path.parent == places.prompts_root()
    assert prompt_sets.check(path.read_text(), "again", {}).count == 2


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("p.jsonl", b'{"text": "a"}\n{"text": ', r"^p\.jsonl:2: not JSON"),
        ("../../../etc/p.jsonl", b"[1]\n", r"^p\.jsonl:1: "),
        ("C:\\x\\p.jsonl", b"[1]\n", r"^p\.jsonl:1: "),
        ("p.jsonl", b'{"text": "a"}\n' * 100_000, r"^p\.jsonl:10001: 100,000 lines"),
        ("p.jsonl", b"\xff\xfe", "not UTF-8"),
        ("p.jsonl", b"", "holds no prompt"),
        ("p.jsonl", b'{"text": "a", "answer": 5}\n', r"^p\.jsonl:1: field 'answer'"),
        ("p.jsonl", b"x" * 20_000_001, "20,000,001 bytes"),
    ],
)
def test_uploads_are_refused_with_their_line(name: str, data: bytes, said: str) -> None:
    with pytest.raises(PromptError, match=said):
        prompt_sets.uploaded(name, data, Voids.prompt_fields)


def test_the_shipped_sets_can_be_read() -> None:
    sets = prompt_sets.shipped()
    assert "demo" in sets
    for name, path in sets.items():
        assert prompt_sets.check(path.read_text(), name, {}).count


# Saved runs


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc", "a/b", "a\\b", ".hidden", "x" * 200, "a.", "a\n", "-flag"]
)
def test_run_names_stay_in_their_folder(name: str) -> None:
    with pytest.raises(OptionError, match="run name"):
        places.run_folder(name)


def test_runs_are_found_opened_and_deleted(result: Result, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    result.save(runs / "demo" / "lens")
    result.save(runs / "plain")
    (runs / "broken").mkdir()
    (runs / "broken" / "result.json").write_text("{")
    (runs / "notes").mkdir()
    found = {run.name: run for run in saved.saved_runs()}
    assert set(found) == {"demo/lens", "plain"}
    run = found["plain"]
    assert (run.analysis, run.layers, run.model) == ("logit_lens", 3, "tiny-llama")
    assert saved.open_run(run).tables.keys() == result.tables.keys()
    with pytest.raises(OptionError, match="Did you mean 'plain'"):
        saved.get_run("plian")
    saved.delete_run(run)
    assert not (runs / "plain").exists()
    assert result.save(runs / "plain")
    again = saved.get_run("plain")
    assert again.stamp != run.stamp


def test_nothing_outside_the_folder_of_runs_is_deleted(result: Result, tmp_path: Path) -> None:
    outside = result.save(tmp_path / "precious")
    result.save(tmp_path / "runs" / "inside")
    run = saved.get_run("inside")
    (tmp_path / "runs" / "link").symlink_to(outside)
    for folder in (outside, tmp_path / "runs" / "link", tmp_path / "runs" / ".." / "precious", tmp_path / "runs"):
        with pytest.raises(OptionError, match="not a run inside"):
            saved.delete_run(replace(run, folder=folder))
    assert Result.load(outside)


def test_profiles_are_read_without_the_tables(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result.save(tmp_path / "runs" / "one")
    run = saved.get_run("one")
    with monkeypatch.context() as patch:
        patch.setattr(saved, "_result", None)
        written = saved.profiles_of(run)
    assert [profile.name for profile in written] == list(result.profiles)
    for profile in written:
        pd.testing.assert_frame_equal(profile.table, result.profile(profile.name), check_dtype=False)
    (run.folder / "profiles.json").unlink()
    older = saved.profiles_of(replace(run, stamp=run.stamp + 1))
    assert [p.table.to_dict() for p in older] == [p.table.to_dict() for p in written]


# Jobs


def request(folder: Path, tmp_path: Path, **changes: object) -> Request:
    prompts = prompt_sets.typed('{"tokens": [5, 6, 7]}\n{"tokens": [8, 9]}', {}).save()
    base = Request(
        "run",
        {"model": str(folder)},
        "voids",
        {"alpha": [0.5]},
        str(prompts),
        str(tmp_path / "store"),
        str(tmp_path / "runs" / "a"),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def did(folder: Path, wanted: Request, closing: threading.Event | None = None) -> Status:
    write_request(folder, wanted)
    worker.work(folder, closing or threading.Event())
    return read_status(folder)


def test_a_job_saves_what_the_command_line_would(llama_folder: Path, tmp_path: Path) -> None:
    wanted = request(llama_folder, tmp_path)
    status = did(tmp_path / "j1", wanted)
    assert (status.state, status.answer["counts"]["forwards"]) == ("done", 2)
    assert any(line.startswith("forwards") for line in status.lines)
    flags = ["--model", str(llama_folder), "--prompts", str(wanted.prompts), "--store", str(tmp_path / "store")]
    assert main(["run", "voids", *flags, "--alpha", "0.5", "--out", str(tmp_path / "cli")]) == 0
    ours, theirs = Result.load(tmp_path / "runs" / "a"), Result.load(tmp_path / "cli")
    assert ours.options == theirs.options
    for name, table in ours.tables.items():
        pd.testing.assert_frame_equal(table, theirs.tables[name])
    assert ours.provenance["prompts_file"] == theirs.provenance["prompts_file"] == wanted.prompts
    assert theirs.provenance["counts"]["forwards"] == 0


def test_a_cost_is_told_and_nothing_is_run(llama_folder: Path, tmp_path: Path) -> None:
    status = did(tmp_path / "j", request(llama_folder, tmp_path, kind="estimate"))
    assert status.state == "done"
    assert status.lines[0].split()[1:3] == ["2", "prompts,"]
    assert not (tmp_path / "runs" / "a").exists()
    assert ActivationStore(tmp_path / "store").bytes_held() == 0


def test_a_check_tells_the_identities(llama_folder: Path, tmp_path: Path) -> None:
    status = did(tmp_path / "j", request(llama_folder, tmp_path, kind="check"))
    assert status.answer["layers"] == 3
    assert all(identity["holds"] for identity in status.answer["identities"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"model": "nowhere/at all"}}, "no such model"),
        ({"options": {"alpha": [7.0]}}, "option alpha is 7.0"),
        ({"analysis": "viods"}, "Did you mean 'voids'"),
        ({"prompts": None}, "needs prompts"),
        ({"prompts": "/nowhere.jsonl"}, "does not exist"),
    ],
)
def test_bad_input_is_refused_in_a_line(
    llama_folder: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    status = did(tmp_path / "j", request(llama_folder, tmp_path, **changes))
    assert status.state == "refused"
    assert said in status.message
    assert not (tmp_path / "runs" / "a").exists()


def test_other_peoples_folders_are_not_overwritten(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "thesis.tex").write_text("x")
    assert did(tmp_path / "j", request(llama_folder, tmp_path)).state == "refused"
    assert (tmp_path / "runs" / "a" / "thesis.tex").read_text() == "x"


def test_a_cancelled_job_keeps_what_was_captured(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = "\n".join(json.dumps({"tokens": [3 + i % 90] * (i // 90 + 2)}) for i in range(540))
    prompts = str(prompt_sets.typed(many, {}).save())
    advance = JobProgress.advance

    def cancel_once(self: JobProgress, done: int = 1) -> None:
        ask_to_cancel(self.folder)
        advance(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(JobProgress, "advance", cancel_once)
        status = did(
            tmp_path / "j1", request(llama_folder, tmp_path, prompts=prompts, analysis="logit_lens", options={})
        )
    assert (status.state, status.what) == ("cancelled", "") or status.state == "cancelled"
    assert not (tmp_path / "runs" / "a").exists()
    assert ActivationStore(tmp_path / "store").bytes_held() > 0
    again = did(tmp_path / "j2", request(llama_folder, tmp_path, prompts=prompts, analysis="logit_lens", options={}))
    assert again.state == "done"
    assert 0 < again.answer["counts"]["forwards"] < 540


def test_a_job_cancelled_while_it_waits_never_starts(llama_folder: Path, tmp_path: Path) -> None:
    write_request(tmp_path / "j", request(llama_folder, tmp_path, model={"model": "nowhere/at all"}))
    ask_to_cancel(tmp_path / "j")
    worker.work(tmp_path / "j", threading.Event())
    assert read_status(tmp_path / "j").state == "cancelled"


def test_progress_stops_when_the_dashboard_is_gone(tmp_path: Path) -> None:
    closing = threading.Event()
    write_request(tmp_path / "j", Request("check", {}))
    progress = JobProgress(tmp_path / "j", closing)
    progress.start(4, "forward")
    progress.advance(2)
    closing.set()
    with pytest.raises(Cancelled):
        progress.advance()


def test_what_remains_follows_from_the_pace() -> None:
    status = Status("running", "forward", done=5, total=20, began=100.0)
    assert status.remaining(now=110.0) == pytest.approx(30.0)
    assert replace(status, done=0).remaining() is None
    assert asdict(status)["notes"] == ()


# Making a run again


@pytest.mark.parametrize("text", ["command", "python"])
def test_a_run_can_be_made_again_from_its_text(llama_folder: Path, tmp_path: Path, text: str) -> None:
    wanted = request(llama_folder, tmp_path, options={"alpha": [0.5, 0.25], "include_bos": False, "semantics": "trace"})
    assert did(tmp_path / "j", wanted).state == "done"
    result, store = Result.load(tmp_path / "runs" / "a"), tmp_path / "store"
    made = getattr(rebuild, text)(result, tmp_path / "again", store)
    if text == "command":
        assert main(shlex.split(made)[1:]) == 0
    else:
        exec(compile(made, "made", "exec"), {})
    again = Result.load(tmp_path / "again")
    assert again.options == result.options
    assert again.provenance["counts"]["forwards"] == 0
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)


def test_a_text_says_only_what_differs_from_the_defaults(result: Result) -> None:
    line = rebuild.command(result, "runs/x")
    assert line.startswith("bathyscope run logit_lens --model tiny-llama --prompts PROMPTS.jsonl")
    assert "--top-k" not in line
    named = rebuild.with_source(result, Path("p.jsonl"))
    assert str(Path("p.jsonl").absolute()) in rebuild.command(named, "runs/x")
    negative = replace(result, options={**result.options, "top_k": -1})
    assert "--top-k=-1" in rebuild.command(negative, "runs/x")
