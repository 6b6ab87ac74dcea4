"""Processor seconds until commands that need no model have answered, and until runs on held rows are saved.

Below them what Python needs to import the libraries that such a run computes with, which no run can be quicker than.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = ("torch", "pandas, pyarrow.parquet", "plotly.graph_objects", "tokenizers")
HELD = ("logit_lens", "voids")
"""Analyses of which the rows are held."""
COMMAND = "import sys; from analyses.cli import main; sys.exit(main(sys.argv[1:]))"
SAVED = """
import os, sys
from analyses.cli import main
code, used = main(sys.argv[1:]), os.times()
print(used.user + used.system, file=sys.stderr)
sys.exit(code)
"""
"""Says what was used until the result was saved, before Python ends."""
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
    ["capture", "--model", "no-such-model", "--prompts", "{prompts}", "--points", "embed"],
    ["edit", "--model", "no-such-model", "--text", "a"],
    ["lens", "fit", "--model", "no-such-model", "--out", "no-such.lens"],
    ["lens", "fit", "--model", "smollm2-135m", "--out", "{folder}"],
    ["lens", "show", "{folder}"],
    ["run", "logit_lens", "--model", "smollm2-135m", "--text", "a", "--lens", "{folder}"],
    ["run", "voids", "--model", "smollm2-135m"],
    ["run", "voids", "--model", "smollm2-135m", "--text", "a", "--edit", "zero"],
    ["run", "voids", "--model", "smollm2-135m", "--text", "a", "--store", "{prompts}"],
    ["run", "voids", "--model", "smollm2-135m", "--prompts", "{malformed}"],
    ["edit", "--model", "smollm2-135m", "--text", "a", "--edit", "no-such-edit"],
    ["capture", "--model", "smollm2-135m", "--prompts", "{prompts}", "--points", "no_such_point"],
    ["store", "import", "vllm", "no-such-folder", "--of", "a", "--layers", "1"],
    ["demo", "--out", "{prompts}"],
    ["check", "no-such-model"],
    ["batch", "no-such-study.toml"],
    ["batch", "{malformed}"],
    ["report", "no-such-folder"],
]


def processor_seconds(args: list[str], code: str = COMMAND) -> float:
    """User and system seconds of a command, its children included; sources are compiled once, as where they are installed."""
    before = os.times()
    ran(args, code)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def seconds_until_saved(args: list[str]) -> float:
    """User and system seconds of a run until its result is saved."""
    return float(ran(args, SAVED).split()[-1])


def ran(args: list[str], code: str) -> str:
    """Run a command in a process of its own; return what it says on the way."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, check=False, env=environment, text=True
    ).stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        places = {
            f"{{{name}}}": str(Path(folder) / name) for name in ("prompts", "malformed", "folder", "store", "out")
        }
        prompts, malformed, other, store, out = places.values()
        Path(prompts).write_text('{"text": "The capital of France is"}\n' * 4)
        Path(malformed).write_text("The capital of France is\n")
        Path(other).mkdir()
        saved = ["--model", given.model, "--prompts", prompts, "--store", store, "--out", out]
        held_runs = [["run", name, *saved] for name in HELD]
        commands = [[places.get(arg, arg) for arg in args] for args in [*QUICK, *held_runs]]
        for args in commands:
            processor_seconds(args)  # so that the rows are there, and all sources compiled
        print("| command | processor seconds (median) | slowest |\n|---|---|---|")
        for args in commands:
            line([processor_seconds(args) for _ in range(given.rounds)], f"bathyscope {said(args, folder)}")
        for args in commands[len(QUICK) :]:
            saved_at = [seconds_until_saved(args) for _ in range(given.rounds)]
            line(saved_at, f"bathyscope {said(args, folder)}", "until the result is saved")
        for number in range(1, len(LIBRARIES) + 1):
            code = f"import {', '.join(LIBRARIES[:number])}"
            line([processor_seconds([], code) for _ in range(given.rounds)], f"python -c '{code}'")


def said(args: list[str], folder: str) -> str:
    """A command's words with its own files by a short name."""
    return " ".join(Path(arg).stem.upper() if arg.startswith(folder) else arg for arg in args)


def line(seconds: list[float], command: str, what: str = "") -> None:
    """Print a row of the table."""
    print(f"| {f'`{command}` {what}'.strip()} | {statistics.median(seconds):.2f} | {max(seconds):.2f} |", flush=True)


if __name__ == "__main__":
    main()
