"""The flag that names the activation store, for every command that uses one; imports nothing that is slow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StoreDir = Annotated[
    Path | None, typer.Option("--store", help="The activation store's folder; default in the user cache.")
]
