"""A capture killed at any moment leaves a store that verifies clean and resumes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tiny import native

from probes.capture.needs import Need
from probes.capture.run import capture, plan_capture
from probes.store import ActivationStore

SEQUENCES = [tuple((7 * i + j) % 90 + 3 for j in range(4 + i % 5)) for i in range(120)]

PARENT = """
import os
import sys
from tiny import native
from test_kill import SEQUENCES
from probes.capture.run import capture
from probes.capture.needs import (Need)
from probes.store import ActivationStore
model = native()
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        capture(model, SEQUENCES, [Need("resid_post.*")], ActivationStore(sys.argv[1]), batch_tokens=1)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitpid(child, 0)[1], flush=True)
"""


@contextmanager
def capturing(root: Path) -> Iterator[Callable[[float], bool]]:
    """Starts a capture in a process of its own and kills it after so many seconds; whether it was cut off.

    The captures are children of one process, which imports everything and loads the model once.
    """
    command = [sys.executable, "-c", PARENT, str(root)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        to, answers = parent.stdin, parent.stdout
        answers.readline()

        def ask(word: str) -> int:
            to.write(f"{word}\n")
            to.flush()
            return int(answers.readline())

        def cut(seconds: float) -> bool:
            child = ask("go")
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
            return ask("reap") == signal.SIGKILL

        yield cut
        to.close()


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    root, model, rng = tmp_path / "store", native(), random.Random(4)
    left, killed = [len(SEQUENCES)], 0
    with capturing(root) as cut:
        for _ in range(10):
            killed += cut(rng.uniform(0.005, 0.12))
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
