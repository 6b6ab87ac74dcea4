"""Malformed input drawn at random: values no field expects, files with damage, and the classes of error that are answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from probes.errors import UserError

TIMES = int(os.environ.get("BATHYSCOPE_FUZZ", "1"))
"""How many times the suite's cases are drawn; above 1 they differ from run to run."""

HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 7, 96, 97, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, 1.0, -0.0, 1e308,
    float("nan"), float("inf"), "", " ", "x", "0", "\0", "\ud800", "é", "x" * 5000, "{text}", "../..", "/dev/zero", "~nobody/x",
    [], [[]], {}, {"": []}, [0], [-1], [True], [1.5], ["a"], ["a", "b"], [10**30], [[[[[[]]]]]], {"en": [5]}, {"en": ["dog"], "fr": [10**30]},
]  # fmt: skip
"""Values that have broken readers of input before."""

values = st.sampled_from(HOSTILE) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part, max_size=3),
    max_leaves=6,
)  # fmt: skip


def cases(n: int) -> Callable[[Any], Any]:
    """Draws `n` cases of a property, the same ones in every run of the suite."""
    return settings(
        max_examples=n * TIMES,
        derandomize=TIMES == 1,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


refusing = suppress(UserError)
"""Around what may be refused, in any of the project's own classes; any other exception is a fault."""


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` cut short, with bytes changed, or with pieces put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["change", "cut", "insert", "words", "zeros"]))
        if kind == "change" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(
                st.sampled_from([b"\0", b"[" * 3000, b"9" * 5000, b"\xff\xfe", b"null", b"-1", b"nan", b'"', b"\n"])
            )
        elif kind == "words":
            data[at : at + 8] = draw(st.sampled_from([2**63, 2**64 - 1, 2**40, 10**9, 0])).to_bytes(8, "little")
        else:
            data[at : at + 8] = bytes(8)
    return bytes(data)
