"""Directions of saved runs in edits: the numbers of plain hooks, keys by content, and refusals that say what there is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from small import SMALL
from tiny import native
from torch import Tensor

from analyses.cli.commands import bathyscope
from analyses.cli.exits import call
from analyses.results.result import Result
from probes.edits import Edit, read
from probes.points import Address
from probes.saved_directions import FILE, SavedDirections
from probes.session import Session
from probes.store import ActivationStore
from probes.weights.head_weights import head_weights

IDS = (5, 6, 7, 8)
D = native().shape.d_model
VECTOR = np.random.default_rng(0).normal(size=D)
UNIT = torch.from_numpy(VECTOR / np.linalg.norm(VECTOR)).float()


def run_of(folder: Path, saved: SavedDirections | None, analysis: str = "concept_depth") -> Path:
    """A saved run made by hand, as far as an edit reads one."""
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"analysis": analysis}))
    if saved is not None:
        saved.save(folder)
    return folder


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs: one of probes, of which layer 1 is known, one of channels, and one from before there were any."""
    root = tmp_path / "runs"
    monkeypatch.setenv("BATHYSCOPE_RUNS", str(root))
    probe = SavedDirections.of("probe", {"city@resid_post.1": VECTOR, "city@resid_post.2": -VECTOR})
    run_of(root / "cd", probe)
    run_of(root / "with blank" / "cc", SavedDirections.of("channel", {"0.1.2": VECTOR}), "communication_channels")
    run_of(root / "old", None)
    return root


def hooked(layer: int, change: object) -> Tensor:
    """The last log-probabilities of the tiny model, a block's output changed by a plain hook."""
    module = native().module
    handle = module.model.layers[layer].register_forward_hook(lambda *a: change(a[2]))  # type: ignore[operator]
    try:
        with torch.no_grad():
            return module(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)
    finally:
        handle.remove()


def at_two(rows: Tensor) -> Tensor:
    out = rows.clone()
    out[:, 2] += 2 * UNIT
    return out


@pytest.mark.parametrize(
    ("line", "layer", "change"),
    [
        ("add resid_post.1 @2 probe cd/city x2.0", 1, at_two),
        ("project-out resid_post.1 probe cd/city", 1, lambda rows: rows - (rows @ UNIT)[..., None] * UNIT),
        ("project-out resid_post.2 probe cd/city x0.25", 2, lambda rows: rows - 0.75 * (rows @ UNIT)[..., None] * UNIT),
        ("add resid_post.0 probe cd/city@resid_post.2 x3.0", 0, lambda rows: rows - 3 * UNIT),
        ("add resid_post.0 channel 'with blank/cc/0.1.2' x-1.5", 0, lambda rows: rows - 1.5 * UNIT),
    ],
)
def test_an_edit_along_a_saved_direction_equals_a_plain_hook(line: str, layer: int, change: object) -> None:
    session = Session(native(), IDS).edit(line)
    assert str(session.edits[0]) == line
    assert torch.allclose(session.run.logprobs, hooked(layer, change), atol=1e-6)
    assert not torch.allclose(session.run.logprobs, session.prompt.clean.logprobs, atol=1e-4)


def test_a_head_that_no_longer_writes_along_it_adds_nothing_there() -> None:
    edit = Edit.parse("head-write 1.0 probe cd/city").resolved(native())  # type: ignore[attr-defined]
    z, attn = Address("z", 1), Address("attn_out", 1)
    silent = [Edit.parse(f"zero z.1.{head}") for head in range(1, native().shape.n_heads)]
    rows = read(native(), torch.tensor([IDS]), [z, attn], [edit, *silent])
    assert (rows[attn] @ UNIT).abs().max() < 1e-6
    assert (read(native(), torch.tensor([IDS]), [attn], silent)[attn] @ UNIT).abs().max() > 1e-4


def test_store_keys_follow_the_vector_and_not_its_place_on_disk(runs: Path) -> None:
    def key(line: str) -> str:
        return Edit.parse(line).text()

    run_of(runs / "copy", SavedDirections.of("probe", {"town@resid_post.1": 2 * VECTOR}))
    here = key("add resid_post.1 probe cd/city")
    assert key(f"add resid_post.1 probe {runs / 'cd'}/city") == here
    assert key("add resid_post.1 probe copy/town") == here
    assert key("project-out resid_post.1 probe copy/town") == key("project-out resid_post.1 probe cd/city")
    assert key("head-write 1.0 probe copy/town") == key("head-write 1.0 probe cd/city")
    assert key("add resid_post.1 probe cd/city@resid_post.2") != here
    SavedDirections.of("probe", {"city@resid_post.1": VECTOR + 1e-3, "city@resid_post.2": VECTOR}).save(runs / "cd")
    assert key("add resid_post.1 probe cd/city") != here


def test_everywhere_leaves_out_layers_without_a_probe() -> None:
    effect = Session(native(), IDS).edit("add resid_post.1 @2 probe cd/city x2.0").everywhere()
    assert effect.kl[0].isnan().all()
    assert not effect.kl[1:].isnan().any()


REFUSED = {
    "probe nowhere/city": ("names no saved run", "cd, torn, wide keep directions", "probe RUN/NAME"),
    "probe city": ("names no saved run",),
    "probe old/city": ("'old' (concept_depth) keeps no directions", "run again", "channel RUN/LAYER.HEAD.COMPONENT"),
    "channel cd/0.1.2": ("'cd' keeps no channel but probe directions", "city at resid_post.1"),
    "probe cd/town": ("'cd' keeps no probe 'town' for resid_post.0", "city at resid_post.1, resid_post.2"),
    "probe cd/city": ("for resid_post.0", "@POINT.LAYER"),
    "probe wide/city": ("has a tensor of (3,)", "32 wide"),
    "probe torn/city": ("cannot be read", "run the analysis again"),
    "probe": ("expected RUN/NAME", "probe RUN/DATASET"),
    "brobe cd/city": ("probe RUN/DATASET", "channel RUN/LAYER.HEAD.COMPONENT"),
}


@pytest.mark.parametrize("direction", REFUSED)
def test_what_a_run_does_not_keep_is_refused_with_what_it_has(
    direction: str, runs: Path, word_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(runs / "wide", SavedDirections.of("probe", {"city@resid_post.0": np.ones(3)}))
    run_of(runs / "torn", None)
    save_file({"a": np.ones(3)}, runs / "torn" / FILE)
    line = f"add resid_post.0 {direction}"
    assert call(bathyscope, ["edit", "--model", str(word_folder), "--text", "w5 w6", "--edit", line]) == 2
    error = " ".join(capsys.readouterr().err.split())
    for words in REFUSED[direction]:
        assert words in error
    assert "Traceback" not in error


def test_an_analysis_runs_under_a_saved_direction(word_folder: Path, tmp_path: Path) -> None:
    line = "add resid_post.1 probe cd/city x2.0"
    run = ["run", "logit_lens", "--model", str(word_folder), "--text", "w5 w6 w7", "--store", str(tmp_path / "s"), "-q"]
    outs = {name: tmp_path / name for name in ("plain", "edited")}
    for name, more in (("plain", []), ("edited", ["--edit", line])):
        assert call(bathyscope, [*run, *more, "--out", str(outs[name])]) == 0
    plain, edited = (Result.load(out) for out in outs.values())
    assert edited.provenance["edits"] == [line]
    assert not plain.tables["read"].equals(edited.tables["read"])


def small(name: str, tmp_path: Path) -> Result:
    analysis, prompts = SMALL[name]
    return analysis.run(native(), prompts, store=ActivationStore(tmp_path / "store"))


def test_a_run_of_probes_keeps_what_they_read(tmp_path: Path) -> None:
    result = small("concept_depth", tmp_path)
    folder = result.save(tmp_path / "runs" / "made")
    again = Result.load(folder)
    assert again.directions is not None
    for full, vector in again.directions.vectors.items():
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        name, address = full.split("@")
        edit = Edit.parse(f"project-out {address} probe made/{name}")
        rows = read(native(), torch.tensor([IDS]), [Address.parse(address)], [edit])[Address.parse(address)]
        assert (rows @ torch.from_numpy(vector)).abs().max() < 1e-5
    again.save(tmp_path / "copied")
    assert (tmp_path / "copied" / FILE).read_bytes() == (folder / FILE).read_bytes()


def test_a_run_of_channels_keeps_singular_directions_of_what_heads_write(tmp_path: Path) -> None:
    result = small("communication_channels", tmp_path)
    assert result.directions is not None
    heads = head_weights(native(), fold_norm=True, center=True)
    strongest = result.tables["components"].groupby(["source_layer", "source_head"])
    assert len(result.directions.vectors) >= strongest.ngroups
    for name, vector in result.directions.vectors.items():
        layer, head, component = map(int, name.split("."))
        matrix = heads.w_v[layer, head].double() @ heads.w_o[layer, head].double()
        v = torch.from_numpy(vector).double()
        size = torch.linalg.svdvals(matrix)[component]
        assert torch.allclose(matrix.T @ (matrix @ v), size**2 * v, atol=1e-5 * float(size**2))
