"""The CUDA benchmark runs end to end without a GPU, at a size where its numbers mean nothing."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "capture_cuda.py"
OURS = (
    "all rows to the host",
    "all rows to the store",
    "norm only",
    "last only",
    "lens of 8 ids, last token",
    "lens of 8 ids, every token",
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """The script as a program, in this process, which has what it imports."""

    def program(*options: str) -> object:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
        monkeypatch.syspath_prepend(str(SCRIPT.parent))
        return runpy.run_path(str(SCRIPT), run_name="__main__")

    return program


def test_every_way_is_measured_on_equal_rows(
    tmp_path: Path, run: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.md"
    run("--device", "cpu", "--shape", "tiny", "--work", "prefill", "--rounds", "1", "--out", str(out))
    text, said = out.read_text(), capsys.readouterr().out
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
        assert any(row.startswith(way) for row in measured) or f"left out: {name}" in said
    assert not any(f"left out: {name} (rows differ" in said for name in ("bathyscope", "plain"))
    assert "aim" not in text


def test_a_missing_gpu_is_said_in_one_line(run: Callable[..., object]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == "no CUDA device here; --device cpu --shape tiny runs the script itself"
