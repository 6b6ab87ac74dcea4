"""What a benchmark measured as lines of JSON: printed, and kept where a file is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def write(out: Path | None, *records: Mapping[str, object]) -> None:
    """Print one line a record, and write them to `out` where it is given."""
    lines = "\n".join(map(json.dumps, records))
    print(lines)
    if out:
        out.write_text(lines + "\n", encoding="utf-8")
