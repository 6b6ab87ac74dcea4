"""Causal patching: every cell of the grid is the naive one, and the identities of patching hold on every causal family."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from families import FAMILIES, make
from tiny import native
from torch import Tensor

from analyses.causal_patching import CausalPatching
from analyses.cli import main
from analyses.results.result import Result
from probes.models.backends.native import NativeModel
from probes.points import Address
from probes.prompts import Prompt
from probes.store import ActivationStore

CAUSAL = tuple(family for family in FAMILIES if family != "bert")
CLEAN, CORRUPTED = (5, 6, 7, 8, 9, 10), (5, 6, 17, 8, 19, 10)


def logits(model: NativeModel, tokens: tuple[int, ...], **run: object) -> Tensor:
    rows: list[Tensor] = []
    model.run(torch.tensor([tokens]), {Address("logits"): lambda t: rows.append(t[0, -1].clone())}, **run)  # type: ignore[arg-type]
    return rows[0]


def pair_line(model: NativeModel, clean: tuple[int, ...] = CLEAN, corrupted: tuple[int, ...] = CORRUPTED) -> Prompt:
    """A pair whose answers are the tokens that the two runs tell apart best."""
    change = logits(model, clean) - logits(model, corrupted)
    fields = {
        "corrupted_tokens": list(corrupted), "answer_tokens": [int(change.argmax())], "distractor_tokens": [int(change.argmin())],
    }  # fmt: skip
    return Prompt(clean, None, fields)


Passed = dict[Address, Tensor]


def passed_by(model: NativeModel, tokens: tuple[int, ...], components: tuple[str, ...]) -> Passed:
    """What passes components of every layer, by one plain forward."""
    passed: Passed = {}
    at = [Address(component, layer) for component in components for layer in range(model.shape.n_layers)]
    model.run(torch.tensor([tokens]), {a: lambda t, a=a: passed.__setitem__(a, t[0].clone()) for a in at})
    return passed


def naive(model: NativeModel, row: pd.Series, line: Prompt, clean: Passed, corrupted: Passed) -> float:
    """The metric under one cell, by one whole hooked forward that gets what passed in the other prompt's."""
    denoise = row["direction"] == "denoise"
    base = tuple(line.fields["corrupted_tokens"]) if denoise else line.tokens
    address = Address(row["component"], int(row["layer"]))
    source = (clean if denoise else corrupted)[address]
    at = slice(2, None) if row["position"] == -1 else slice(int(row["position"]), int(row["position"]) + 1)

    def put(tensor: Tensor) -> Tensor:
        out = tensor.clone()
        if row["component"] == "pattern":
            out[0, row["head"], at] = source[row["head"], at]
        elif row["head"] >= 0:
            out[0, at, row["head"]] = source[at, row["head"]]
        else:
            out[0, at] = source[at]
        return out

    last = logits(model, base, writes={address: put})
    return float(last[line.fields["answer_tokens"]].mean() - last[line.fields["distractor_tokens"]].mean())


def run(model: NativeModel, lines: list[Prompt], store: ActivationStore, **options: object) -> dict[str, pd.DataFrame]:
    settings = {"min_gap": 0.0, "min_pairs": 1, "nulls": "none", **options}
    return dict(CausalPatching(**settings).run(model, lines, store=store).tables)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "heads"),
    [*((family, "by_position") for family in CAUSAL), ("llama", "all_positions"), ("phi", "all_positions")],
)
def test_every_cell_is_the_naive_one(family: str, heads: str, store: ActivationStore) -> None:
    model = native(family)
    line = pair_line(model)
    every = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern")
    components = tuple(c for c in every if model.refusal(Address(c, 0)) is None)
    cells = run(model, [line], store, components=components, heads=heads)["cells"]
    gap = float(cells["m_patched"].where(cells["position"] == 0).groupby(cells["direction"]).mean().diff().iloc[-1])
    sources = [passed_by(model, tokens, components) for tokens in (CLEAN, CORRUPTED)]
    for _, row in cells.sample(min(len(cells), 30), random_state=0).iterrows():
        expected = naive(model, row, line, *sources)
        assert row["m_patched"] == pytest.approx(expected, abs=1e-4 * max(1.0, abs(expected))), dict(row)
    assert gap > 0


def test_the_command_writes_the_cells_of_given_pairs(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = NativeModel(make("llama"), ref="folder", weights="folder")
    lines = [pair_line(model, (5, 6, 7, 8), (5, 6, 17 + i, 8)) for i in range(4)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"tokens": list(p.tokens), **p.fields}) for p in lines))
    words = f"run causal_patching --model {llama_folder} --prompts {file} --components resid_post,attn_out,mlp_out,z --heads by_position"
    words += f" --nulls none --min-gap 0 --out {tmp_path / 'out'} --store {tmp_path / 'store'}"
    assert main([*words.split(), "--dry-run"]) == 0
    assert "block-rows" in capsys.readouterr().out
    assert main(words.split()) == 0
    cells = Result.load(tmp_path / "out").tables["cells"]
    live = cells[~cells["exact_zero"]]
    assert set(live["position"]) == {2, 3}
    assert (cells[cells["exact_zero"]]["recovery"] == 0).all()
    names = ("resid_post", "attn_out", "mlp_out", "z")
    clean, *corrupted = (
        passed_by(model, tokens, names) for tokens in (lines[0].tokens, *(p.fields["corrupted_tokens"] for p in lines))
    )
    for _, row in live.sample(20, random_state=0).iterrows():
        expected = naive(model, row, lines[row["pair"]], clean, corrupted[row["pair"]])
        assert row["m_patched"] == pytest.approx(expected, abs=1e-4)
    assert not list((tmp_path / "store" / "causal_patching").glob("*"))
