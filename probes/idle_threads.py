"""How long torch's threads spin while they wait for one another; imports nothing, since it must come before torch."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

SPINS = "10000"
"""Rounds of waiting before a thread sleeps. libgomp's own 300,000 keep every core busy, so that two runs at once take
longer than one after the other; far fewer slow a run that is alone. `bathyscope bench contention` measures it."""
CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""What a user sets to decide this."""


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads sleep soon, unless the user has chosen; does nothing once torch is imported."""
    if "torch" not in sys.modules and not any(choice in environment for choice in CHOICES):
        environment["GOMP_SPINCOUNT"] = SPINS


def waiting() -> dict[str, str]:
    """Return what is set of `CHOICES`, for the provenance."""
    return {choice: os.environ[choice] for choice in CHOICES if choice in os.environ}
