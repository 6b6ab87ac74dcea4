"""Sessions: text round trip, edits that equal plain hooks, nothing known computed again, and maps that equal single edits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_edit_grammar import EDITS
from tiny import native

from analyses.cli.commands import bathyscope
from analyses.cli.exits import call
from probes.edits import Edit, logits
from probes.errors import OptionError, PointError, PromptError
from probes.session import Session, State, Step

PROMPT, OTHER = (5, 6, 7, 8, 9, 10), (11, 12, 13, 8, 9, 10)
FAMILIES = ("llama", "gpt2", "gemma3", "gpt_neox")
LINES = (
    "zero z.1.2", "zero mlp_out.1 @2", "scale attn_out.0 x0.5", "mean mlp_out.1", "mean z.1.0 @-1 x0.5", "zero embed @1",
    "patch resid_post.0 @2 from other", "patch z.1.1 @3 from other@1 x0.5", "patch resid_pre.1 from other", "zero final_norm",
    "scale logits x0.5", "add resid_post.0 @2 difference x0.5", "knock-out 1 last->0", "knock-out 0-2.1 all->1",
)  # fmt: skip
PATHS = ("skip 1", "repeat 0-1", "repeat 1-1 x3", "order 2,0,1", "head-write 1.0 difference", "freeze-norm mlp.1", "freeze-norm qk.*",
         "freeze-norm final")  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def session(request: pytest.FixtureRequest) -> Session:
    return Session(native(request.param), PROMPT, OTHER)


STATES = st.builds(
    State, st.just("some model"), st.text(min_size=1) | st.lists(st.integers(0, 9), min_size=1).map(tuple), st.none() | st.text(min_size=1),
    st.lists(st.builds(Step, EDITS, st.booleans()), max_size=3).map(tuple), st.lists(st.text(min_size=1), max_size=3).map(tuple),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(STATES)
def test_a_session_s_text_is_read_back(state: State) -> None:
    assert State.parse(str(state)) == state


def naive(session: Session, lines: list[str]) -> torch.Tensor:
    """The last log-probabilities by a whole forward under the edits."""
    from probes.edits import resolve

    edits = resolve(session.model, [Edit.parse(line) for line in lines], session.prompt.texts)
    return logits(session.model, torch.tensor([PROMPT]), edits)[0, -1].float().log_softmax(-1)


@pytest.mark.parametrize("line", [*LINES, *PATHS])
def test_an_edit_equals_a_whole_forward_under_it(line: str, session: Session) -> None:
    expected = naive(session, [line])
    assert torch.allclose(session.edit(line).run.logprobs, expected, atol=1e-5)
    if "." in line or "order" in line or "skip" in line:
        assert not torch.equal(expected, session.prompt.clean.logprobs)


def test_a_stack_equals_a_whole_forward_under_it_however_it_came_about(session: Session) -> None:
    stack = ["scale resid_mid.0 x0.9", "zero z.1.2", "skip 2", "zero mlp_out.1 @2", "add resid_post.1 difference x0.3"]
    if session.model.refusal(Edit.parse(stack[0]).address):  # type: ignore[attr-defined]
        stack = stack[1:]
    expected = naive(session, stack)
    step = session
    for line in stack:
        step = step.edit(line)
        assert torch.allclose(step.run.logprobs, naive(session, [str(e) for e in step.edits]), atol=1e-5)
    assert torch.allclose(session.edit(*stack).run.logprobs, expected, atol=1e-5)


def test_only_the_blocks_behind_an_edit_run_and_undoing_runs_none() -> None:
    session = Session(native(), PROMPT, OTHER)
    first = session.edit("zero mlp_out.1")
    assert first.run.ran == 2
    assert torch.equal(first.run.streams[:2], session.prompt.clean.streams[:2])
    second = first.edit("zero mlp_out.2")
    assert second.run.ran == 1
    assert torch.equal(
        second.run.logprobs, Session(native(), PROMPT, OTHER).edit("zero mlp_out.1", "zero mlp_out.2").run.logprobs
    )
    assert second.with_state(first.state).run is first.run
    assert session.run is session.prompt.clean


def test_off_and_strength_and_order_are_states() -> None:
    state = State("m", "text").edit(Edit.parse("zero z.1.2"), Edit.parse("skip 1"))
    assert state.toggle(0).edits == (Edit.parse("skip 1"),)
    assert state.with_strength(0, 0.5).edits[0] == Edit.parse("scale z.1.2 x0.5")
    assert state.moved(0, 1).edits == (state.edits[1], state.edits[0])
    assert state.with_step(1).edits == state.edits[:1]
    with pytest.raises(OptionError, match="has no strength"):
        state.with_strength(1, 0.5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("line", "rest"),
    [
        ("patch resid_post.0 @2 from other", ()), ("zero mlp_out.1 @3", ()), ("mean attn_out.1 @3", ()), ("zero v.0 @1", ()),
        ("zero resid_pre.1 @1", ()), ("zero z.1.2", ("scale mlp_out.1 x0.5",)), ("zero mlp_out.1 @3", ("knock-out 1 last->0",)),
        ("knock-out 1.2 last->0", ()), ("patch resid_post.1 @2 from other", ("skip 1", "zero z.0.1")), ("skip 1", ()),
        ("freeze-norm mlp.0", ()),
    ],
)  # fmt: skip
def test_everywhere_equals_single_edits(family: str, line: str, rest: tuple[str, ...]) -> None:
    session = Session(native(family), PROMPT, OTHER).edit(*rest, line)
    effect = session.everywhere()
    from probes.session.everywhere import places

    variants, columns, _ = places(session.prompt, session.edits[-1])
    base = session.with_state(session.state.with_step(len(rest)))
    assert effect.kl.shape == (3, columns)
    for variant in variants:
        single = base.edit(variant.edit)
        p, q = base.run.logprobs.double(), single.run.logprobs.double()
        expected = float((p.exp() * (p - q)).sum())
        assert float(effect.kl[variant.layer, variant.column]) == pytest.approx(expected, abs=2e-5)
        top = int(p.argmax())
        assert float(effect.top[variant.layer, variant.column]) == pytest.approx(float(q[top] - p[top]), abs=2e-4)
    assert effect.kl.max() > 1e-4


OTHERS = (
    ("scale mlp_out.1 x0.5", "zero z.2.1 @4"), ("scale q.1 x1.5", "zero v.2 @1"), ("zero resid_pre.1 @3", "scale resid_post.2 x0.5"),
    ("zero embed @2", "scale attn_out.2 @-1 x3.0"), ("scale mlp_out.1 @3 x0.5", "patch resid_post.1 @2 from other"),
)  # fmt: skip
"""Edits of points in the same block, in later and in earlier ones, of the same position, of others and of all."""


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("line", ["zero mlp_out.1 @3", "zero v.0 @1", "scale resid_pre.1 @1 x0.5"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_everywhere_among_others_equals_single_edits(
    family: str, line: str, others: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from probes.session import variants
    from probes.session.everywhere import places

    if family != "gemma2":  # Its attention looks back over a few positions only.
        monkeypatch.setattr(variants, "_from_its_block", None)
    session = Session(native(family), PROMPT, OTHER).edit(others[0], line, others[1])
    effect = session.everywhere(1)
    base = Session(session.model, PROMPT, OTHER).edit(*others).run.logprobs.double()
    for variant in places(session.prompt, session.edits[1])[0]:
        single = Session(session.model, PROMPT, OTHER).edit(others[0], str(variant.edit), others[1])
        expected = float((base.exp() * (base - single.run.logprobs.double())).sum())
        assert float(effect.kl[variant.layer, variant.column]) == pytest.approx(expected, abs=2e-5)
    assert effect.kl.max() > 1e-4


def test_everywhere_leaves_out_where_the_other_prompt_ends() -> None:
    effect = Session(native(), PROMPT, OTHER[:4]).edit("patch resid_post.1 @2 from other").everywhere()
    assert effect.kl[:, 4:].isnan().all()
    assert not effect.kl[:, :4].isnan().any()
    with pytest.raises(OptionError, match="no edit to repeat"):
        Session(native(), PROMPT).everywhere()
    with pytest.raises(OptionError, match="no single layer"):
        Session(native(), PROMPT).edit("order 0,2").everywhere()


def test_the_grid_is_the_lens_of_the_edited_stream_and_knows_its_cone() -> None:
    from probes.lenses.logit import all_logprobs

    session = Session(native(), PROMPT, OTHER).edit("patch resid_post.1 @2 from other")
    grid, clean = session.grid(), session.grid(before=True)
    assert not grid.changed[0].any()
    assert not grid.changed[:, :2].any()
    assert grid.changed[1].tolist() == [position == 2 for position in range(6)]
    assert grid.changed[2, 2:].all()
    rows = all_logprobs(session.run.streams[1:].flatten(0, 1), session.model.unembedding()).view(3, 6, -1)
    before = all_logprobs(session.prompt.clean.streams[1:].flatten(0, 1), session.model.unembedding()).view(3, 6, -1)
    assert torch.allclose(grid.top_logprobs, rows.topk(5).values, atol=1e-5)
    assert torch.allclose(grid.kl, (before.exp() * (before - rows)).sum(-1), atol=1e-5)
    assert torch.equal(clean.top_ids[0], grid.top_ids[0])


def test_a_model_that_reads_both_ways_runs_whole() -> None:
    session = Session(native("bert"), PROMPT, OTHER)
    for line in ("zero z.1.2", "patch resid_post.0 @2 from other"):
        assert torch.allclose(session.edit(line).run.logprobs, naive(session, [line]), atol=1e-6)
    comparison = session.edit("zero z.1.2").compare()
    assert comparison.kl > 0


def test_what_cannot_be_is_refused_and_the_session_is_kept() -> None:
    session = Session(native(), PROMPT)
    for line, reason in (
        ("patch resid_post.1 @2 from other", "second prompt"), ("zero z.1.9", "head 9"), ("zero mlp_out.7", "mlp_out.7"),
        ("zero mlp_out.1 @9", "outside a prompt"), ("skip 9", "block 9"), ("freeze-norm mlp.9", "norm site"), ("zero mlp_out.1 @'x'", "tokenizer"),
    ):  # fmt: skip
        with pytest.raises((OptionError, PointError, PromptError), match=reason):
            session.edit(line).compare()
    assert session.compare().kl == 0


def plain_logprobs(folder: Path, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities after a text by transformers alone: as it is, and with the second MLP's output set to zero."""
    import transformers as hf

    module = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([hf.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])
    with torch.no_grad():
        clean = module(ids).logits[0, -1].log_softmax(-1)
        handle = module.model.layers[1].mlp.register_forward_hook(lambda *a: torch.zeros_like(a[2]))
        edited = module(ids).logits[0, -1].log_softmax(-1)
        handle.remove()
    return clean, edited


def test_the_command_equals_plain_hooks(word_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["edit", "--model", str(word_folder), "--text", "w5 w6 w7", "--edit", "zero mlp_out.1", "--json"]
    assert call(bathyscope, [*arguments, "--watch", "w9", "--generate", "2", "--everywhere"]) == 0
    data = json.loads(capsys.readouterr().out)
    clean, edited = plain_logprobs(word_folder, "w5 w6 w7")
    for name, expected in (("before", clean), ("after", edited)):
        for token in data[name]["top"]:
            assert token["logprob"] == pytest.approx(float(expected[token["token_id"]]), abs=1e-5)
            assert token["token"] == f"w{token['token_id']}"
        assert [t["token_id"] for t in data[name]["top"]] == expected.topk(5).indices.tolist()
    assert data["kl"] == pytest.approx(float((clean.exp() * (clean - edited)).sum()), abs=1e-5)
    assert State.parse(data["session"]).edits == (Edit.parse("zero mlp_out.1"),)


def test_the_command_refuses_an_illegal_edit_with_the_legal_forms(
    word_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(bathyscope, ["edit", "--model", str(word_folder), "--text", "a", "--edit", "zap z.1"]) == 2
    error = capsys.readouterr().err
    assert "zap" in error
    for form in ("zero POINT", "patch POINT", "knock-out LAYER"):
        assert form in error


def test_rows_of_an_edited_model_have_a_key_of_their_own(
    word_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [
        "run",
        "logit_lens",
        "--model",
        str(word_folder),
        "--text",
        "w5 w6 w7",
        "--store",
        str(tmp_path / "store"),
        "-q",
    ]
    from analyses.results.result import Result

    def read(name: str, *more: str) -> Result:
        assert call(bathyscope, [*run, "--out", str(tmp_path / name), *more]) == 0
        return Result.load(tmp_path / name)

    plain, edited, again = read("a"), read("b", "--edit", "zero mlp_out.1"), read("c", "--edit", "zero mlp_out.1")
    clean, changed = plain_logprobs(word_folder, "w5 w6 w7")
    for result, expected in ((plain, clean), (edited, changed), (again, changed)):
        row = result.tables["read"].query("position == 2 and layer == 2").iloc[0]
        assert row.final_logprob == pytest.approx(float(expected.max()), abs=1e-5)
    assert edited.provenance["counts"]["forwards"] == 1
    assert again.provenance["counts"]["forwards"] == 0
    assert read("d").provenance["counts"]["forwards"] == 0
    assert edited.provenance["edits"] == ["zero mlp_out.1"]
    assert edited.notes[0] == "Read under 1 edit of the model: zero mlp_out.1."
    assert "edits" not in plain.provenance
    assert set(edited.provenance["store_keys"]).isdisjoint(plain.provenance["store_keys"])
    from analyses.running import reproduce

    assert "--edit 'zero mlp_out.1'" in reproduce.command(edited, tmp_path / "e")
    assert (
        call(bathyscope, [*run[:1], "depth_use", *run[2:], "--edit", "zero mlp_out.1", "--out", str(tmp_path / "f")])
        == 2
    )
    assert "without edits" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["patch resid_post.1 @2 from other", "zero mlp_out.0", "order 0,2,1", "repeat 0-1", "skip 1"]
)
def test_the_grid_is_the_same_whether_the_clean_distributions_are_kept_or_not(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from probes.session import lens_grid

    kept = Session(native(), PROMPT, OTHER).edit(line)
    assert kept.kept is not None
    grid = kept.grid()
    assert kept.kept.distributions is not None
    assert kept.kept.distributions[1] is not None
    monkeypatch.setattr(lens_grid, "MOST_LOGITS", 0)
    anew = Session(native(), PROMPT, OTHER).edit(line)
    for name in ("kl", "top_logprobs", "entropy_bits"):
        assert torch.allclose(getattr(anew.grid(), name), getattr(grid, name), atol=1e-6)
    assert anew.kept is not None
    assert anew.kept.distributions is not None
    assert anew.kept.distributions[1] is None


def test_what_leaves_its_block_as_it_was_runs_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    from probes.session import variants

    began: list[tuple[int, int]] = []
    plain = variants.last_rows

    def last_rows(base: object, first_block: list[int], position: list[int], *given: object) -> object:
        began.extend(zip(position, first_block, strict=True))
        return plain(base, first_block, position, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(variants, "last_rows", last_rows)
    other = (*PROMPT[:3], 14, *PROMPT[4:])
    effect = Session(native(), PROMPT, other).edit("patch resid_post.0 @4 from other").everywhere()
    assert (effect.kl[:, :3] == 0).all()
    assert (effect.kl[:, 3:] > 0).all()
    assert sorted(began) == [(position, block) for position in (3, 4, 5) for block in (1, 2, 3)]
