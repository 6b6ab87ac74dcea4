"""The cards of lenses on disk: what a folder's lens is, told without its tensors."""

from __future__ import annotations

import json
from pathlib import Path

from probes.errors import OptionError
from probes.lenses.card import LensCard

CARD = "lens.json"


def read_card(path: str | Path) -> LensCard:
    """Read the card of a lens without its tensors.

    Raises:
        OptionError: no lens there, or a card of another format.
    """
    path = Path(path)
    try:
        values = json.loads((path / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(
            f"lens {str(path)!r} cannot be read ({getattr(error, 'strerror', None) or 'no JSON card'}): give a folder that "
            "`bathyscope lens fit` or `bathyscope lens import` wrote"
        ) from None
    if not isinstance(values, dict):
        raise OptionError(f"lens {str(path)!r}: its card is no JSON object; fit or import the lens again")
    return LensCard.from_json(values, f"lens {str(path)!r}")


def check_free(path: str | Path) -> None:
    """Refuse to replace anything but an earlier lens.

    Raises:
        OptionError: the path is there and is no lens.
    """
    path = Path(path)
    if (path.exists() or path.is_symlink()) and not (path / CARD).is_file():
        raise OptionError(f"--out {str(path)!r} is there and is no lens: give a new folder, such as T.lens")
