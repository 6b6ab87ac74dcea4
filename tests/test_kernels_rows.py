"""The fused kernels give what the reference gives: interpreted on the CPU here, compiled in the tests that need a GPU."""

from __future__ import annotations

import os
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from probes.kernels import RowOutputs, capture_rows, forced, kernels_for, reduce_rows, unpacked
from probes.kernels import eager as reference
from probes.kernels.fused_rows import MAX_BLOCK, as_rows
from probes.reducers import Reducer

interpreted = pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="the kernels are compiled here")
pytestmark = interpreted
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outputs(capacity: int, width: int, storage: torch.dtype, k: int) -> RowOutputs:
    """Every output, filled with a value that no row has."""
    coded = storage == torch.int8
    values = {
        "packed": torch.full((capacity, width), 77, dtype=storage),
        "scale": torch.full((capacity,), 77.0) if coded else None,
        "error": torch.full((capacity,), 77.0) if coded else None,
        "norm": torch.full((capacity,), 77.0),
        "moments": torch.full((capacity, 3), 77.0),
        "change": torch.full((capacity, 2), 77.0),
        "coordinates": torch.full((capacity, k), 77.0),
    }
    return RowOutputs(**values)


def both(tensor: Tensor, index: Tensor, storage: torch.dtype, offset: int = 0, capacity: int | None = None) -> None:
    """Runs reference and fused kernel with every output, and compares."""
    width = tensor.shape[1:].numel()
    previous, basis = rand(len(index), width, seed=1), rand(3, width, seed=2)
    results = []
    for kernels in ("eager", "fused"):
        out = outputs(capacity or len(index), width, storage, 3)
        with forced(kernels):
            capture_rows(tensor, index, out, previous, basis, torch.tensor([offset]))
        results.append(out)
    for field in fields(RowOutputs):
        expected, got = (getattr(out, field.name) for out in results)
        if expected is None:
            assert got is None
        elif field.name == "packed":
            assert torch.equal(expected, got), field.name
        else:
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5, msg=lambda m, n=field.name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", [*DTYPES, torch.int8], ids=str)
def test_every_output_for_every_type(dtype: torch.dtype, storage: torch.dtype) -> None:
    both(rand(9, 37, dtype=dtype), torch.tensor([8, 0, 3, 3]), storage)


@pytest.mark.parametrize("width", [1, 2, 16, 129, 512])
def test_odd_widths(width: int) -> None:
    both(rand(5, width, dtype=torch.bfloat16), torch.tensor([4, 1]), torch.bfloat16)
    both(rand(5, width), torch.tensor([4, 1]), torch.int8)


def test_a_row_wider_than_the_registers_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probes.kernels.fused_rows.MAX_BLOCK", 32)
    both(rand(4, 101) + 100, torch.tensor([2, 0]), torch.float32)
    both(rand(4, 101), torch.tensor([2, 0]), torch.int8)
    assert MAX_BLOCK >= 4096


@pytest.mark.parametrize(
    "view",
    [
        rand(30)[::3],
        rand(6, 40)[:, 3:20],
        rand(6, 40)[:, ::2],
        rand(40, 6).T,
        rand(6, 4, 5).permute(0, 2, 1),
        rand(4, 6, 5).transpose(0, 1),
        rand(6, 3, 4, 5)[:, :, 1:3],
    ],
    ids=["one value", "columns", "every other column", "transposed", "heads last", "heads first", "four axes"],
)
def test_strided_tensors_are_read_where_they_lie(view: Tensor) -> None:
    both(view, torch.tensor([1, 4, 0]), torch.float32)
    if view.ndim < 4:
        assert as_rows(view)[0].data_ptr() == view.data_ptr()


@pytest.mark.parametrize("storage", [torch.float32, torch.int8], ids=str)
def test_masked_rows_read_as_zeros(storage: torch.dtype) -> None:
    index = torch.tensor([-1, 2, -1])
    both(rand(4, 10), index, storage)
    out = outputs(3, 10, storage, 3)
    with forced("fused"):
        capture_rows(rand(4, 10), index, out, rand(3, 10, seed=1), rand(3, 10, seed=2))
    for tensor in out.filled():
        assert not tensor[[0, 2]].any()
        assert tensor[1].any()


def test_no_rows_leave_everything_as_it_was() -> None:
    both(rand(4, 10), torch.empty(0, dtype=torch.long), torch.float32, capacity=2)
    both(rand(0, 10), torch.empty(0, dtype=torch.long), torch.int8, capacity=2)


@pytest.mark.parametrize("offset", [0, 3, 6, 9])
def test_rows_go_to_the_offset_and_never_past_the_end(offset: int) -> None:
    index = torch.tensor([1, 0, 3, 2])
    both(rand(4, 10), index, torch.bfloat16, offset, capacity=8)
    out = torch.full((8, 10), 77.0)
    with forced("fused"):
        capture_rows(rand(4, 10), index, RowOutputs(packed=out), offset=torch.tensor([offset]))
    written = (out != 77).all(dim=1).nonzero()[:, 0].tolist()
    assert written == list(range(offset, min(offset + 4, 8)))


def test_zero_rows_and_zero_predecessors_have_cosine_zero() -> None:
    rows, before = (
        torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
    )
    for kernels in ("eager", "fused"):
        out = torch.full((3, 2), 77.0)
        with forced(kernels):
            capture_rows(rows, torch.arange(3), RowOutputs(change=out), previous=before)
        assert out.tolist() == [[1.0, 0.0], [5.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("kernels", ["eager", "fused"])
def test_int8_rows_are_within_their_recorded_error(kernels: str) -> None:
    rows = rand(6, 50) * torch.logspace(-6, 6, 6)[:, None]
    codes, scale, error = torch.empty(6, 50, dtype=torch.int8), torch.empty(6), torch.empty(6)
    with forced(kernels):
        capture_rows(rows, torch.arange(6), RowOutputs(packed=codes, scale=scale, error=error))
    apart = (rows - codes * scale[:, None]).abs().amax(dim=1)
    torch.testing.assert_close(apart, error, rtol=1e-4, atol=0)
    assert (error <= scale * 0.5001).all()
    assert (codes.abs().amax(dim=1) == 127).all()


@pytest.mark.parametrize("kernels", ["eager", "fused"])
def test_variance_survives_a_large_mean(kernels: str) -> None:
    rows = (torch.arange(1000) % 2).float()[None] + 4096
    out = torch.empty(1, 3)
    with forced(kernels):
        capture_rows(rows, torch.zeros(1, dtype=torch.long), RowOutputs(moments=out))
    assert out[0].tolist() == pytest.approx([4096.5, 0.25, 4097], abs=1e-3)


@pytest.mark.parametrize("kernels", ["eager", "fused"])
def test_numbers_that_are_not_finite_are_not_hidden(kernels: str) -> None:
    rows = torch.tensor([[1.0, float("nan"), 2.0], [float("inf"), 1.0, -2.0]])
    norm, moments = torch.empty(2), torch.empty(2, 3)
    with forced(kernels):
        capture_rows(rows, torch.arange(2), RowOutputs(norm=norm, moments=moments))
    assert norm[0].isnan()
    assert moments[0].isnan().all()
    assert norm[1] == moments[1, 2] == float("inf")


REDUCERS = [
    Reducer(),
    Reducer("int8"),
    Reducer("norm"),
    Reducer("moments"),
    Reducer("mean"),
    Reducer("mean_square"),
    Reducer("project", basis=rand(2, 12, seed=3)),
]


@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda r: r.kind)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reducers(reducer: Reducer, dtype: torch.dtype) -> None:
    tensor, index, counts = rand(20, 3, 4, dtype=dtype), torch.arange(19, 0, -1), [17, 2]
    expected = reference.reduce_rows(tensor, index, counts, reducer)
    with forced("fused"):
        reduced = reduce_rows(tensor, index, counts, reducer)
        into = torch.empty_like(expected)
        assert reduce_rows(tensor, index, counts, reducer, out=into) is into
    assert reduced.dtype == expected.dtype
    if reducer.kind == "int8":
        reduced, into, expected = (unpacked(packed).rows for packed in (reduced, into, expected))
    torch.testing.assert_close(reduced, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(into, expected, atol=1e-5, rtol=1e-5)


def test_a_sequence_without_rows_has_no_mean() -> None:
    from probes.kernels import sequence_means

    for kernels in ("eager", "fused"):
        out = torch.zeros(3, 5)
        with forced(kernels):
            sequence_means(rand(40, 5), torch.arange(40), torch.tensor([0, 33, 33, 40]), out)
        assert out[1].isnan().all()
        torch.testing.assert_close(out[0], rand(40, 5)[:33].mean(0))
        torch.testing.assert_close(out[2], rand(40, 5)[33:].mean(0))


def test_a_cpu_tensor_gets_the_reference_unless_forced() -> None:
    assert kernels_for(rand(1, 1)) == "eager"
    with forced("fused"):
        assert kernels_for(rand(1, 1)) == "fused"
    assert kernels_for(rand(1, 1)) == "eager"


@pytest.mark.parametrize(
    ("out", "extra", "message"),
    [
        (RowOutputs(packed=torch.empty(2, 9)), {}, r"packed has shape \(2, 9\); it must be \[rows, 10\]"),
        (RowOutputs(packed=torch.empty(2, 10, dtype=torch.int32)), {}, r"cannot be packed as torch.int32; legal are"),
        (RowOutputs(packed=torch.empty(2, 10, dtype=torch.int8)), {}, "int8 rows come with a scale and an error"),
        (RowOutputs(change=torch.empty(2, 2)), {}, "change needs previous rows"),
        (RowOutputs(coordinates=torch.empty(2, 3)), {"basis": torch.empty(4, 10)}, r"it must be \[rows, 4\]"),
        (RowOutputs(change=torch.empty(2, 2)), {"previous": torch.empty(1, 10)}, "1 previous rows for 2 rows"),
        (RowOutputs(norm=torch.empty(2)), {"offset": torch.tensor([1.0])}, "the offset is one int64 number"),
    ],
)
def test_operands_that_do_not_fit_are_refused(out: RowOutputs, extra: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        capture_rows(torch.empty(4, 10), torch.tensor([0, 1]), out, **extra)
