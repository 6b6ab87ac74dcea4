"""The second-order terms of windows, and the loss against mean width."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pandas as pd
import pytest
import torch
from families import make
from tiny import native

from analyses.depth_use import DepthUse
from analyses.depth_use.ablations import second_order
from analyses.depth_use.bits_frontier import frontier_orders, points, rounding, runs
from analyses.depth_use.weights import coarser
from analyses.results.result import Result
from probes.edits import logits
from probes.errors import OptionError
from probes.models import weights_digest
from probes.models.backends.native import NativeModel
from probes.store import ActivationStore

PROMPTS = [tuple(range(3 + i, 11 + i)) for i in range(6)]


def test_linear_blocks_lack_the_products_of_three_and_more() -> None:
    g = torch.Generator().manual_seed(0)
    h, (a, b, c) = torch.randn(5, 4, generator=g), torch.randn(3, 4, 4, generator=g)
    apart = [h @ a, h @ b, h @ c]
    second = second_order(lambda x: x @ b, h, apart[1], apart[:1]) + second_order(
        lambda x: x @ c, h, apart[2], apart[:2]
    )
    one = torch.eye(4)
    whole = h @ (one + a) @ (one + b) @ (one + c)
    assert torch.allclose(whole - (h + sum(apart) + second), h @ a @ b @ c, atol=1e-4)


def test_blocks_that_add_nothing_have_no_second_order() -> None:
    h = torch.randn(5, 4)
    assert float(second_order(torch.zeros_like, h, torch.zeros_like(h), [h, h]).abs().max()) == 0
    assert float(second_order(lambda x: x, h, h, [torch.zeros_like(h)]).abs().max()) == 0


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    analysis = DepthUse(
        parts=("block",), skip_prompts=0, erasure_prompts=0, gradient_prompts=0, greedy_steps=0, drop_blocks=0, bits=(16, 3),
        windows=(1, 2, 3), window_pairs=True, frontier_points=3,
    )  # fmt: skip
    return analysis.run(native(), PROMPTS, store=ActivationStore(tmp_path_factory.mktemp("store")))


def test_pairs_make_a_window_of_two_exact_and_mend_one_of_three(result: Result) -> None:
    windows = result.tables["windows"].set_index("width")
    assert windows.loc[1, "error_second_order"].abs().max() < 1e-5
    assert windows.loc[2, "error_second_order"].abs().max() < 1e-5 < 1e-2 < windows.loc[2, "error"].min()
    assert windows.loc[2, "delta_ce_second_order"].abs().max() < 1e-4
    assert windows.loc[3, "error_second_order"] != pytest.approx(windows.loc[3, "error"])
    assert result.figure("windows").data


def test_the_frontier_runs_from_no_change_at_16_bits_to_the_same_end_in_every_order(result: Result) -> None:
    table = result.tables["bits_frontier"]
    assert set(table["order"]) == {"LIM", "LIM, reversed", "ZD", "loss of each block alone", "random"}
    assert (table.groupby("order")["narrow_blocks"].agg(list).map(tuple) == (0, 1, 2, 3)).all()
    ends = table.groupby("mean_bits")["delta_ce"].agg(["min", "max"])
    assert ends.index.tolist() == pytest.approx([3, 3 + 13 / 3, 3 + 26 / 3, 16])
    assert ends.loc[16].abs().max() < 1e-3
    assert ends["min"].iloc[0] == ends["max"].iloc[0]
    assert result.figure("bits_frontier").data


def test_a_point_is_the_loss_of_those_blocks_rounded(result: Result) -> None:
    order = frontier_orders(result.tables["proxies"], 3, 0)["LIM"][0]
    module = make("llama")
    model = NativeModel(module, ref="rounded", weights=weights_digest(module))
    tokens = torch.tensor(PROMPTS)

    def loss() -> float:
        predicted = logits(model, tokens)[:, 1:-1].log_softmax(-1)
        return float(-predicted.gather(2, tokens[:, 2:, None]).mean())

    plain = loss()
    with ExitStack() as stack:
        for index, layer in enumerate(order):
            stack.enter_context(coarser(module.model.layers[layer], 3 if index < 2 else 16))
        # A changed module is another model.
        model = NativeModel(module, ref="rounded", weights="rounded")
        changed = loss()
    row = result.tables["bits_frontier"].query("order == 'LIM' and narrow_blocks == 2")
    assert float(row["delta_ce"].iloc[0]) == pytest.approx(changed - plain, abs=1e-4)


def test_rounding_starts_from_the_own_weights_each_time_and_gives_them_back() -> None:
    module = make("gpt2")
    block, digest = module.transformer.h[1], weights_digest(module)
    with rounding({1: block}) as set_widths:
        set_widths({1: 2})
        set_widths({1: 8})
        twice = weights_digest(module)
    assert weights_digest(module) == digest
    with rounding({1: block}) as set_widths:
        set_widths({1: 8})
        assert weights_digest(module) == twice != digest


def test_points_runs_and_orders_by_hand() -> None:
    assert points(30, 4) == [0, 8, 15, 22, 30]
    assert points(2, 5) == [0, 1, 2]
    assert (runs(2, 5), runs(30, 0)) == (2 + 7, 0)
    proxies = pd.DataFrame(
        {"layer": [0, 2, 4], "lim": [-0.1, -0.9, -0.5], "zd": [0.1, 0.3, 0.2], "delta_ce_int4": [3.0, 1, 2]}
    )
    orders = frontier_orders(proxies, 4, 0)
    assert orders["LIM"] == [[2, 4, 0]]
    assert orders["LIM, reversed"] == [[0, 4, 2]]
    assert orders["ZD"] == [[2, 4, 0]]
    assert orders["loss of each block alone"] == [[2, 4, 0]]
    assert all(np.array_equal(np.sort(order), [0, 2, 4]) for order in orders["random"])


def test_a_frontier_of_one_width_is_refused() -> None:
    with pytest.raises(
        OptionError, match=r"frontier_points needs two widths, and bits is \(8,\): give two, such as 8,4"
    ):
        DepthUse(bits=(8,), frontier_points=4)
