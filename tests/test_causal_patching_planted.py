"""Causal patching on models whose mechanism is known: a relay, two inputs of an AND or OR, a change that nobody reads."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from analyses.causal_patching import CausalPatching
from analyses.causal_patching.attribution import Attributed
from analyses.causal_patching.cells import Cell
from analyses.causal_patching.pairs import pair_of, resolved
from probes.errors import PromptError
from probes.models.backends.native import NativeModel
from probes.prompts import Prompt
from probes.store import ActivationStore

WIDTH, HEADS, LAYERS, WORDS = 32, 4, 4, 24
"""Tokens 0 to 23; the token's own dimension, and further ones for what heads and MLPs write."""
FACT, OTHER, ASK, MOVED = 5, 6, 9, 28


class Gate(nn.Module):
    """An MLP that adds to one dimension what a function makes of its input."""

    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function
        self.gate_proj = self.up_proj = self.down_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[..., MOVED] = self.function(x)
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
            layer.mlp = Gate((gates or {}).get(index, lambda x: torch.zeros_like(x[..., 0])))
        # One answer grows with what is moved, the other falls, whatever else is in the stream.
        module.lm_head.weight.zero_()
        module.lm_head.weight[1, MOVED], module.lm_head.weight[2, MOVED] = 1, -1
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
