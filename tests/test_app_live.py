"""The Live page, its buttons and its resident process: the same text, the same numbers as in Python, refusals in place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streamlit as st
import torch
from streamlit.testing.v1 import AppTest
from waiting_line import Line

import app.live.answering as answering
from analyses.running.model_spec import ModelSpec
from analyses.voids import Voids
from app.jobs.models import drop
from app.jobs.protocol import Status
from app.live.named_model import model_line
from app.live.protocol import Action, Answer, Question
from app.ui import live_desk, live_take, progress
from probes.edits import Edit, EditedModel, legal_forms
from probes.models import Model
from probes.saved_directions import SavedDirections
from probes.session import Session, State
from probes.store import ActivationStore

pytestmark = pytest.mark.usefixtures("scanned_once")
SECONDS = 60.0
LINES = (
    "zero z.1.2", "scale mlp_out.1 @2 x0.5", "mean attn_out.0", "patch resid_post.1 @1 from other@1", "add resid_post.0 token 'w9' x3.0",
    "project-out resid_post.1 token 'w9'", "knock-out 1 2->0", "order 0,2,1", "repeat 0-1", "skip 1", "freeze-norm mlp.1",
    "head-write 1.0 token 'w9'",
)  # fmt: skip


@pytest.fixture
def start(word_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The text of a session on a tiny model, answered in this process."""
    monkeypatch.setenv("BATHYSCOPE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BATHYSCOPE_STORE", str(tmp_path / "store"))
    st.cache_data.clear()
    st.cache_resource.clear()
    drop()
    session = f"model {word_folder}\ntext 'w5 w6 w7'\nother 'w8 w6 w7'\nwatch 'w9' 'w3'\nedit zero z.1.2"
    monkeypatch.setattr(live_desk, "ask", lambda _, question: answering.answer(question))
    import app.views.live

    monkeypatch.setattr(app.views.live, "EXAMPLES", {"A": session, "B": session.replace("z.1.2", "z.2.1")})
    return session


@pytest.fixture
def model(word_folder: Path) -> Model:
    return ModelSpec(str(word_folder)).load()


def page() -> AppTest:
    at = AppTest.from_string("from app.views import live\nlive.draw()\n", default_timeout=SECONDS)
    return fine(at.run())


def fine(at: AppTest) -> AppTest:
    """The whole page: a callback has only the parts drawn again that changed."""
    assert not at.exception, at.exception[0].stack_trace
    at.run()
    assert not at.exception, at.exception[0].stack_trace
    return at


def desk(at: AppTest) -> live_desk.Desk:
    own: live_desk.Desk = at.session_state[live_desk.KEY]
    return own


def press(at: AppTest, label: str) -> AppTest:
    return fine(next(b for b in at.button if b.label == label).click().run())


def tool(at: AppTest, name: str) -> AppTest:
    at.session_state["live:tool"] = name
    return fine(at.run())


def test_every_kind_of_edit_on_the_page_equals_the_same_text_in_python(start: str, model: Model) -> None:
    assert {line.split()[0] for line in LINES} == set(legal_forms())
    at = page()
    press(at, "Clear the stack")
    for line in LINES:
        fine(at.text_input(key="live:line").set_value(line).run())
        fine(at)
        own = desk(at)
        assert not own.refusal, own.refusal
        assert own.now is not None
        assert own.now.data["steps"][-1]["text"] == line
    session = Session.parse(desk(at).now.session, model)  # type: ignore[union-attr]
    assert [str(edit) for edit in session.edits] == list(LINES)
    shown = desk(at).now.data["comparison"]  # type: ignore[union-attr]
    expected = session.compare(layers=False)
    assert shown["kl"] == pytest.approx(expected.kl, abs=1e-6)
    for token, other in zip(shown["after"]["top"], expected.after.top, strict=True):
        assert (token["token_id"], token["logprob"]) == (other.token_id, pytest.approx(other.logprob, abs=1e-6))


def test_a_direction_of_a_saved_run_acts_on_the_page_as_in_python(start: str, model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "cd"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    SavedDirections.of("probe", {"city@resid_post.1": np.arange(model.shape.d_model)}).save(folder)
    at = page()
    for line, reason in (
        ("add resid_post.1 probe cd/city x2.0", ""),
        ("add resid_post.0 probe cd/city", "it has city at resid_post.1"),
    ):
        fine(at.text_input(key="live:line").set_value(line).run())
        assert reason in desk(at).refusal
        assert bool(reason) == bool(desk(at).refusal)
    session = Session.parse(desk(at).now.session, model)  # type: ignore[union-attr]
    assert str(session.edits[-1]) == "add resid_post.1 probe cd/city x2.0"
    kl = session.compare(layers=False).kl
    assert kl > 0
    assert desk(at).now.data["comparison"]["kl"] == pytest.approx(kl, abs=1e-6)  # type: ignore[union-attr]


def test_undo_gives_the_very_same_answer_and_redo_too(start: str) -> None:
    at = page()
    first = desk(at).now
    fine(at.text_input(key="live:line").set_value("skip 1").run())
    second = desk(at).now
    press(at, "Undo")
    assert desk(at).now is first
    press(at, "Redo")
    assert desk(at).now is second
    again = answering.answer(Question("view", first.session))  # type: ignore[union-attr]
    assert again.data["comparison"]["after"] == first.data["comparison"]["after"]  # type: ignore[union-attr]


def test_what_is_no_edit_is_refused_in_place_and_the_session_kept(start: str) -> None:
    at = page()
    before = desk(at).now
    fine(at.text_input(key="live:line").set_value("zero y.1").run())
    assert desk(at).now is before
    assert "zero POINT" in at.error[0].value
    fine(at.text_input(key="live:text:1").set_value("w5 " * 70).run())
    assert "context window" in at.error[0].value
    assert desk(at).now is before


def test_the_stack_s_buttons(start: str) -> None:
    at = page()
    fine(at.text_input(key="live:line").set_value("add resid_post.1 token 'w9' x2.0").run())
    own = desk(at)
    fine(at.toggle[0].set_value(False).run())
    assert State.parse(own.now.session).edits[0].line().startswith("add")  # type: ignore[union-attr]
    slider = at.slider[1].id
    fine(at.slider[1].set_value(1.7).run())
    assert (at.slider[1].id, at.slider[1].value) == (slider, 1.7)  # the focus stays on it
    press(at, "Undo")
    assert at.slider[1].value == 2.0
    fine(at.slider[1].set_value(1.0).run())
    assert "x" not in own.now.data["steps"][1]["text"].split("'")[-1]  # type: ignore[union-attr]
    up = [b for b in at.button if str(b.key).startswith("live:icon:earlier") and not b.disabled]
    fine(up[0].click().run())
    assert own.now.data["steps"][0]["text"].startswith("add")  # type: ignore[union-attr]
    fine(next(b for b in at.button if str(b.key).startswith("live:icon:remove")).click().run())
    assert [step["text"] for step in own.now.data["steps"]] == ["zero z.1.2"]  # type: ignore[union-attr]


@pytest.mark.parametrize("label", ["Zero", "Mean", "Patch from other", "Skip block", "Repeat block", "Steer to w9"])
def test_the_buttons_of_a_cell_add_their_edit(start: str, label: str) -> None:
    at = page()
    at.session_state["live:step"], at.session_state["live:position"] = 1, 2
    press(fine(at.run()), label)
    own = desk(at)
    assert not own.refusal
    assert len(own.now.data["steps"]) == 2  # type: ignore[union-attr]


def test_every_tool_is_drawn_and_says_what_python_says(start: str, model: Model) -> None:
    at = page()
    for name in ("Cell", "Attention", "Heads", "History", "Take along"):
        tool(at, name)
    tool(at, "Everywhere")
    press(at, "Everywhere")
    effect = desk(at).known("everywhere")
    session = Session.parse(start, model)
    assert effect is not None
    assert effect["kl"] == pytest.approx(session.everywhere().kl.numpy(), abs=1e-6)
    press(at, "Write 20 tokens")
    assert desk(at).known("written", new_tokens=20) is not None


def test_both_prompts_stand_side_by_side_and_a_cell_of_the_other_is_patched_here(start: str, model: Model) -> None:
    at = page()
    press(at, "Clear the stack")
    tool(at, "Both prompts")
    answer = desk(at).known("other", lens="logit")
    assert answer is not None
    assert answer["tokens"] == ["w8", "w6", "w7"]
    alone = Session(model, "w8 w6 w7").grid(before=True)
    assert answer["grid"]["top_logprobs"] == pytest.approx(alone.top_logprobs.numpy(), abs=1e-6)
    at.session_state["live:step"], at.session_state["live:position"] = 1, 2
    fine(at.selectbox(key="live:other-position").set_value(0).run())
    press(at, "Patch it into block 1, position 2")
    assert [step["text"] for step in desk(at).now.data["steps"]] == ["patch resid_post.1 @2 from other@0"]  # type: ignore[union-attr]
    press(at, "Clear the stack")
    fine(next(t for t in at.text_input if t.label == "Other prompt").set_value("").run())
    assert any("Write another prompt" in caption.value for caption in fine(at).caption)


def test_history_compares_whole_grids_and_depth_says_what_is_saved(start: str) -> None:
    at = page()
    fine(at.text_input(key="live:line").set_value("skip 1").run())
    tool(at, "History")
    before = len(at.get("bidi_component"))
    at.session_state["live:compare:what"] = "Whole grids"
    assert len(fine(at.run()).get("bidi_component")) == before + 2
    tool(at, "Depth")
    assert any("No saved run" in caption.value for caption in at.caption)


def profiles_shown(at: AppTest) -> list[str]:
    """What the charts of saved runs' profiles say they show."""
    return [chart.proto.alt for chart in at.get("plotly_chart") if "Profiles of saved runs" in chart.proto.alt]


def test_depth_shows_runs_of_the_model_and_under_the_edits_of_the_session_and_no_others(
    start: str, word_folder: Path, tmp_path: Path
) -> None:
    model, store = ModelSpec(str(word_folder)).load(), ActivationStore(tmp_path / "store")
    for name, edits in (("clean", []), ("same", ["zero z.1.2"]), ("other", ["zero z.0.0"])):
        read = EditedModel(model, [Edit.parse(line) for line in edits]) if edits else model
        Voids().run(read, ["w5 w6"], store=store).save(tmp_path / "runs" / name)
    at = tool(page(), "Depth")
    (words,) = profiles_shown(at)
    assert words.endswith("Active tokens, Active tokens, under the edits")
    press(at, "Clear the stack")
    (words,) = profiles_shown(at)
    assert words.endswith(": Active tokens")


def test_heads_direct_effects_add_up_to_what_attention_writes(start: str, model: Model) -> None:
    from probes.edits import read
    from probes.edits.token_columns import lens_column
    from probes.points import Address

    session = Session.parse(start, model)
    effects = answering.heads(session, edited=False)["effects"]
    places = [Address("attn_out", 1), Address("final_scale")]
    rows = read(model, session.prompt.ids, places)
    column = lens_column(model, int(session.prompt.clean.logprobs.argmax()))
    expected = float((rows[places[0]][0, -1] @ column / rows[places[1]][0, -1]).detach())
    assert float(effects[1].sum()) == pytest.approx(expected, abs=1e-4)


def test_what_is_taken_along_is_the_session(
    start: str, model: Model, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import json
    import shlex

    from analyses.cli.commands import bathyscope
    from analyses.cli.exits import call

    at = page()
    own = desk(at)
    session, data = own.now.session, own.now.data  # type: ignore[union-attr]
    words = shlex.split(live_take.command(session, data))
    assert call(bathyscope, [*words[1:], "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert State.parse(printed["session"]) == State.parse(session)
    assert printed["kl"] == pytest.approx(data["comparison"]["kl"], abs=1e-6)
    scope: dict[str, Any] = {}
    exec(live_take.python(session), scope)
    assert scope["session"].compare(layers=False).kl == pytest.approx(data["comparison"]["kl"], abs=1e-6)
    assert json.loads(live_take.notebook(session))["nbformat"] == 4
    tool(at, "Take along")
    fine(at.text_input(key="live:name").set_value("kept").run())
    press(at, "Save")
    press(at, "B")
    press(at, "Reopen")
    assert desk(at).now.session == session  # type: ignore[union-attr]


def test_what_is_taken_along_loads_the_model_as_the_session_does(start: str) -> None:
    folder = model_line(start)
    session = start.replace(folder, f"{folder} --dtype bfloat16")
    data = answering.answer(Question("view", session)).data
    assert "--dtype bfloat16" in live_take.command(session, data)
    scope: dict[str, Any] = {}
    exec(live_take.python(session), scope)
    assert scope["model"].context.dtype == "bfloat16"
    assert scope["session"].compare(layers=False).kl == pytest.approx(data["comparison"]["kl"], abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--trust-remote-code", "may come by a link"),
        ("--dtype", "expected one argument"),
        ("--zap 3", "after it any of --backend"),
    ],
)
def test_a_link_runs_no_code_and_flags_that_are_none_are_refused(start: str, flags: str, said: str) -> None:
    at = page()
    shown = desk(at).now
    model = model_line(start)
    desk(at).open(start.replace(model, f"{model} {flags}"), "by a link")
    assert said in desk(at).refusal
    assert desk(at).now is shown


def test_a_job_on_many_prompts_is_followed_to_its_run(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line()
    for module in (live_take, progress):
        monkeypatch.setattr(module, "queue", lambda: line)
    at = tool(page(), "Take along")
    at.text_area(key="live:job:prompts").set_value("w5 w6\nw7 w8")
    line.says = Status("running", "running", "forward", done=1, total=2, began=0.0)
    press(at, "Run under these edits")
    (request,) = line.submitted
    assert request.edits == ("zero z.1.2",)
    assert Path(request.prompts).read_text().count("\n") == 2  # type: ignore[arg-type]
    assert ["forward: 1 of 2" in bar.text for bar in at.get("progress")] == [True]
    press(at, "Cancel")
    assert line.cancelled == ["0"]
    line.says = Status("done", answer={"counts": {"forwards": 2}, "seconds": 1.5})
    press(at, "Look again")
    assert ["2 forward passes" in said.value for said in at.success] == [True]
    name = Path(request.out).name
    assert [link.proto.url for link in at.get("link_button") if link.proto.label == f"Open {name}"] == [
        f"runs?run={name}"
    ]


def test_a_widget_of_an_earlier_turn_changes_nothing(start: str) -> None:
    at = page()
    own = desk(at)
    switch = next(toggle for toggle in at.toggle if toggle.key.startswith("live:on:"))
    earlier = own.turn
    press(at, "Clear the stack")
    emptied = own.now
    own.act_on_step(earlier, "switched off", Action("toggle", 0))
    assert (own.now, own.refusal) == (emptied, "")
    press(at, "Undo")
    assert next(toggle for toggle in at.toggle if toggle.key.startswith("live:on:")).key != switch.key
    own.act_on_step(own.turn, "switched off", Action("toggle", 0))
    assert [step["on"] for step in own.now.data["steps"]] == [False]  # type: ignore[union-attr]


def test_a_permalink_opens_its_session(start: str) -> None:
    at = AppTest.from_string("from app.views import live\nlive.draw()\n", default_timeout=SECONDS)
    at.query_params["live"] = start.replace("zero z.1.2", "skip 2")
    fine(at.run())
    assert [step["text"] for step in desk(at).now.data["steps"]] == ["skip 2"]  # type: ignore[union-attr]


def test_a_job_lets_live_requests_pass_and_never_waits_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    from app.live import server

    entered, released, passed = threading.Event(), threading.Event(), threading.Event()

    def slow(question: Question) -> Answer:
        entered.set()
        assert released.wait(10)
        return Answer(question.session)

    monkeypatch.setattr(answering, "answer", slow)
    live = threading.Thread(target=server._answer, args=(Question("view", "s"),))
    live.start()
    assert entered.wait(10)
    job = threading.Thread(target=lambda: (server.let_pass(), passed.set()))
    job.start()
    assert not passed.wait(0.05)
    released.set()
    live.join(10)
    assert passed.wait(10)
    job.join(10)


def test_live_work_does_not_run_inside_a_job_s_alteration(model: Model) -> None:
    from probes.edits import Edit, altered

    session = Session(model, "w5 w6 w7")
    line = "head-write 1.0 token 'w9'"
    out: list[torch.Tensor] = []
    with altered(model, [Edit.parse(line).resolved(model)]):  # type: ignore[attr-defined]
        other = threading.Thread(target=lambda: out.append(session.edit("zero mlp_out.1").run.logprobs))
        other.start()
        other.join(0.2)
        assert not out
    other.join(10)
    assert torch.equal(out[0], Session(model, "w5 w6 w7").edit("zero mlp_out.1").run.logprobs)


def test_the_outline_is_the_border_of_the_region() -> None:
    import numpy as np

    from app.ui.cell_grid import borders

    above, right, below, left = 1, 2, 4, 8
    # Row 0 is at the bottom.
    region = np.array([[False, True, True], [False, True, False]])
    assert borders(region).tolist() == [[0, below + left, above + right + below], [0, above + right + left, 0]]


def test_a_grid_gives_each_cell_the_colour_of_its_value_and_leaves_blank_what_is_unknown() -> None:
    import numpy as np

    from app.ui.cell_grid import COLOURS, CellGrid

    values = np.array([[0.0, 1.0], [np.nan, 0.5]], dtype=np.float32)
    grid = CellGrid(["0", "1"], ["a", "b"], values, 0.0, 1.0, "Viridis", "p", "position", "block")
    data = grid.data()
    assert data["colours"] == [[0, COLOURS - 1], [None, round((COLOURS - 1) / 2)]]
    assert [ink for _, ink in data["palette"]][:: COLOURS - 1] == ["#ffffff", "#000000"]
    assert data["borders"] is None


def test_a_picked_cell_is_the_one_that_the_inspector_and_the_lists_show(start: str) -> None:
    from app.ui.live_beside import pick_cell

    at = page()
    own = at.session_state
    own["live:step"], own["live:position"] = 2, 0
    fine(at.run())
    assert any("zero resid_post.2 @0" in str(button.key) for button in at.button)
    state: dict[str, int] = {}
    drawn: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.ui.live_beside.st.session_state", state)
        patch.setattr("app.ui.live_beside.redraw", lambda *parts: drawn.extend(parts))
        pick_cell("live:step", "live:position", ("tools",), 1, 2)
    assert state == {"live:step": 1, "live:position": 2}
    assert drawn == ["tools"]


def test_what_a_step_does_not_draw_again_is_as_the_whole_page_would_draw_it(start: str) -> None:
    at = page()

    def says(at: AppTest) -> set[tuple[str, ...]]:
        elements = [
            e for e in at.main if e.type not in ("bidi_component", "vertical", "horizontal", "column", "container")
        ]
        told = ("label", "value", "disabled", "help", "options")
        return {(e.type, *(str(getattr(e, name, "")) for name in told)) for e in elements}

    def line(text: str) -> Callable[[], AppTest]:
        return lambda: at.text_input(key="live:line").set_value(text).run()

    def button(label: str) -> Callable[[], AppTest]:
        return lambda: next(b for b in at.button if b.label == label).click().run()

    def prompt(text: str) -> Callable[[], AppTest]:
        return lambda: next(t for t in at.text_input if t.label == "Prompt").set_value(text).run()

    for act in (line("repeat 0-1"), line("zero y.1"), button("Undo"), button("Zero"), button("B"), prompt("w5 w6 w7 w8"), prompt("w5 " * 70),
                button("Clear the stack"), button("Undo")):  # fmt: skip
        before, parts = says(at), says(act())
        assert says(fine(at)) <= before | parts
        assert len(parts) < len(before)
