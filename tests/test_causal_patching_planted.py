"""Causal patching on models whose mechanism is known: a relay, two inputs of an AND or OR, a change that nobody reads."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from scipy.stats import binomtest
from torch import Tensor, nn

from analyses.causal_patching import CausalPatching
from analyses.causal_patching.attribution import Attributed
from analyses.causal_patching.cells import Cell
from analyses.causal_patching.figures import FIGURES
from analyses.causal_patching.graph import Sender
from analyses.causal_patching.levels import NodeLevel, circuit_metrics
from analyses.causal_patching.opened import Opener
from analyses.causal_patching.pairs import pair_of, resolved
from analyses.causal_patching.statistics import map_table
from analyses.interventions import Tally
from probes.errors import PromptError
from probes.models.backends.native import NativeModel
from probes.points import Address
from probes.progress import QUIET
from probes.prompts import Prompt
from probes.store import ActivationStore

WIDTH, HEADS, LAYERS, WORDS = 32, 4, 4, 24
"""Tokens 0 to 23; the token's own dimension, and further ones for what heads and MLPs write."""
FACT, OTHER, ASK, MOVED = 5, 6, 9, 28
ANSWERS = ((1, 2), (7, 8))


class Gate(nn.Module):
    """An MLP that adds to one dimension what a function makes of its input."""

    def __init__(self, function, to: int = MOVED) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function, self.to = function, to
        self.gate_proj = self.up_proj = self.down_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[..., self.to] = self.function(x)
        return out


def planted(copies: dict[tuple[int, int], tuple[int, int]], gates: dict[int, object] | None = None) -> NativeModel:
    """A Llama whose heads attend evenly, its norms linear to a millionth by their epsilon; head (l, h) adds to dimension `to` what it sees in dimension `of`."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, max_position_embeddings=32, pad_token_id=None, tie_word_embeddings=False, rms_norm_eps=1e6,
    )  # fmt: skip
    module = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for norm in [m for name, m in module.named_modules() if "norm" in name]:
            norm.weight.fill_(1000)
        module.model.embed_tokens.weight.copy_(torch.eye(WORDS, WIDTH) * 4)
        for index, layer in enumerate(module.model.layers):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(layer.self_attn, name).weight.zero_()
            for (at, head), (of, to) in copies.items():
                if at == index:
                    row = head * (WIDTH // HEADS)
                    layer.self_attn.v_proj.weight[row, of] = 1
                    layer.self_attn.o_proj.weight[to, row] = 3
            gate = (gates or {}).get(index, lambda x: torch.zeros_like(x[..., 0]))
            layer.mlp = gate if isinstance(gate, Gate) else Gate(gate)
        # One answer grows with what is moved, the other falls, whatever else is in the stream.
        module.lm_head.weight.zero_()
        for answer, distractor in ANSWERS:
            module.lm_head.weight[answer, MOVED], module.lm_head.weight[distractor, MOVED] = 1, -1
    return NativeModel(module, ref="planted", weights="planted")


def run(model: NativeModel, lines: list[Prompt], store: ActivationStore, **options: object) -> dict[str, pd.DataFrame]:
    settings = {"min_gap": 1e-3, "min_pairs": 1, "nulls": "none", "heads": "all_positions", **options}
    return dict(CausalPatching(**settings).run(model, lines, store=store).tables)  # type: ignore[arg-type]


def line(clean: tuple[int, ...], corrupted: tuple[int, ...]) -> Prompt:
    fields = {"corrupted_tokens": list(corrupted), "answer_tokens": [1], "distractor_tokens": [2]}
    return Prompt(clean, None, fields)


def share(cells: pd.DataFrame, direction: str, component: str, layer: int, **at: int) -> float:
    part = cells[(cells["direction"] == direction) & (cells["component"] == component) & (cells["layer"] == layer)]
    for name, value in at.items():
        part = part[part[name] == value]
    return float(part["recovery"].iloc[0])


def test_a_relay_is_handed_over_where_it_was_planted(store: ActivationStore) -> None:
    """Head 2.1 copies the changed token to the end: before it the fact is in the token's row, after it at the end."""
    model = planted({(2, 1): (FACT, MOVED)})
    tables = run(model, [line((3, FACT, ASK), (3, OTHER, ASK))], store, components=("resid_post", "z", "k", "v"))
    cells, window = tables["cells"], tables["window"].set_index(["role", "bound"])["layer"]
    for direction in ("denoise", "noise"):
        for layer in range(LAYERS):
            source, end = (share(cells, direction, "resid_post", layer, position=p) for p in (1, 2))
            assert source == pytest.approx(float(layer < 2), abs=1e-4)
            assert end == pytest.approx(float(layer >= 2), abs=1e-4)
            for head in range(HEADS):
                expected = float((layer, head) == (2, 1))
                assert share(cells, direction, "z", layer, head=head) == pytest.approx(expected, abs=1e-4)
                assert share(cells, direction, "v", layer, head=head) == pytest.approx(expected, abs=1e-4)
                assert share(cells, direction, "k", layer, head=head) == pytest.approx(0, abs=1e-6)
    assert window["-2", "departure"] == 1
    assert window["-1", "arrival"] == 2


@pytest.mark.parametrize(("both", "denoised", "noised"), [(True, 0.0, 1.0), (False, 1.0, 0.0)])
def test_an_and_needs_both_and_an_or_either(both: bool, denoised: float, noised: float, store: ActivationStore) -> None:
    """Two heads bring one fact each to one MLP: which direction sees a single head depends on what the MLP makes of them."""
    first, second = 26, 27

    def gate(x: Tensor) -> Tensor:
        on = (x[..., first] > 1e-3).float(), (x[..., second] > 1e-3).float()
        return on[0] * on[1] if both else torch.maximum(*on)

    model = planted({(1, 0): (FACT, first), (1, 2): (FACT, second)}, {2: gate})
    cells = run(model, [line((3, FACT, ASK), (3, OTHER, ASK))], store, components=("z",))["cells"]
    for head in (0, 2):
        assert share(cells, "denoise", "z", 1, head=head) == pytest.approx(denoised, abs=1e-4)
        assert share(cells, "noise", "z", 1, head=head) == pytest.approx(noised, abs=1e-4)
    assert share(cells, "denoise", "z", 1, head=1) == 0


def test_a_backup_hides_the_head_that_it_stands_in_for(store: ActivationStore) -> None:
    """Head 2.1 speaks only where head 1.0 was silent: noising either takes nothing, noising both takes everything."""
    payload = 27
    backup = Gate(lambda x: torch.where(x[..., MOVED] > 1e-3, torch.zeros_like(x[..., 0]), x[..., FACT]), payload)
    model = planted({(1, 0): (FACT, MOVED), (2, 1): (payload, MOVED)}, {1: backup})
    lines = [line((3, FACT, ASK), (3, OTHER, ASK))]
    cells = run(model, lines, store, components=("z",))["cells"]
    for layer, head in ((1, 0), (2, 1)):
        assert share(cells, "noise", "z", layer, head=head) == pytest.approx(0, abs=1e-4)
    assert share(cells, "denoise", "z", 1, head=0) == pytest.approx(1, abs=1e-4)
    pair = pair_of(0, resolved(model, lines, ["a"], False)[0], False)
    level, opened = NodeLevel(model.shape), CausalPatching(nulls="none")._run(model, [pair], Tally(QUIET), None)
    every = np.arange(len(level.nodes))
    first, second = (level.nodes.index(Sender(*node)) for node in ((1, 0), (2, 1)))
    circuits = [every, np.delete(every, first), np.delete(every, second), np.delete(every, [first, second]), every[:0]]
    full, *lost, none = circuit_metrics(opened, level, circuits, "counterfactual", QUIET)[0]
    assert (full - np.array(lost)) / (full - none) == pytest.approx([0, 0, 1], abs=1e-4)
    assert "does not show that it is unused" in FIGURES["head_map"].caption


def test_saturated_attention_needs_the_fix_for_queries() -> None:
    """Attention is certain in both runs, so that its gradient says nothing of what another query would find."""
    second_ask, gap = ASK + 1, -math.log(1e-6)
    model = planted({(2, 1): (FACT, MOVED)})
    attention, row = model.module.model.layers[2].self_attn, WIDTH // HEADS  # type: ignore[union-attr, index]
    # Of rotary pairs the slowest, which turns by a thousandth a token; embeddings are 4 times a unit.
    slow, size = row + 3, math.sqrt(gap * math.sqrt(WIDTH // HEADS)) / 4
    with torch.no_grad():
        attention.q_proj.weight[slow, ASK], attention.q_proj.weight[slow, second_ask] = size, -size
        attention.k_proj.weight[slow, FACT], attention.k_proj.weight[slow, OTHER] = size, -size
        attention.v_proj.weight[row, OTHER] = -1
    pair = pair_of(0, resolved(model, [line((FACT, OTHER, ASK), (FACT, OTHER, second_ask))], ["a"], False)[0], False)
    cell = Cell("q", 2, 1, 2)
    opened = Opener(model, ("logit_diff",), frozenset({Address("q", 2)})).open(pair, ("denoise",), None)[0]
    exact = float(opened.patched([cell])[0, 0] - opened.base[0])
    one = Attributed(model, pair, "denoise", "logit_diff")
    assert abs(exact) > 1e-2
    assert abs(float(one.scores([cell], "atp")[0])) < 1e-3 * abs(exact)
    assert float(one.with_fix([cell])[0]) == pytest.approx(exact, rel=0.05)


def chance_maps(pool: int, store: ActivationStore, n_maps: int = 16, n: int = 10) -> list[pd.DataFrame]:
    """Maps of disjoint sets of n pairs whose fact is never read: every corrupted prompt holds a token that lowers the answer, and
    what a clean prompt holds in its place is drawn, so that one clean prompt restores as much as another."""
    noisy, lowering, noise = range(12, 22), 22, 27
    rng = np.random.default_rng(pool)
    model = planted({(2, 1): (noise, MOVED)})
    with torch.no_grad():
        embedding = model.module.model.embed_tokens.weight  # type: ignore[union-attr]
        embedding[list(noisy), noise] = torch.from_numpy(rng.normal(size=len(noisy))).float()  # type: ignore[index]
        embedding[lowering, noise] = -10  # type: ignore[index]
    lines = []
    for i in range(n_maps * n):
        pair = line((3, FACT, int(rng.choice(noisy)), ASK), (3, OTHER, lowering, ASK))
        pair.fields["answer_tokens"], pair.fields["distractor_tokens"] = ([token] for token in ANSWERS[i % 2])  # type: ignore[index]
        lines.append(pair)
    tables = run(model, lines, store, components=("z",), directions=("denoise",), nulls="unrelated", seed=pool)
    pairs, cells = tables["pairs"], tables["cells"]
    # The sources of the null lie mostly outside a set: inside it, every pair would be a source once and all would cancel.
    order = rng.permutation(pairs.loc[pairs["kept"], "pair"].to_numpy()).reshape(n_maps, n)
    return [map_table(cells[cells["pair"].isin(drawn)], pairs[pairs["pair"].isin(drawn)], pool) for drawn in order]


def test_a_cell_is_found_by_chance_no_oftener_than_said(store: ActivationStore) -> None:
    """The head moves the whole gap, yet any clean prompt's would: found in one of twenty maps, as p < .05 promises."""
    maps = chance_maps(0, store)
    assert all(table["p_fwe"].notna().any() and table["recovery"].max() > 0.9 for table in maps)
    assert binomtest(sum(table["found"].any() for table in maps), len(maps), 0.05, alternative="greater").pvalue > 0.01


def test_cancellation_hides_a_head_from_one_gradient_and_not_from_dropped_ones(store: ActivationStore) -> None:
    """What head 1.0 adds, the MLP of block 2 takes away again: the gradient is zero, each path's is not."""
    model = planted({(1, 0): (FACT, MOVED)}, {2: lambda x: -x[..., MOVED]})
    pair = pair_of(0, resolved(model, [line((3, FACT, ASK), (3, OTHER, ASK))], ["a"], False)[0], False)
    one = Attributed(model, pair, "denoise", "logit_diff")
    cells = [Cell("z", 1, head) for head in range(HEADS)]
    plain, dropped = one.scores(cells, "atp"), one.scores(cells, "atp_star")
    assert float(plain[0].abs()) < 1e-4
    assert int(dropped.argmax()) == 0
    assert float(dropped[0]) > 1e-2


def test_a_model_that_ignores_the_change_is_refused(store: ActivationStore) -> None:
    model = planted({(2, 1): (FACT, MOVED)})
    with pytest.raises(PromptError, match=r"0 of 1 pairs .* does not tell these prompts apart"):
        run(model, [line((3, OTHER, ASK), (3, OTHER + 1, ASK))], store)


def test_an_alignment_carries_a_fact_to_where_it_stands(store: ActivationStore) -> None:
    """The same fact one token later: the aligned cell holds it all, and nothing else does."""
    model = planted({(2, 1): (FACT, MOVED)})
    shifted = line((3, FACT, ASK), (3, 4, OTHER, ASK))
    shifted.fields["alignment"] = [[0, 0], [1, 2], [2, 3]]  # type: ignore[index]
    cells = run(model, [shifted], store, components=("resid_post",))["cells"]
    denoised = cells[(cells["direction"] == "denoise") & (cells["layer"] == 0)].set_index("position")["recovery"]
    assert set(denoised.index) == {0, 2, 3}
    assert denoised[0] == 0
    # Even attention shares over one token more, so less of the fact arrives than in the clean prompt.
    assert 0.5 < denoised[2] < 1
    assert abs(denoised[3]) < 1e-6
