"""A capture killed at any moment leaves a store that verifies clean and resumes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tiny import native

from probes.capture.needs import Need
from probes.capture.run import capture, plan_capture
from probes.store import ActivationStore

SEQUENCES = [tuple((7 * i + j) % 90 + 3 for j in range(4 + i % 5)) for i in range(120)]

CHILD = """
import sys
from tiny import native
from test_kill import SEQUENCES
from probes.capture.run import capture
from probes.capture.needs import (Need)
from probes.store import ActivationStore
model, store = native(), ActivationStore(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
capture(model, SEQUENCES, [Need("resid_post.*")], store, batch_tokens=1)
"""


def child(root: Path) -> subprocess.Popen[str]:
    """A process that has loaded its model and waits to be told to capture."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert process.stdout is not None
    return process


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    root, model, rng = tmp_path / "store", native(), random.Random(4)
    left, killed = [len(SEQUENCES)], 0
    for _ in range(10):
        process = child(root)
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        process.stdin.write("go\n")
        process.stdin.flush()
        time.sleep(rng.uniform(0.005, 0.12))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        store = ActivationStore(root)
        assert store.verify().damaged == ()
        left.append(plan_capture(model, SEQUENCES, [Need("resid_post.*")], store).forwards)
    assert killed >= 5, "the children must be cut off while they work"
    assert left == sorted(left, reverse=True), "what was committed stays"
    assert left[-1] < left[0]
    activations = capture(model, SEQUENCES, [Need("resid_post.*")], ActivationStore(root))
    assert activations.done.forwards == left[-1]
    clean = capture(model, SEQUENCES, [Need("resid_post.*")], ActivationStore(tmp_path / "clean"))
    for layer in range(3):
        torch.testing.assert_close(
            activations.packed(f"resid_post.{layer}"), clean.packed(f"resid_post.{layer}"), atol=1e-5, rtol=1e-5
        )
