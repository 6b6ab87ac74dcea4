"""What checks shapes and types while tests run: `make shapes`."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""Beartype, to which an int is a float as it is to mypy."""
