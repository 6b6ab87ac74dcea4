"""The kernels inside a compiled model: one graph, no break, the numbers of the uncompiled one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from probes.kernels import RowOutputs, capture_rows, lens_rows, sequence_means, torch_operators

needs_compile = pytest.mark.skipif(
    hasattr(capture_rows, "__wrapped__"), reason="torch.compile cannot trace the run-time checks of shape annotations"
)


class Tapped(nn.Module):
    """Two blocks with a hook that packs and measures the stream between them."""

    def __init__(self, out: RowOutputs, means: Tensor, offset: Tensor, basis: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.first.register_forward_hook(self.tap)
        self.out, self.means, self.offset, self.basis = out, means, offset, basis
        self.register_buffer("index", torch.tensor([5, 0, -1]))

    def tap(self, _: nn.Module, __: object, stream: Tensor) -> None:
        rows = stream.flatten(0, 1)
        capture_rows(rows, self.index, self.out, basis=self.basis, offset=self.offset)
        sequence_means(rows, self.index.clamp_min(0), torch.tensor([0, 2, 3]), self.means)
        self.offset += 3

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stream = self.second(self.first(x).relu())
        return stream, lens_rows(
            stream.flatten(0, 1), self.second.weight, self.second.bias, None, self.index[:2], 2
        ).logprobs


def tapped() -> Tapped:
    out = RowOutputs(packed=torch.zeros(6, 8, dtype=torch.bfloat16), norm=torch.zeros(6), coordinates=torch.zeros(6, 2))
    return Tapped(out, torch.zeros(2, 8), torch.zeros(1, dtype=torch.int64), torch.ones(2, 8))


@needs_compile
@torch.inference_mode()
def test_a_compiled_model_keeps_the_kernels_in_one_graph() -> None:
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    plain, compiled = tapped(), tapped()
    run = torch.compile(compiled, backend=backend, fullgraph=True)
    for step in range(2):
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(step))
        for expected, actual in zip(plain(x), run(x), strict=True):
            torch.testing.assert_close(actual, expected)
    for expected, actual in zip(plain.out.filled(), compiled.out.filled(), strict=True):
        assert torch.equal(actual, expected)
        assert actual[[0, 1, 3, 4]].any()
    assert torch.equal(plain.means, compiled.means)
    assert int(compiled.offset) == 6
    assert len(graphs) == 1
    for name in ("capture_rows", "sequence_means", "lens_rows"):
        assert any(name in target for target in graphs[0])


def test_the_operators_keep_torchs_contract() -> None:
    """Schema, fake tensors and functionalisation, as `torch.library.opcheck` sees them."""
    x, index = torch.randn(5, 8), torch.tensor([1, 4])
    packed, norm = torch.zeros(4, 8), torch.zeros(4)
    tests = ("test_schema", "test_faketensor")
    operator = torch.ops.bathyscope
    rows = (x, index, packed, None, None, norm, None, None, None, None, None, torch.tensor([1]))
    torch.library.opcheck(operator.capture_rows.default, rows, test_utils=tests)
    torch.library.opcheck(
        operator.sequence_means.default, (x, index, torch.tensor([0, 1, 2]), torch.zeros(2, 8)), test_utils=tests
    )
    torch.library.opcheck(operator.lens_rows.default, (x, torch.randn(20, 8), None, None, index, 3), test_utils=tests)
    assert torch_operators.capture_rows is capture_rows


@needs_compile
def test_functionalisation_keeps_the_writes() -> None:
    """Through AOT autograd, where a write that the schema does not declare would be lost."""
    out = torch.zeros(2, 8)

    def step(x: Tensor) -> Tensor:
        capture_rows(x * 2, torch.tensor([1, 0]), RowOutputs(packed=out))
        return x + 1

    x = torch.randn(3, 8)
    with torch.no_grad():
        torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(out, 2 * x[[1, 0]])


def test_triton_is_never_imported_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    code = (
        "import sys, torch; from probes.kernels import *; capture_rows(torch.ones(2, 3), torch.tensor([0]), "
        "RowOutputs(norm=torch.empty(1))); import probes.kernels as k; "
        "sys.exit(any(m.startswith('probes.kernels.fused') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
