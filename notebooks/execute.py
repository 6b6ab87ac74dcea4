"""Executes notebooks where they lie and keeps their outputs: small, in order, and the same on every machine.

python notebooks/execute.py [NAME...]        all of them where none is named

Keeps beside them the digest of the cells they come from and what `facts.py` asks of the variables, so that the tests
need not execute a notebook on the real model to hold its words against it.
Needs a Chrome or Chromium, and the extra `images` (kaleido), for the pictures of figures.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nbformat
from facts import FACTS

HERE = Path(__file__).parent
STORE = "~/.cache/bathyscope/store"
"""Stands for the store of the machine that executed them."""
SECONDS = re.compile(r", \d+(\.\d+)? s(?=<|$|\n)")
RENDERER = "plotly_mimetype+png"
"""A figure that moves where Plotly is at hand, and a picture of it for every other reader."""
DIGITS = 5
"""Significant digits of a number in a figure; no screen shows more."""


def execute(path: Path, root: Path) -> None:
    """Executes one notebook on a store in `root` and writes it back with its outputs."""
    notebook = nbformat.read(path, 4)
    facts = run(notebook, FACTS[path.stem], root)
    kept(notebook, {str(root / "store"): STORE, str(root): ".", str(Path.home()): "~"})
    notebook.metadata["bathyscope"] = {"cells": digest(notebook, FACTS[path.stem]), "facts": facts}
    nbformat.write(notebook, path)
    sys.stdout.write(f"{path.name}: {path.stat().st_size:,} bytes\n")


def run(notebook: Any, expressions: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Executes a notebook in `folder`, where what it saves lands; returns what `expressions` say of its variables."""
    entries = ", ".join(f"{name!r}: {expression}" for name, expression in expressions.items())
    from nbclient import NotebookClient

    source = f"import json\nprint(json.dumps({{{entries}}}, default=lambda x: x.item()))"
    notebook.cells.append(nbformat.v4.new_code_cell(source))
    client = NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    facts: dict[str, Any] = json.loads(notebook.cells.pop().outputs[0].text, parse_constant=lambda _: None)
    return facts


def digest(notebook: Any, expressions: Mapping[str, str]) -> str:
    """What tells the code of a notebook, and what is asked of it, from any other."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps([code, dict(expressions)], sort_keys=True).encode()).hexdigest()


def kept(notebook: Any, places: dict[str, str]) -> Any:
    """The notebook with outputs that say nothing of the machine, of the time it took, or of when it was."""
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            output.pop("metadata", None)
            if output.output_type != "stream":
                output.metadata = {}
            for part in ("text", "data"):
                if part in output:
                    output[part] = mapped(output[part], lambda text: worded(text, places), rounded)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def mapped(value: Any, text: Callable[[str], str], number: Callable[[float], float]) -> Any:
    """A value of JSON with every text and every number changed."""
    if isinstance(value, dict):
        return {key: mapped(inner, text, number) for key, inner in value.items()}
    if isinstance(value, list):
        return [mapped(inner, text, number) for inner in value]
    return text(value) if isinstance(value, str) else number(value) if isinstance(value, float) else value


def worded(text: str, places: dict[str, str]) -> str:
    """The text without seconds, and with names for the places of this machine."""
    for place, name in places.items():
        text = text.replace(place, name)
    return SECONDS.sub("", text)


def rounded(number: float) -> float:
    """A number to the digits that are kept."""
    return float(f"{number:.{DIGITS}g}")


def main(names: list[str]) -> None:
    """Executes the named notebooks, or all."""
    paths = [HERE / f"{name}.ipynb" for name in names] or sorted(HERE.glob("*.ipynb"))
    with tempfile.TemporaryDirectory(prefix="bathyscope-") as folder:
        root = Path(folder).resolve()
        os.environ |= {
            "BATHYSCOPE_STORE": str(root / "store"),
            "PLOTLY_RENDERER": RENDERER,
            "PYTHONPATH": os.pathsep.join([str(HERE.parent.resolve()), os.environ.get("PYTHONPATH", "")]),
            "PYTHONWARNINGS": "ignore:IProgress not found",
        }
        for path in paths:
            execute(path, root)


if __name__ == "__main__":
    main(sys.argv[1:])
