"""The names of lenses that an option takes, checked before anything is read through one."""

from __future__ import annotations

from pathlib import Path

from probes.errors import OptionError, unknown
from probes.lenses.card_files import read_card

LENS_HELP = "logit, or the folder of a lens that `bathyscope lens fit` or `lens import` wrote."


def check_lens(name: str, *more: str) -> None:
    """Refuse what is neither a lens without a fit, nor one of `more`, nor the folder of a lens.

    Raises:
        OptionError: a name without a folder there, or a folder that is no lens.
    """
    legal = ("logit", *more)
    if name in legal:
        return
    if Path(name).is_dir():
        read_card(name)
        return
    if name == "jacobian":
        raise OptionError(
            "a Jacobian lens takes long to fit: run `bathyscope lens fit --kind jacobian` once, and give its folder"
        )
    raise OptionError(f"{unknown('lens', name, legal)} Or give the folder of a lens that `bathyscope lens fit` wrote.")
