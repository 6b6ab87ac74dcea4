"""The README's parity table: every backend against plain hooks, on tiny random models of many families.

Run as `bathyscope bench parity`; `--write` puts the table between the README's markers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from conformance import addresses, read
from families import FAMILIES, prompt, shared
from marked import write_between
from reference import expected

from probes.errors import ModelError
from probes.models import BACKENDS, Model, from_hf
from probes.points import POINTS

TOLERANCE = 1e-5


def against_hooks(model: Model, family: str) -> dict[str, float | None]:
    """By point: the largest deviation from plain hooks over all layers, relative to max(1, magnitude); None: refused."""
    right, tokens = expected(family), prompt(rows=2)
    given = [a for point in POINTS for a in addresses(point, model) if model.refusal(a) is None]
    rows = read(model, given, tokens)
    worst: dict[str, float | None] = dict.fromkeys(POINTS)
    for address, tensor in rows.items():
        reference = right[str(address)]
        error = float((tensor - reference).abs().max()) / max(1.0, float(reference.abs().max()))
        worst[address.point] = max(worst[address.point] or 0.0, error)
    return worst


def cell(worst: dict[str, float | None]) -> str:
    """How many points are equal, and the names of those refused and of those that differ."""
    refused = [f"`{point}`" for point, error in worst.items() if error is None]
    wrong = [f"**{point} is off by {error:.0e}**" for point, error in worst.items() if error and error > TOLERANCE]
    equal = sum(error is not None and error <= TOLERANCE for error in worst.values())
    return (f"{equal}, without {', '.join(refused)}" if refused else f"all {equal}") + "".join(f"; {w}" for w in wrong)


def cells(family: str, largest: dict[str, float]) -> tuple[str, ...]:
    """One cell a backend; `largest` collects the largest deviation of each."""
    cells = []
    for backend in BACKENDS:
        try:
            worst = against_hooks(from_hf(shared(family), backend=backend, ref=family), family)
        except ModelError:
            cells.append("model refused")
            continue
        largest[backend] = max([largest.get(backend, 0.0), *(error or 0.0 for error in worst.values())])
        cells.append(cell(worst))
    return tuple(cells)


def parity_table() -> str:
    """The whole table as markdown; families with the same cells share a line."""
    largest: dict[str, float] = {}
    lines: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES:
        lines.setdefault(cells(family, largest), []).append(family)
    rows = [f"| {', '.join(families)} | {' | '.join(cells)} |" for cells, families in lines.items()]
    head = [f"| family | {' | '.join(BACKENDS)} |", "|---" * (len(BACKENDS) + 1) + "|"]
    deviations = " | ".join(f"{largest[backend]:.0e}" for backend in BACKENDS)
    return "\n".join([*head, *rows, f"| largest deviation | {deviations} |"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    table = parity_table()
    print(table)
    if parser.parse_args().write:
        write_between("parity", ROOT / "README.md", table)
