"""Captures on a busy machine: alone, two at once, and beside a busy loop, for several ways that waiting threads wait.

Each way has two processes, which load the model once; every capture has an empty store, and rounds are interleaved. Only
captures are timed, not the start.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from probes.idle_threads import CHOICES, SPINS

WAYS: dict[str, dict[str, str]] = {
    "as shipped": {},
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
KINDS = ("alone", "two at once", "beside a busy loop")
"""What runs beside a capture."""
CAPTURE = """
import sys, tempfile, time
from probes import ActivationStore, Need, load_model
from probes.capture.run import capture
model = load_model(sys.argv[1])
texts = [f"{i} is a number, and {i * i} is its square; the next one after it is" for i in range(int(sys.argv[2]))]

def seconds(texts):
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        capture(model, texts, [Need("resid_post.*")], ActivationStore(folder))
        return time.perf_counter() - started

seconds(texts[:2])
print("ready", flush=True)
while sys.stdin.readline():
    print(seconds(texts), flush=True)
"""
BUSY = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
while True:
    pass
"""
"""Both end with the process that started them, however that one ends: then their input is closed."""


@contextmanager
def child(code: str, *args: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `code` inside, with these settings alone of those that decide how threads wait."""
    environment = {k: v for k, v in os.environ.items() if k not in (*CHOICES, "OMP_NUM_THREADS")}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**environment, **settings},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def answer(process: subprocess.Popen[str]) -> str:
    """The next line that a process says."""
    assert process.stdout is not None
    if not (line := process.stdout.readline().strip()):
        raise SystemExit("a capture ended before it was measured; its message is above")
    return line


def captures(processes: Sequence[subprocess.Popen[str]]) -> list[float]:
    """Seconds of a capture in each process, all begun together."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return [float(answer(process)) for process in processes]


def measured(model: str, prompts: int, rounds: int, ways: Sequence[str]) -> dict[tuple[str, str], list[float]]:
    """Seconds of captures by way of waiting and by what runs beside them, one each round."""
    seconds: dict[tuple[str, str], list[float]] = {(way, kind): [] for way in ways for kind in KINDS}
    with ExitStack() as running:
        pairs = {}
        for way in ways:
            pairs[way] = [running.enter_context(child(CAPTURE, model, str(prompts), **WAYS[way])) for _ in range(2)]
            for process in pairs[way]:
                answer(process)
        for number in range(rounds):
            for way, pair in pairs.items():
                taken = [captures(pair[:1])[0], max(captures(pair))]
                with child(BUSY):
                    taken += captures(pair[:1])
                for kind, value in zip(KINDS, taken, strict=True):
                    seconds[way, kind].append(value)
                said = ", ".join(f"{value:.1f} s {kind}" for kind, value in zip(KINDS, taken, strict=True))
                print(f"round {number + 1} of {rounds}, {way}: {said}", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS)[:2])
    given = parser.parse_args()
    seconds = measured(given.model, given.prompts, given.rounds, given.ways)
    print(f"{given.prompts} prompts on {given.model}, {os.cpu_count()} cores, {given.rounds} rounds, seconds (medians)")
    print(f"as shipped: GOMP_SPINCOUNT={SPINS}\n")
    print(f"| waiting | {' | '.join(KINDS)} | two at once / alone | alone / {given.ways[-1]} |")
    print("|---|---|---|---|---|---|")
    last = statistics.median(seconds[given.ways[-1], "alone"])
    for way in given.ways:
        alone, two, busy = (statistics.median(seconds[way, kind]) for kind in KINDS)
        print(f"| {way} | {alone:.1f} | {two:.1f} | {busy:.1f} | {two / alone:.2f} | {alone / last:.2f} |")


if __name__ == "__main__":
    main()
