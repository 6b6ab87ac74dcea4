"""Every fused kernel compiles for an H100 without one, and keeps its numbers in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def usage() -> dict[str, dict[str, int]]:
    script = Path(__file__).with_name("compiled_kernels.py")
    path = os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_every_kernel_is_compiled(usage: dict[str, dict[str, int]]) -> None:
    kinds = [name.split()[0] for name in usage]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"rows": 20, "lens": 14, "means": 3}


def test_nothing_is_spilled(usage: dict[str, dict[str, int]]) -> None:
    assert {name: use for name, use in usage.items() if use["spilled"]} == {}


def test_registers_leave_room_for_many_programs(usage: dict[str, dict[str, int]]) -> None:
    """An SM has 65,536 registers: 64 a thread keep it full, 255 are the most a thread can have."""
    for name, use in usage.items():
        limit = 64 if name.startswith(("rows", "means")) and "16384" not in name else 255
        assert use["registers"] <= limit, (name, use)


def test_shared_memory_fits_an_sm(usage: dict[str, dict[str, int]]) -> None:
    assert max(use["shared"] for use in usage.values()) <= 227 * 1024
