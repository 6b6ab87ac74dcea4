"""Writes the comparison of lenses into the pages: python docs/lens_tables.py LENSES_RUN LATENT_RUN...

LENSES_RUN is a saved run of `lenses` on two-hop questions with a tuned and a Jacobian lens and a Patchscope, judged on text;
each LATENT_RUN one of `latent_language` through another lens. Tables stand between lines `% begin NAME` and `% end NAME`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

METHODS = Path(__file__).parent / "methods"
ASKED = (("answer", "end", 1), ("bridge", "end", 10), ("bridge", "entity", 10))
"""What is looked for in a two-hop question, where, and among how many first tokens."""


def interval(row: Any, digits: int = 2, value: str = "value") -> str:
    """A number with its 95 % interval."""
    return f"{row[value]:.{digits}f} [{row['ci_low']:.{digits}f}, {row['ci_high']:.{digits}f}]"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table's lines."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def listed(layers: Sequence[int]) -> str:
    """Layers in words."""
    return ", ".join(map(str, layers)) if len(layers) else "none"


def quality(tables: Path, kinds: dict[str, str]) -> str:
    """Divergence from the output by layer, and at which layers one lens lies below another with intervals apart."""
    table = pd.read_parquet(tables / "quality.parquet").query("measure == 'kl_to_final'")
    table = table.assign(
        column=[named(kinds, lens, control) for lens, control in table[["lens", "control"]].to_numpy()]
    )
    columns = list(dict.fromkeys(table["column"]))
    cells = table.set_index(["layer", "column"])
    layers = sorted(set(table["layer"]))[:-1]
    rows = [[str(at), *(interval(cells.loc[(at, name)], 1) for name in columns)] for at in layers]
    said = [
        f"- {a} below {b}, intervals apart, at layers: {listed(apart(cells, layers, a, b))}; above it at: "
        f"{listed(apart(cells, layers, b, a))}."
        for a, b in (("tuned", "logit"), ("tuned", "tuned, shuffled"), ("Jacobian", "logit"), ("Jacobian", "tuned"),
                     ("Jacobian", "Jacobian, shuffled"), ("Jacobian", "Jacobian, rotated"))
        if {a, b} <= set(columns)
    ]  # fmt: skip
    texts, n_rows = int(table["n_texts"].max()), int(table["n_rows"].max())
    head = f"KL(model ‖ lens) in nats on {n_rows} positions of {texts} texts that no lens was fitted on, with 95 % intervals over texts."
    return "\n\n".join([head, markdown(["layer", *columns], rows), "Of the layers in the table:\n\n" + "\n".join(said)])


def named(kinds: dict[str, str], lens: str, control: str) -> str:
    """A column's heading."""
    if control == "unigram":
        return "token frequencies"
    return kinds[lens] + (f", {control.replace('_', ' ')}" if control else "")


def apart(cells: pd.DataFrame, layers: Sequence[int], a: str, b: str) -> list[int]:
    """Layers at which `a`'s interval lies below `b`'s."""
    return [at for at in layers if cells.loc[(at, a)]["ci_high"] < cells.loc[(at, b)]["ci_low"]]


def passes(tables: Path, kinds: dict[str, str]) -> str:
    """Known tokens read at a layer chosen on the other half of the questions."""
    table = pd.read_parquet(tables / "pass_at_k.parquet").query("chosen == 'other_half'")
    rows = []
    for name, place, k in ASKED:
        own = table.query("name == @name and position_name == @place and k == @k").set_index("lens")
        rows.append(
            [
                f"{name} at {place}, first {k}",
                *(f"{interval(own.loc[lens])}; {own.loc[lens]['chance']:.2f}" for lens in kinds),
            ]
        )
    head = (
        f"{int(table['n'].max())} two-hop questions, at the layer that is best on the other half of them, the last left out: the share "
        "read, its 95 % Wilson interval, and after the semicolon the share for other questions' words."
    )
    return head + "\n\n" + markdown(["what, where", *kinds.values()], rows)


def settled(tables: Path, run: dict[str, Any]) -> str:
    """What the run notes: which lens is solid where, and the band."""
    return "\n".join(f"- {note}" for note in run["notes"] if re.search("layers, intervals apart|band", note))


def latent(runs: Sequence[Path]) -> str:
    """Probability of the word in each language by layer, one column a lens."""
    curves, names, items = [], [], 0
    for folder in runs:
        lens = json.loads((folder / "result.json").read_text())["options"]["lens"]
        card = Path(lens) / "lens.json"
        names.append(json.loads(card.read_text())["kind"] if card.is_file() else lens)
        curves.append(pd.read_parquet(folder / "tables" / "curve.parquet"))
        items = int(curves[-1]["n"].max())
    pair = curves[0]["pair"].iloc[0]
    parts = [
        f"{pair}, {items} words, 95 % intervals over words; after the semicolon, shuffled words of the same language."
    ]
    for role in dict.fromkeys(curves[0]["role"]):
        rows = []
        for layer in sorted(set(curves[0]["layer"]))[-1::-3][::-1]:
            cells = [curve[(curve["role"] == role) & (curve["layer"] == layer)].iloc[0] for curve in curves]
            rows.append([str(layer), *(f"{interval(cell, 3, 'mean')}; {cell['control_mean']:.3f}" for cell in cells)])
        language = curves[0].loc[curves[0]["role"] == role, "language"].iloc[0]
        parts.append(f"Probability of the word in `{language}` ({role}):\n\n" + markdown(["layer", *names], rows))
    lead = []
    for name, folder in zip(names, runs, strict=True):
        table = pd.read_parquet(folder / "tables" / "lead.parquet")
        ahead = table.loc[table["ci_low"] > 0, "layer"]
        lead.append(
            f"- {name}: the latent language lies above the target's, its interval above 0, at layers: {listed(list(ahead))}."
        )
    return "\n\n".join([*parts, "\n".join(lead)])


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between the lines `% begin NAME` and `% end NAME` of a page."""
    whole = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(% begin {name}\n).*?(% end {name}\n)", re.DOTALL)
    if not pattern.search(whole):
        raise SystemExit(f"{page}: no lines % begin {name} and % end {name}")
    page.write_text(pattern.sub(lambda m: f"{m[1]}\n{text}\n\n{m[2]}", whole), encoding="utf-8")


if __name__ == "__main__":
    comparison, *latent_runs = map(Path, sys.argv[1:])
    tables = comparison / "tables"
    kinds = {row.lens: {"jacobian": "Jacobian", "patchscope": "Patchscope"}.get(row.kind, row.kind)
             for row in pd.read_parquet(tables / "lenses.parquet").itertuples()}  # fmt: skip
    put(METHODS / "lenses.md", "quality", quality(tables, kinds))
    put(METHODS / "lenses.md", "known tokens", passes(tables, kinds))
    put(METHODS / "lenses.md", "verdicts", settled(tables, json.loads((comparison / "result.json").read_text())))
    if latent_runs:
        put(METHODS / "latent_language.md", "lenses", latent(latent_runs))
