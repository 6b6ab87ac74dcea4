"""Captures on a busy machine: alone, two at once, and beside a busy loop, for several ways that waiting threads wait.

Each capture is a process of its own with an empty store; rounds are interleaved. Only the capture is timed, not the start.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from probes.idle_threads import CHOICES, SPINS

WAYS: dict[str, dict[str, str]] = {
    "as shipped": {},
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
CAPTURE = """
import sys, tempfile, time
from probes import ActivationStore, Need, load_model
from probes.capture.run import capture
model = load_model(sys.argv[1])
texts = [f"{i} is a number, and {i * i} is its square; the next one after it is" for i in range(int(sys.argv[2]))]
with tempfile.TemporaryDirectory() as folder:
    capture(model, texts[:2], [Need("resid_post.*")], ActivationStore(folder))
print("ready", flush=True)
sys.stdin.readline()
with tempfile.TemporaryDirectory() as folder:
    started = time.perf_counter()
    capture(model, texts, [Need("resid_post.*")], ActivationStore(folder))
    print(time.perf_counter() - started, flush=True)
"""
BUSY = "while True: pass"


def captures(number: int, settings: dict[str, str], model: str, prompts: int) -> list[float]:
    """Seconds of each of so many captures that begin together."""
    environment = {**{k: v for k, v in os.environ.items() if k not in (*CHOICES, "OMP_NUM_THREADS")}, **settings}
    command = [sys.executable, "-c", CAPTURE, model, str(prompts)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen(command, **pipes) for _ in range(number)]  # type: ignore[call-overload]
    for process in processes:
        assert process.stdout.readline().strip() == "ready", "the capture did not start"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    return [float(process.communicate()[0]) for process in processes]


@contextmanager
def busy_loop() -> Iterator[None]:
    """A process that keeps one core busy."""
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=out)
        try:
            yield
        finally:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS)[:2])
    given = parser.parse_args()
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(given.rounds):
        for way in given.ways:
            settings = WAYS[way]
            seconds.setdefault((way, "alone"), []).extend(captures(1, settings, given.model, given.prompts))
            seconds.setdefault((way, "two"), []).append(max(captures(2, settings, given.model, given.prompts)))
            with busy_loop():
                seconds.setdefault((way, "busy"), []).extend(captures(1, settings, given.model, given.prompts))
    print(f"{given.prompts} prompts on {given.model}, {os.cpu_count()} cores, {given.rounds} rounds, seconds (medians)")
    print(f"as shipped: GOMP_SPINCOUNT={SPINS}\n")
    print(f"| waiting | alone | two at once | beside a busy loop | two at once / alone | alone / {given.ways[-1]} |")
    print("|---|---|---|---|---|---|")
    last = statistics.median(seconds[given.ways[-1], "alone"])
    for way in given.ways:
        alone, two, busy = (statistics.median(seconds[way, kind]) for kind in ("alone", "two", "busy"))
        print(f"| {way} | {alone:.1f} | {two:.1f} | {busy:.1f} | {two / alone:.2f} | {alone / last:.2f} |")


if __name__ == "__main__":
    main()
