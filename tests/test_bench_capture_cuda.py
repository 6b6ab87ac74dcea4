"""The CUDA benchmark runs end to end without a GPU, at a size where its numbers mean nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "capture_cuda.py"
OURS = (
    "all rows to the host",
    "all rows to the store",
    "norm only",
    "last only",
    "lens of 8 ids, last token",
    "lens of 8 ids, every token",
)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], env=environment, capture_output=True, text=True, check=False
    )


def test_every_way_is_measured_on_equal_rows(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    process = run("--device", "cpu", "--shape", "tiny", "--work", "prefill", "--rounds", "1", "--out", str(out))
    assert process.returncode == 0, process.stderr[-2000:]
    text = out.read_text()
    assert "CPU" in text.splitlines()[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    measured = {line.split(" | ")[0].removeprefix("| "): line.count("|") for line in rows}
    assert {f"bathyscope, {name}" for name in OURS} <= set(measured)
    assert {"plain forward", "plain forward without logits", "plain hooks with .cpu()"} <= set(measured)
    assert set(measured.values()) == {11}
    peers = {
        "TransformerLens": "TransformerLens run",
        "nnsight": "nnsight tracer",
        "interp-engine": "interp-engine eager",
    }
    for name, way in peers.items():
        assert any(row.startswith(way) for row in measured) or f"left out: {name}" in process.stdout
    assert not any(f"left out: {name} (rows differ" in process.stdout for name in ("bathyscope", "plain"))
    assert "aim" not in text


def test_a_missing_gpu_is_said_in_one_line() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    process = run()
    assert process.returncode == 1
    assert process.stderr.strip() == "no CUDA device here; --device cpu --shape tiny runs the script itself"
