"""One page of several runs: each named by what tells it apart, and nothing else overwritten."""

from __future__ import annotations

import gzip
import json
import re
from base64 import b64decode, b64encode
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from tiny import PROMPTS

from analyses.cli import main
from analyses.logit_lens import LogitLens
from analyses.results import page
from analyses.results.report import heading, render, titles_of
from analyses.results.result import Result
from probes.models.backends.native import NativeModel
from probes.store import ActivationStore


@pytest.fixture
def result(tiny: NativeModel, store: ActivationStore) -> Result:
    return LogitLens(top_k=2).run(tiny, PROMPTS[:1], store=store)


def on(result: Result, ref: str, **provenance: object) -> Result:
    return replace(
        result, provenance={**result.provenance, "model": {**result.provenance["model"], "ref": ref}, **provenance}
    )


def with_options(result: Result, **options: object) -> Result:
    return replace(result, options={**result.options, **options})


def test_a_title_names_analysis_and_model(result: Result) -> None:
    assert titles_of([result]) == ["Logit lens · tiny-llama"]
    assert titles_of([result, on(result, "other")]) == ["Logit lens · tiny-llama", "Logit lens · other"]
    assert "<title>Logit lens · tiny-llama" in render([result])
    assert titles_of([on(result, "/home/somebody/models/mine")]) == ["Logit lens · mine"]


def test_runs_alike_are_told_apart_by_what_differs_and_by_nothing_else(result: Result) -> None:
    other = with_options(result, top_k=5, point="attn_out")
    assert titles_of([result, other, on(result, "third")]) == [
        "Logit lens · tiny-llama · top_k 2 · point resid_post",
        "Logit lens · tiny-llama · top_k 5 · point attn_out",
        "Logit lens · third",
    ]
    assert (
        titles_of([result, on(result, "tiny-llama", dtype="bfloat16")])[1] == "Logit lens · tiny-llama · dtype bfloat16"
    )
    assert titles_of([result, result]) == ["Logit lens · tiny-llama · run 1", "Logit lens · tiny-llama · run 2"]


def test_the_heading_counts_what_is_too_much_to_name(result: Result) -> None:
    assert heading([on(result, name) for name in "abc"]) == "Logit lens · a, b, c"
    assert heading([on(result, name) for name in "abcd"]) == "Logit lens · 4 models"


def test_one_prompt_is_not_prompts(result: Result) -> None:
    page = render(
        [replace(result, provenance={**result.provenance, "counts": {**result.provenance["counts"], "tokens": 1}})]
    )
    assert "1 prompt, 1 token<" in page
    assert "1 prompt (1 token) of" in page


def test_the_command_writes_one_page_of_several_runs(
    result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(on(result, name).save(tmp_path / name)) for name in ("one", "two")]
    out = tmp_path / "deep" / "page.html"
    assert main(["report", *runs, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"report of 2 runs: {out}\n"
    page = out.read_text()
    assert page.count('<section id="section-') == 2
    assert page.count('class="plot"') == 1 + 2 * len(result.figures)  # the depth axis comes before them
    assert main(["report", runs[0], "--out", str(out), "--title", "Mine <b>"]) == 0
    assert "<h1>Mine &lt;b&gt;</h1>" in out.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def figures_in(page: str) -> list[dict[str, Any]]:
    """The figures of a page, in its order, as its script unpacks them."""
    packed = re.findall(r'data-figure="([^"]+)"', page)
    return [json.loads(gzip.decompress(b64decode(data))) for data in packed]


def test_a_report_opens_with_every_profile_on_one_depth_axis(result: Result) -> None:
    depth, *others = figures_in(render([result]))
    curve = depth["data"][-1]
    assert curve["y"] == [0, 1, 2]
    assert curve["hovertemplate"].startswith(next(iter(result.profiles.values())).title)
    assert len(others) == len(result.figures)


def test_models_of_unlike_depth_share_a_relative_axis(result: Result) -> None:
    deeper = on(result, "deeper")
    deeper.provenance["model"]["layers"] = 5
    depth = figures_in(render([result, deeper]))[0]
    curves = {trace["name"]: trace["y"] for trace in depth["data"] if "name" in trace}
    assert curves == {"tiny-llama": [0, 0.5, 1], "deeper": [0, 0.25, 0.5]}
    assert depth["layout"]["yaxis"]["title"]["text"] == "relative depth"


def test_a_model_and_the_same_under_edits_are_told_apart_on_the_axis_of_layers(result: Result) -> None:
    edited = on(result, "tiny-llama", edits=["zero mlp_out.1"])
    page = render([result, edited])
    depth = figures_in(page)[0]
    curves = {trace["name"]: trace for trace in depth["data"] if trace.get("mode") == "lines+markers"}
    assert list(curves) == ["tiny-llama", "tiny-llama · zero mlp_out.1"]
    assert all(trace["y"] == [0, 1, 2] and trace["showlegend"] for trace in curves.values())
    assert len({trace["line"]["color"] for trace in curves.values()}) == 2
    assert depth["layout"]["yaxis"]["title"]["text"] == "layer"
    assert "Models differ" not in page
    assert page.count("of tiny-llama under 1 edit.") == page.count("of tiny-llama.") > 0
    assert titles_of([result, edited])[1] == "Logit lens · tiny-llama · zero mlp_out.1"


def test_two_models_of_one_name_and_unlike_depth_have_colours_of_their_own(result: Result) -> None:
    deeper = on(result, "/elsewhere/tiny-llama")
    deeper.provenance["model"]["layers"] = 5
    depth = figures_in(render([result, deeper]))[0]
    curves = [trace for trace in depth["data"] if trace.get("mode") == "lines+markers"]
    assert [trace["y"] for trace in curves] == [[0, 0.5, 1], [0, 0.25, 0.5]]
    assert len({trace["line"]["color"] for trace in curves}) == 2


def test_equal_results_give_equal_pages(result: Result) -> None:
    assert render([result]) == render([result])


@pytest.mark.parametrize("kind", ["notes", "folder", "device", "link"])
def test_what_is_no_report_stays(kind: str, result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = result.save(tmp_path / "run"), tmp_path / "out"
    (tmp_path / "kept").write_text("notes")
    if kind == "notes":
        out.write_text("notes")
    elif kind == "folder":
        out.mkdir()
    elif kind == "link":
        out.symlink_to(tmp_path / "kept")
    out = Path("/dev/null") if kind == "device" else out
    assert main(["report", str(run), "--out", str(out)]) == 2
    assert "is no report: give a new file" in capsys.readouterr().err
    assert (tmp_path / "kept").read_text() == "notes"
    assert not out.is_file() or out.read_text() == "notes"


def test_a_folder_that_is_no_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "x.html")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["report", "--out", str(tmp_path / "x.html")]) == 2
    assert not (tmp_path / "x.html").exists()


def test_the_script_of_the_figures_is_packed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATHYSCOPE_CACHE", str(tmp_path))
    packed = page._library.__wrapped__()
    assert gzip.decompress(b64decode(packed)).decode() == get_plotlyjs()
    [kept] = tmp_path.glob("pages/*")
    with monkeypatch.context() as patch:
        patch.setattr(page, "_gzip", lambda _: pytest.fail("packed again"))
        assert page._library.__wrapped__() == packed
    kept.write_bytes(kept.read_bytes()[:-1])
    assert page._library.__wrapped__() == packed
    assert b64encode(kept.read_bytes()).decode() == packed
    monkeypatch.setenv("BATHYSCOPE_CACHE", str(kept))
    assert page._library.__wrapped__() == packed, "a cache that cannot be written"
