"""The edit grammar: what is printed is read back, and what is no edit is refused at its place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.edits import (
    Add,
    BlockPath,
    Difference,
    Edit,
    EditError,
    FileDirection,
    FreezeNorm,
    HeadWriteEdit,
    KnockOut,
    Mean,
    Other,
    ProjectOut,
    RepeatBlocks,
    Replace,
    RunDirection,
    Scale,
    SkipBlocks,
    TokenDirection,
    TokenText,
    Values,
    check_edits,
    legal_forms,
    parse_edits,
)
from probes.edits.programs import Program
from probes.norms import KINDS
from probes.points import POINTS, Address

TEXT = st.text(min_size=1, max_size=8)
LAYER, NUMBERS = st.integers(0, 99), st.lists(st.integers(0, 40), max_size=5).map(tuple)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
AT = st.one_of(
    st.sampled_from(["all", "last", "after_first"]), st.lists(st.integers(-40, 40), max_size=5).map(tuple), st.builds(TokenText, TEXT)
)  # fmt: skip
DIRECTION = st.one_of(
    st.builds(TokenDirection, TEXT, st.none() | TEXT), st.just(Difference()), st.builds(FileDirection, TEXT, st.just("") | TEXT),
    st.builds(RunDirection, st.sampled_from(["probe", "channel"]), st.builds("{}/{}".format, TEXT, TEXT) | TEXT),
)  # fmt: skip


@st.composite
def where(draw: st.DrawFn) -> dict[str, object]:
    """Where and when a point is edited."""
    name = draw(st.sampled_from([n for n, p in POINTS.items() if p.dims[0] == "pos"]))
    headed = len(POINTS[name].dims) == 3
    at = draw(AT)
    return {
        "address": Address(name, draw(LAYER) if POINTS[name].layered else None),
        "heads": draw(st.none() | NUMBERS) if headed else None,
        "positions": at,
        "scope": draw(st.sampled_from(["prefill", "every_step"])) if at in ("all", "last") else "prefill",
    }


def on_point(cls: type[Edit], **fields: st.SearchStrategy[object]) -> st.SearchStrategy[Edit]:
    return st.builds(lambda place, own: cls(**place, **own), where(), st.fixed_dictionaries(fields))


EDITS = st.one_of(
    on_point(Scale, factor=NUMBER),
    on_point(Mean, share=NUMBER),
    on_point(Replace, value=st.builds(Other, st.none() | AT), share=NUMBER),
    on_point(Add, value=DIRECTION, factor=NUMBER),
    on_point(ProjectOut, value=DIRECTION, keep=NUMBER),
    st.builds(KnockOut, NUMBERS, AT, AT, st.none() | NUMBERS),
    st.builds(KnockOut, NUMBERS, st.just("all"), st.lists(st.integers(0, 9)).map(tuple), st.none(), st.just("every_step")),
    st.builds(lambda steps, mean: BlockPath(Program(tuple(steps), mean)), st.lists(st.lists(LAYER, min_size=1, max_size=3, unique=True).map(tuple)), st.booleans()),
    st.builds(SkipBlocks, NUMBERS),
    st.builds(lambda a, n, t: RepeatBlocks(a, a + n, t), LAYER, LAYER, st.integers(1, 9)),
    st.builds(lambda kind, layer: FreezeNorm(f"{kind}{layer}"), st.sampled_from(KINDS), st.sampled_from(["", ".3", ".*", ".2-5"])),
    st.builds(HeadWriteEdit, LAYER, LAYER, DIRECTION, NUMBER),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(EDITS)
def test_what_is_printed_is_read_back(edit: Edit) -> None:
    assert Edit.parse(str(edit)) == edit
    assert str(Edit.parse(str(edit))) == str(edit)


@pytest.mark.parametrize("verb", sorted(legal_forms()))
def test_the_examples_of_the_legal_forms_are_edits(verb: str) -> None:
    form = legal_forms()[verb]
    examples = form.partition("such as ")[2].split(" (")[0].partition(";")[0]
    for example in examples.replace(" or ", ", ").split(", "):
        assert str(Edit.parse(example)).split()[0] in legal_forms()


def test_what_the_lines_of_the_issue_mean() -> None:
    assert Edit.parse("zero z.5.3") == Scale(address=Address("z", 5), heads=(3,), factor=0.0)
    assert Edit.parse(" patch resid_post.12 @4 from other ") == Replace(
        address=Address("resid_post", 12), positions=(4,), value=Other()
    )
    assert Edit.parse("knock-out 3-5.1 last->0") == KnockOut((3, 4, 5), "last", (0,), (1,))
    assert Edit.parse("add resid_post.3 token ' a' - token ' b' x-2.5") == Add(
        address=Address("resid_post", 3), value=TokenDirection(" a", " b"), factor=-2.5
    )
    assert [str(e) for e in parse_edits("zero mlp_out.*", 3)] == ["zero mlp_out.0", "zero mlp_out.1", "zero mlp_out.2"]


@settings(max_examples=100, deadline=None)
@given(EDITS)
def test_no_edit_is_refused_before_the_model_is_known(edit: Edit) -> None:
    check_edits([str(edit)])


@pytest.mark.parametrize("line", ["zero mlp_out.*", "scale resid_post.3-70 x0.5", "patch z.12-12.3 @4 from other"])
def test_no_span_of_layers_is_refused_before_the_model_is_known(line: str) -> None:
    check_edits([line])
    with pytest.raises(EditError):
        check_edits([line, f"{line} more"])


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "Legal: "), ("zeros z.5.3", "Did you mean 'zero'?"), ("zero", "the end"), ("zero y.5", "character 6"),
        ("zero z.x", "character 8"), ("zero z.5.3 @", "the end"), ("zero z.5.3 x2", "character 12"), ("patch z.5 other", "character 11"),
        ("add resid_post.3 Paris", "token ' Paris'"), ("knock-out 5 3", "->"), ("repeat 8-5", "lower"), ("skip five", "character 6"),
        ("freeze-norm mlq.3", "character 13"), ("zero resid_post.3.1", "no heads"), ("scale z.3", "x0.5"), ("order", "the end"),
        ("zero z.5.3 @'open", "character 13"), ("patch z.3 from other x", "character 22"),
    ],
)  # fmt: skip
def test_what_is_no_edit_is_refused_with_the_place(text: str, place: str) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        Edit.parse(text)
    assert isinstance(caught.value, EditError) or "heads" in place or "lower" in place
    assert place in str(caught.value)


def test_numbers_that_no_line_holds_are_refused() -> None:
    edit = Add(address=Address("resid_post", 3), value=Values(torch.ones(4)))
    with pytest.raises(Exception, match="no line of text"):
        str(edit)
