"""Processor seconds until commands that need no model have answered, and until a run on held rows is saved."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

COMMAND = "import sys; from analyses.cli import main; sys.exit(main(sys.argv[1:]))"
QUICK = [
    ["--help"],
    ["--version"],
    ["models", "ls"],
    ["store", "ls"],
    ["run", "--help"],
    ["run", "no_such_analysis"],
    ["run", "logit_lens", "--no-such-option", "3"],
    ["run", "logit_lens", "--model", "no-such-model", "--top-k", "0"],
    ["run", "voids", "--model", "no-such-model", "--prompts", "no-such-file.jsonl"],
    ["run", "voids", "--model", "no-such-model", "--prompts", "{prompts}"],
    ["report", "no-such-folder"],
]


def processor_seconds(args: list[str]) -> float:
    """User and system seconds of the command, its children included."""
    before = os.times()
    subprocess.run([sys.executable, "-c", COMMAND, *args], capture_output=True, check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prompts, store, out = (str(Path(folder) / name) for name in ("prompts.jsonl", "store", "out"))
        Path(prompts).write_text('{"text": "The capital of France is"}\n' * 4)
        held_run = ["run", "logit_lens", "--model", given.model, "--prompts", prompts, "--store", store, "--out", out]
        processor_seconds(held_run)  # so that the rows are there
        print("| command | processor seconds (median) | slowest |\n|---|---|---|")
        for args in [*QUICK, held_run]:
            filled = [prompts if arg == "{prompts}" else arg for arg in args]
            seconds = [processor_seconds(filled) for _ in range(given.rounds)]
            shown = " ".join(
                "FILE" if arg == prompts else arg for arg in filled if not arg.startswith(folder) or arg == prompts
            )
            print(f"| `bathyscope {shown}` | {statistics.median(seconds):.2f} | {max(seconds):.2f} |")


if __name__ == "__main__":
    main()
