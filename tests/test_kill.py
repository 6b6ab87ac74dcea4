"""A capture killed at any moment leaves a store that verifies clean and resumes."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import torch
from forked import ended, start
from tiny import native

from probes.capture.needs import Need
from probes.capture.run import capture, plan_capture
from probes.store import ActivationStore

SEQUENCES = [tuple((7 * i + j) % 90 + 3 for j in range(4 + i % 5)) for i in range(120)]


def cut(root: Path, seconds: float) -> bool:
    """Start a capture in a process of its own and kill it after so many seconds; whether it was cut off."""
    model, store = native(), ActivationStore(root)
    child = start(lambda: capture(model, SEQUENCES, [Need("resid_post.*")], store, batch_tokens=1))
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    root, model, rng = tmp_path / "store", native(), random.Random(4)
    left, killed = [len(SEQUENCES)], 0
    for _ in range(10):
        killed += cut(root, rng.uniform(0.005, 0.12))
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
