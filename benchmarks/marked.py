"""Results of a benchmark between the markers that a page has for them."""

from __future__ import annotations

from pathlib import Path

from probes.errors import OptionError


def write_between(name: str, path: Path, text: str) -> None:
    """Put text between the markers of a benchmark in a file.

    Raises:
        OptionError: a file without them.
    """
    begin, end = (f"<!-- {name}: {which} -->" for which in ("begin", "end"))
    page = path.read_text(encoding="utf-8")
    if begin not in page or end not in page:
        raise OptionError(f"{path.name} has no markers {begin} and {end}: put them where the run's results belong")
    before, _, rest = page.partition(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
