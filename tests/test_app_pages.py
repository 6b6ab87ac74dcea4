"""Every page of the dashboard, and a widget for every option of every analysis; no worker, no browser."""

from __future__ import annotations

import dataclasses
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest
from tiny import PROMPTS, native
from waiting_line import Line

from analyses.base import Analysis
from analyses.logit_lens import LogitLens
from analyses.options import choices, types_of
from analyses.registry import ANALYSES, get_analysis
from analyses.results.result import Result
from analyses.running.model_spec import ModelSpec
from analyses.voids import Voids
from app.jobs.protocol import PHASES, Request, Status
from app.saved import saved_runs
from app.ui.option_widgets import key_of
from app.ui.progress import steps
from probes.edits import Edit, EditedModel
from probes.errors import UserError
from probes.store import ActivationStore

pytestmark = pytest.mark.usefixtures("scanned_once")
ROOT = Path(__file__).parents[1]
NAMES = list(ANALYSES)
SECONDS = 60.0


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    import app.jobs.queue
    import app.ui.progress
    import app.views.analysis
    import app.views.model
    import app.views.setup

    queue = Line()
    for module in (app.jobs.queue, app.ui.progress, app.views.analysis, app.views.model, app.views.setup):
        monkeypatch.setattr(module, "queue", lambda: queue)
    return queue


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three saved runs, and the store they read."""
    folder = tmp_path_factory.mktemp("saved")
    store = ActivationStore(folder / "store")
    Voids(alpha=(0.8, 0.2)).run(native(), PROMPTS, store=store).save(folder / "runs" / "voids")
    LogitLens().run(native(), PROMPTS, store=store).save(folder / "runs" / "set" / "lens")
    LogitLens(top_k=3).run(native(), PROMPTS[:2], store=store).save(folder / "runs" / "lens-3")
    return folder


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATHYSCOPE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BATHYSCOPE_STORE", str(tmp_path / "store"))
    st.cache_data.clear()
    st.cache_resource.clear()


@pytest.fixture
def runs(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved / "runs", tmp_path / "runs")
    return tmp_path / "runs"


def page(view: str, call: str = "draw()") -> AppTest:
    return AppTest.from_string(f"from app.views import {view}\n{view}.{call}\n", default_timeout=SECONDS)


def form(name: str) -> AppTest:
    """An analysis's page with the form of a new run unfolded."""
    at = page("analysis", f"draw({name!r})")
    at.session_state[f"keep:new:{name}"] = True
    return fine(at.run())


def words(at: AppTest) -> str:
    kinds = (at.title, at.subheader, at.markdown, at.caption, at.info, at.error, at.success, at.warning, at.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind)


def fine(at: AppTest) -> AppTest:
    assert not at.exception, at.exception[0].stack_trace
    return at


# The entry and home


def test_the_entry_opens_at_home_without_importing_an_analysis(runs: Path) -> None:
    at = fine(AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=SECONDS).run())
    assert at.title[0].value == "Where in the depth does it happen?"
    assert "selection" in at.session_state


def test_home_without_runs_says_what_to_do() -> None:
    assert "bathyscope demo" in words(fine(page("home").run()))


def test_home_draws_the_newest_run_of_each_analysis_and_follows_the_selection(runs: Path) -> None:
    at = page("home")
    at.query_params["layers"] = "1"
    fine(at.run())
    assert set(at.multiselect[0].value) == {"voids", "lens-3"}
    assert "The numbers at layers 1" in words(at)
    read = Result.load(runs / "lens-3").profile("agreement")
    peak = read.loc[read["value"].idxmax(), "layer"]
    assert f"Agreement with the output **{peak}**" in words(at)
    numbers = at.dataframe[0].value
    assert set(numbers["layer"]) == {1}
    assert set(numbers["profile"]) == {"Active tokens", "Agreement with the output"}
    at.multiselect[0].set_value([])
    assert "Choose a saved run" in words(fine(at.run()))


def test_a_run_under_edits_says_so_and_is_not_mixed_with_those_of_the_model_itself(runs: Path) -> None:
    edited = EditedModel(native(), [Edit.parse("zero mlp_out.1")])
    Voids(alpha=(0.8, 0.2)).run(edited, PROMPTS, store=ActivationStore(runs / "store")).save(runs / "under")
    subjects = {run.name: run.subject for run in saved_runs()}
    clean, under = subjects["voids"], subjects["under"]
    assert under == f"{clean} · zero mlp_out.1"
    at = fine(page("home").run())
    by_name = {run.name: run for run in saved_runs()}
    for subject in (clean, under):
        at.selectbox(key="keep:home:model").set_value(subject)
        fine(at.run())
        chosen = at.multiselect(key=f"home:runs:{subject}")
        assert {by_name[name].subject for name in chosen.options} == {subject}
    at = fine(page("runs").run())
    assert [edits for edits in at.dataframe[0].value["edits"] if edits] == ["zero mlp_out.1"]
    at.selectbox(key="keep:open").set_value("under")
    said = words(fine(at.run()))
    assert "Read under 1 edit of the model: zero mlp_out.1." in said
    assert f":blue-badge[{under}]" in said


def test_home_draws_the_selected_prompts_where_they_are_told_apart(runs: Path) -> None:
    at = page("home")
    at.query_params["prompts"] = "1"
    said = words(fine(at.run()))
    assert "Drawn from prompts 1." in said
    assert "Not told apart, so over everything: Active tokens" in said


# A page for each analysis


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_widget_with_its_help_and_reaches_the_run(name: str, line: Line) -> None:
    cls = get_analysis(name)
    at = form(name)
    assert at.title[0].value == cls.title
    assert cls.reference.split(",")[0].split(" 20")[0] in words(at) + str(cls.__doc__)
    values = alternatives(cls)
    for field in dataclasses.fields(cls):
        widget = widget_of(at, cls, field.name)
        assert field.metadata["help"] in widget.help, field.name
        if field.name in values:
            widget.set_value(as_shown(types_of(cls)[field.name], values[field.name]))
    at.session_state["keep:prompts:text"] = '{"tokens": [5, 6]}'
    fine(at.run())
    at.button(key=f"run:{name}").click()
    fine(at.run())
    assert [request.kind for request in line.submitted] == ["run"], words(at)
    assert cls(**line.submitted[0].options) == cls(**values)
    assert Path(line.submitted[0].out).name == f"{name}-smollm2-135m"


def alternatives(cls: type[Analysis]) -> dict[str, Any]:
    """A value other than the default for every option; those that only others allow are left at their default."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind = types_of(cls)[field.name]
        for value in other_values(kind, field):
            try:
                cls(**{**values, field.name: value})
            except UserError:
                continue
            values[field.name] = value
            break
        else:
            with pytest.raises(UserError):
                cls(**{**values, field.name: other_values(kind, field)[0]})
    assert len(values) >= len(dataclasses.fields(cls)) - 4  # type: ignore[arg-type]
    return values


def other_values(kind: Any, field: dataclasses.Field[Any]) -> list[Any]:
    legal, default = choices(kind), field.default
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if typing.get_origin(kind) is tuple and legal:
        return [(value,) for value in legal if (value,) != default] + [tuple(legal)]
    if legal:
        return [value for value in legal if value != default]
    if kind is bool:
        return [not default]
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        return [("sentiment",)] if element is str else [(element(low or 1), element(min(high or 3, 3)))]
    if kind is str:
        return ["a {text}", "self"]
    step = 1 if kind is int else 0.125
    return [kind(default + step) if high is None or default + step <= high else kind(default - step)]


def as_shown(kind: Any, value: Any) -> Any:
    if typing.get_origin(kind) is not tuple:
        return value
    return list(value) if choices(kind) else ", ".join(map(str, value))


def widget_of(at: AppTest, cls: type[Analysis], name: str) -> Any:
    key = key_of(cls, name)
    kinds = (at.selectbox, at.multiselect, at.toggle, at.number_input, at.text_input)
    return next(widget for kind in kinds for widget in kind if widget.key == key)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("alpha", "0.5, much", "not a list of numbers"),
        ("alpha", "7", "option alpha is 7.0"),
        ("alpha", "", "is empty"),
    ],
)
def test_illegal_options_are_said_before_a_run_and_stop_it(line: Line, key: str, value: str, said: str) -> None:
    at = form("voids")
    at.text_input(key=key_of(Voids, key)).set_value(value)
    fine(at.run())
    assert said in words(at)
    assert at.button(key="run:voids").disabled


@pytest.mark.parametrize("name", ["../out", "a/b", ".hidden"])
def test_run_names_are_checked(runs: Path, line: Line, name: str) -> None:
    at = form("voids")
    at.text_input(key="keep:name:voids").set_value(name)
    at.run()
    at.button(key="run:voids").click()
    assert "run name" in words(fine(at.run()))
    assert not line.submitted


def test_a_refusal_takes_the_place_of_the_last_ending(line: Line) -> None:
    at = form("voids")
    line.says = Status("done", answer={"counts": {"forwards": 7}, "seconds": 1.5})
    at.button(key="run:voids").click()
    assert "7 forward passes" in words(fine(at.run()))
    at.text_input(key="keep:name:voids").set_value("../out")
    at.run()
    at.button(key="run:voids").click()
    said = words(fine(at.run()))
    assert "run name" in said
    assert "7 forward passes" not in said


def test_a_page_loaded_anew_finds_what_is_under_way_and_can_cancel_it(line: Line) -> None:
    """Another session started it, or this one did before its page was loaded again."""
    line.submit(Request("run", ModelSpec("m"), "voids"))
    line.submit(Request("run", ModelSpec("m"), "logit_lens"))
    line.says = Status("running", "running", "forward", done=3, total=12, began=0.0)
    at = fine(page("analysis", "draw('voids')").run())
    assert ["forward: 3 of 12" in bar.text for bar in at.get("progress")] == [True]
    at.button(key="cancel:0").click()
    fine(at.run())
    assert line.cancelled == ["0"]
    line.says = Status("done", answer={"counts": {"forwards": 7}, "seconds": 1.5})
    assert "7 forward passes" in words(fine(at.run()))


def test_what_came_of_a_session_s_job_stays_while_another_session_s_job_runs_and_after_it(line: Line) -> None:
    def ended(forwards: int) -> Status:
        return Status("done", answer={"counts": {"forwards": forwards}, "seconds": 1.5})

    at = form("voids")
    at.button(key="run:voids").click()
    at.run()
    line.submit(Request("run", ModelSpec("m"), "voids"))
    line.says_of = {"0": ended(7), "1": Status("running", "running", "forward", done=3, total=12)}
    assert "7 forward passes" in words(fine(at.run()))
    assert ["forward: 3 of 12" in bar.text for bar in at.get("progress")] == [True]
    line.says_of["1"] = ended(5)
    said = words(fine(at.run()))
    assert "7 forward passes" in said
    assert "5 forward passes" not in said


def test_the_run_of_a_job_that_ends_while_the_page_is_drawn_is_shown_with_its_ending(
    saved: Path, tmp_path: Path, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = form("voids")
    at.text_input(key="keep:name:voids").set_value("voids")
    at.run()
    at.button(key="run:voids").click()
    at.run()

    def ends(name: str) -> Status:
        shutil.copytree(saved / "runs", tmp_path / "runs", dirs_exist_ok=True)
        return Status("done", answer={"seconds": 1})

    monkeypatch.setattr(line, "status", ends)
    said = words(fine(at.run()))
    assert "Done in" in said
    assert "No saved run" not in said
    assert at.selectbox(key="keep:run:voids").value == "voids"


def test_what_was_started_and_what_came_of_it_stands_above_the_form(line: Line) -> None:
    at = form("voids")
    at.button(key="run:voids").click()
    for status in (Status("running", "running", "forward", done=3, total=12), Status("done", answer={"seconds": 1})):
        line.says = status
        kinds = [element.type for element in fine(at.run()).main]
        shown = kinds.index("button"), kinds.index("success" if status.ended else "progress"), kinds.index("selectbox")
        assert shown == tuple(sorted(shown))


def test_each_phase_is_named_and_saving_comes_last_on_a_full_bar() -> None:
    shares = [Status("running", phase, "x", done=1, total=4).share for phase in PHASES]
    assert shares == [0.25] * (len(PHASES) - 1) + [1.0]
    assert [Status("running", phase, "x").share for phase in PHASES] == [None] * (len(PHASES) - 1) + [1.0]
    assert [steps(phase).split(":")[0] for phase in PHASES] == [f"step {n} of 3" for n in range(1, 4)]


def test_the_options_of_a_saved_run_can_be_taken(runs: Path, line: Line) -> None:
    at = form("logit_lens")
    at.selectbox(key="copy:logit_lens").set_value("lens-3")
    at.run()
    at.button(key="take:logit_lens").click()
    fine(at.run())
    assert at.number_input(key=key_of(LogitLens, "top_k")).value == 3


def test_an_analysis_that_needs_prompts_says_so(line: Line) -> None:
    at = form("voids")
    at.session_state["keep:prompts:how"] = "Made by the analysis"
    at.run()
    at.button(key="run:voids").click()
    assert "needs prompts" in words(fine(at.run()))
    at.session_state["keep:prompts:how"] = "Uploaded"
    assert "no file yet" in words(fine(at.run()))
    at.session_state["keep:prompts:how"] = "Shipped"
    assert "16 prompts" in words(fine(at.run()))


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (Status(), "starts in a few seconds"),
        (Status("running", "running", "forward", done=3, total=12, began=0.0), "forward: 3 of 12"),
        (Status("refused", message="option x is bad"), "option x is bad"),
        (Status("failed", message="The worker process ended"), "The worker process ended"),
        (Status("cancelled", message="Cancelled. What was captured stays"), "What was captured stays"),
        (Status("done", answer={"counts": {"forwards": 0}, "seconds": 1.5}), "no forward pass"),
        (Status("done", answer={"counts": {"forwards": 7}, "seconds": 1.5}), "7 forward passes"),
    ],
)
def test_how_a_job_goes_is_said(line: Line, status: Status, said: str) -> None:
    at = form("voids")
    line.says = status
    at.button(key="run:voids").click()
    fine(at.run())
    bars = [bar.text for bar in at.get("progress")] if not status.ended else []
    assert said in words(at) + str(bars)
    if not status.ended:
        at.button(key="cancel:0").click()
        fine(at.run())
        assert line.cancelled == ["0"]


def test_an_estimate_is_shown(line: Line) -> None:
    at = form("voids")
    line.says = Status("done", lines=("forwards  3 prompts",))
    at.button(key="cost:voids").click()
    fine(at.run())
    assert line.submitted[0].kind == "estimate"
    assert "forwards  3 prompts" in words(at)


def test_every_figure_and_table_of_a_run_is_drawn(runs: Path, line: Line) -> None:
    at = form("voids")
    figures, tables = (next(g for g in at.get("button_group") if g.label == label) for label in ("Figure", "Table"))
    titles = [spec.title for spec in Voids.figures.values()]
    assert [option.content for option in figures.proto.options] == [t for t in titles if t in words_of(figures)]
    for label, names in (
        ("Figure", list(Voids.figures)),
        ("Table", ["activity", "usage", "void_rate", "readout", "controls"]),
    ):
        for name in names:
            group = next(g for g in at.get("button_group") if g.label == label)
            if label == "Table" or Voids.figures[name].title in words_of(group):
                group.set_value(name)
                fine(at.run())
                if label == "Figure":
                    assert Voids.figures[name].caption in words(at)
    assert "bathyscope run voids" in words(at)
    assert "ActivationStore(" in words(at)
    assert tables.label == "Table"


def words_of(group: Any) -> list[str]:
    return [option.content for option in group.proto.options]


# Saved runs, store, model


def test_runs_are_opened_compared_and_deleted(runs: Path) -> None:
    at = fine(page("runs").run())
    assert set(at.dataframe[0].value["run"]) == {"voids", "lens-3", "set/lens"}
    at.selectbox(key="keep:open").set_value("set/lens")
    assert "Logit lens" in words(fine(at.run())) or "Lens table" in words(at)
    at.session_state["runs:tab"] = "Compare two"
    fine(at.run())
    at.selectbox(key="keep:compare:a").set_value("lens-3")
    at.selectbox(key="keep:compare:b").set_value("set/lens")
    fine(at.run())
    differs = next(frame.value for frame in at.dataframe if "what" in frame.value)
    assert differs.set_index("what").loc["option: top_k"].tolist() == ["3", "5"]
    at.session_state["runs:tab"] = "Delete"
    fine(at.run())
    assert at.button(key="delete:go").disabled
    at.multiselect(key="delete:names").set_value(["lens-3"])
    at.checkbox(key="delete:sure").set_value(True)
    at.run()
    at.button(key="delete:go").click()
    fine(at.run())
    assert not (runs / "lens-3").exists()
    assert (runs / "set" / "lens").exists()


def test_runs_without_any_says_what_to_do() -> None:
    assert "No saved run yet" in words(fine(page("runs").run()))


def test_a_run_of_an_analysis_that_is_gone_is_said(runs: Path) -> None:
    record = runs / "voids" / "result.json"
    record.write_text(record.read_text().replace('"analysis": "voids"', '"analysis": "gone"'))
    at = page("runs")
    at.query_params["run"] = "voids"
    assert "unknown analysis 'gone'" in words(fine(at.run()))


def test_the_store_is_listed_verified_and_evicted(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(saved / "store", tmp_path / "full")
    monkeypatch.setenv("BATHYSCOPE_STORE", str(tmp_path / "full"))
    at = fine(page("store").run())
    assert at.dataframe[0].value["backend"].tolist() == ["native"]
    at.button(key="store:verify").click()
    assert "0 damaged" in words(fine(at.run()))
    shard = next((tmp_path / "full" / "shards").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    at.button(key="store:verify").click()
    assert shard.stem in words(fine(at.run()))
    assert at.button(key="store:evict").disabled
    at.checkbox(key="store:sure").set_value(True)
    at.text_input(key="store:size").set_value("lots")
    at.run()
    at.button(key="store:evict").click()
    assert "size 'lots'" in words(fine(at.run()))
    at.text_input(key="store:size").set_value("1KB")
    at.run()
    at.button(key="store:evict").click()
    assert "freed" in words(fine(at.run()))
    assert ActivationStore(tmp_path / "full").bytes_held() <= 1000


def test_an_empty_store_says_so() -> None:
    assert "The store is empty" in words(fine(page("store").run()))


def test_the_model_page_shows_the_stamp_of_saved_runs_and_of_a_check(runs: Path, line: Line) -> None:
    at = fine(page("model").run())
    assert "✓ holds" in at.dataframe[0].value["holds"].tolist()
    identity = {"name": "a == b", "error": 0.5, "tolerance": 1e-4, "holds": False}
    facts = dict.fromkeys(
        (
            "architecture",
            "layers",
            "heads",
            "d_model",
            "vocabulary",
            "window",
            "backend",
            "dtype",
            "attention",
            "weights",
        ),
        "x",
    )
    line.says = Status(
        "done", answer={"ref": "mine", **facts, "identities": [identity], "refused": {"q": "none"}, "tokenizer": False}
    )
    at.button(key="model:check").click()
    fine(at.run())
    assert "✗ FAILS" in at.dataframe[1].value["holds"].tolist()
    assert "without a tokenizer" in words(at)
    assert line.submitted[0].kind == "check"
