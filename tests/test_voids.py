"""Voids: the rule by hand, its invariances, and planted blocks that do nothing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import make
from tiny import PROMPTS

from analyses.voids import Voids
from analyses.voids.early_exit import fixed_exits
from analyses.voids.norm_gates import NormGate, RandomGate, step_size
from analyses.voids.trace import apply_rule
from probes.capture.needs import Need
from probes.capture.run import capture, writes_of
from probes.errors import OptionError, PromptError
from probes.lenses import logit
from probes.models import weights_digest
from probes.models.backends.native import NativeModel
from probes.points import Address
from probes.prompts import Prompt
from probes.store import ActivationStore

INCREMENTS = torch.tensor([[5.0], [0.0], [4.0], [0.0], [0.0], [6.0], [0.0], [7.0]])
CONTRACT = {
    "activity": ["prompt", "phase", "position", "token_id", "token", "layer", "norm", "delta", "threshold", "active"],
    "usage": ["phase", "layer", "active_fraction"],
    "readout": ["prompt", "position", "exit_layer", "token_id", "token", "kl_to_full", "changed"],
}


def planted(void_layers: tuple[int, ...], n_layers: int = 6, seed: int = 0) -> NativeModel:
    """A random GPT-2 whose named blocks add nothing: zero output projections."""
    module = make("gpt2", seed, n_layer=n_layers)
    for layer in void_layers:
        for part in (module.transformer.h[layer].attn.c_proj, module.transformer.h[layer].mlp.c_proj):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.zeros_(part.bias)
    return NativeModel(module, ref="planted", weights=weights_digest(module))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8])
def test_the_rule_by_hand(alpha: float) -> None:
    active, thresholds = apply_rule(INCREMENTS, alpha)
    assert active[:, 0].int().tolist() == [1, 1, 1, 0, 0, 1, 0, 1]
    assert thresholds[:, 0].tolist() == pytest.approx(
        [0, 0, 5 * alpha, 5 * alpha, 5 * alpha, 5 * alpha, 6 * alpha, 6 * alpha]
    )


def test_a_falling_norm_is_a_void_and_alpha_zero_asks_only_for_that() -> None:
    steps = torch.tensor([[-1.0, 2.0], [-1.0, 1.0], [0.0, -0.1], [3.0, 0.0]])
    active, _ = apply_rule(steps, 0.0)
    assert active.tolist() == [[False, True], [False, True], [True, False], [True, True]]
    forced, _ = apply_rule(steps, 0.0, "always_active")
    assert forced[:2].all()
    assert torch.equal(forced[2:], active[2:])


def test_active_sets_are_nested_in_alpha_and_scale_free() -> None:
    steps = torch.randn(12, 200, generator=torch.Generator().manual_seed(0))
    sets = [apply_rule(steps, alpha)[0] for alpha in (0.0, 0.2, 0.5, 0.8, 1.0)]
    for wider, narrower in itertools.pairwise(sets):
        assert (wider | ~narrower).all()
        assert (wider & ~narrower).any()
    assert torch.equal(apply_rule(steps * 8, 0.5)[0], sets[2])


def test_steps_by_hand() -> None:
    before, after = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]])
    assert step_size(before, after, "norm_diff").item() == pytest.approx(5)
    assert step_size(before, after, "rel_norm_diff").item() == pytest.approx(1)
    assert step_size(before, after, "norm_of_diff").item() == pytest.approx(45**0.5)
    assert step_size(before, after, "cosine").item() == pytest.approx(0.2)


@pytest.mark.parametrize("alpha", [0.1, 0.8])
def test_planted_identity_blocks_are_void_from_layer_two(alpha: float, store: ActivationStore) -> None:
    model = planted((1, 3, 4))
    activity = Voids(alpha=(alpha,)).run(model, PROMPTS, store=store).tables["activity"]
    active = activity.pivot_table(index="layer", values="active", aggfunc="mean")["active"]
    assert active[[3, 4]].max() == 0
    assert active[1] == 1, "the released rule never calls a zero step of layer 1 a void"
    assert (activity[activity["layer"].isin([1, 3, 4])]["delta"].abs() < 1e-5).all()


def test_removing_planted_identity_blocks_changes_nothing(store: ActivationStore) -> None:
    model = planted((3, 4))
    short = planted((), n_layers=6)
    short.module.load_state_dict(model.module.state_dict())
    full = capture(model, PROMPTS, [Need("logits")], store).packed("logits")
    skip = {Address("resid_post", layer): None for layer in (3, 4)}
    for sequence, start in zip(PROMPTS, np.cumsum([0, *map(len, PROMPTS)]), strict=False):
        kept: dict[str, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, kept: dict[str, torch.Tensor] = kept) -> torch.Tensor:
            kept["stream"] = tensor
            return tensor

        writes = {Address("resid_post", 2): keep, **{a: (lambda _, h=kept: h["stream"]) for a in skip}}
        seen: list[torch.Tensor] = []
        model.run(torch.tensor([sequence]), {Address("logits"): lambda t, s=seen: s.append(t[0])}, writes)
        torch.testing.assert_close(seen[0], full[start : start + len(sequence)], atol=1e-5, rtol=1e-5)


def test_the_readout_is_the_lens_of_the_last_active_layer(store: ActivationStore) -> None:
    model = planted((5,))
    result = Voids(readout_positions="all").run(model, PROMPTS, store=store)
    readout = result.tables["readout"]
    assert (readout["exit_layer"] < 5).all(), "the last block is void for every token"
    rows = capture(model, PROMPTS, [Need(("resid_pre.0", "resid_post.*"))], store)
    for row in readout.itertuples():
        address = "resid_pre.0" if row.exit_layer < 0 else f"resid_post.{row.exit_layer}"
        stream = rows.get(address)[row.prompt][row.position][None]
        final = rows.get("resid_post.5")[row.prompt][row.position][None]
        read = logit.read(stream, model.unembedding(), top_k=1, reference=final)
        assert row.token_id == read.top_ids.item()
        assert row.kl_to_full == pytest.approx(read.kl.item(), abs=1e-5)


def test_an_active_last_block_reads_the_full_model(tiny: NativeModel, store: ActivationStore) -> None:
    result = Voids(readout_positions="all").run(tiny, PROMPTS, store=store)
    whole = result.tables["readout"].query("exit_layer == 2")
    assert len(whole)
    assert (whole["kl_to_full"] == 0).all()
    assert not whole["changed"].any()


def logits_under(model: NativeModel, gate: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    tokens = torch.tensor([PROMPTS[2]])
    model.run(tokens, {Address("logits"): seen.append}, writes_of(model, [gate] if gate else []))
    return seen[0]


def test_a_mask_without_voids_is_bit_identical(store: ActivationStore) -> None:
    model = planted(())
    rising = NormGate(0.0, "skip", "norm_of_diff")
    assert torch.equal(logits_under(model, rising), logits_under(model, None))
    assert torch.equal(logits_under(model, RandomGate((0.0,) * 6)), logits_under(model, None))


def test_a_mask_over_planted_voids_changes_nothing_and_a_real_one_does() -> None:
    idle, busy = planted((2, 3, 4, 5)), planted(())
    torch.testing.assert_close(logits_under(idle, NormGate(0.1)), logits_under(idle, None), atol=1e-5, rtol=1e-5)
    assert (logits_under(busy, NormGate(1.0)) - logits_under(busy, None)).abs().max() > 1e-3
    everything = logits_under(busy, RandomGate((1.0,) * 6))
    embedding: list[torch.Tensor] = []
    busy.run(torch.tensor([PROMPTS[2]]), {Address("resid_pre", 0): lambda t: embedding.append(t[0].clone())})
    read = logit.read(embedding[0], busy.unembedding(), ids=torch.arange(97)).logprobs
    torch.testing.assert_close(everything[0].log_softmax(-1), read, atol=1e-5, rtol=1e-5)


def test_the_masked_trace_is_the_rule_on_the_masked_stream(store: ActivationStore) -> None:
    model = planted(())
    result = Voids(alpha=(0.9,), mode="skip").run(model, PROMPTS, store=store)
    one = result.tables["activity"].query("prompt == 2 and position == 3").sort_values("layer")
    gate = NormGate(0.9)
    stream: dict[int, torch.Tensor] = {}
    reads = {Address("resid_post", i): (lambda t, i=i: stream.__setitem__(i, t[0, 3].clone())) for i in range(6)}
    model.run(torch.tensor([PROMPTS[2]]), reads, gate.writes(model.shape))
    assert one["norm"].tolist() == pytest.approx([stream[i].norm().item() for i in range(6)], rel=1e-4)
    skipped = one[~one["active"]]["layer"].tolist()
    assert skipped, "this seed has voids"
    for layer in skipped:
        if layer:
            assert torch.equal(stream[layer], stream[layer - 1])
    assert set(result.tables["controls"]["variant"]) == {"voids", "random_voids"}


@pytest.mark.parametrize("delta", ["norm_diff", "rel_norm_diff", "norm_of_diff", "cosine"])
def test_every_delta_is_measured_on_the_stream(tiny: NativeModel, store: ActivationStore, delta: Any) -> None:
    activity = Voids(delta=delta).run(tiny, PROMPTS, store=store).tables["activity"]
    rows = capture(tiny, PROMPTS, [Need(("resid_pre.0", "resid_post.*"))], store)
    one = activity.query("prompt == 2 and position == 4").sort_values("layer")["delta"].tolist()
    stream = [rows.get("resid_pre.0")[2][4], *(rows.get(f"resid_post.{i}")[2][4] for i in range(3))]
    expected = [step_size(a, b, delta).item() for a, b in itertools.pairwise(stream)]
    assert one == pytest.approx(expected, abs=1e-4)


def test_tables_have_their_contract_columns(tiny: NativeModel, store: ActivationStore) -> None:
    tables = Voids(max_new_tokens=3).run(tiny, PROMPTS, store=store).tables
    for name, columns in CONTRACT.items():
        assert set(columns) <= set(tables[name].columns)
    assert set(tables["usage"]["phase"]) == {"prompt", "response"}
    usage = tables["usage"]
    assert usage[["ci_low", "ci_high"]].isna().all(axis=None), "four prompts support no interval"
    usage = Voids().run(tiny, [*PROMPTS, (4, 5), (6, 7, 8)], store=store).tables["usage"]
    assert ((usage["ci_low"] <= usage["active_fraction"]) & (usage["active_fraction"] <= usage["ci_high"])).all()


def test_the_response_is_the_models_greedy_continuation(
    tiny: NativeModel, store: ActivationStore, count_forwards: Any
) -> None:
    result = Voids(max_new_tokens=3, alpha=(0.8, 0.2)).run(tiny, PROMPTS, store=store)
    activity = result.tables["activity"].query("layer == 0 and alpha == 0.8 and phase == 'response'")
    for index, tokens in enumerate(PROMPTS):
        assert activity[activity["prompt"] == index]["token_id"].tolist() == tiny.generate(tokens, 3)
    seen = count_forwards(tiny)
    again = Voids(max_new_tokens=3, alpha=(0.5,)).run(tiny, PROMPTS, store=store)
    assert (seen, again.provenance["counts"]["responses_written"]) == ([], 0), "another alpha costs nothing"


def test_the_gated_model_can_write_its_own_response(store: ActivationStore) -> None:
    model = planted(())
    options = {"max_new_tokens": 4, "alpha": (1.0,), "response_from": "gated_model"}
    masked = Voids(mode="skip", **options).run(model, PROMPTS, store=store).tables["activity"]
    written = masked.query("layer == 0 and phase == 'response' and prompt == 2")["token_id"].tolist()
    gate = NormGate(1.0)
    assert written == model.generate(PROMPTS[2], 4, writes=lambda: writes_of(model, [gate]))
    assert written != model.generate(PROMPTS[2], 4)


def test_first_tokens_can_be_left_out(tiny: NativeModel, store: ActivationStore) -> None:
    without = Voids(first_token=False).run(tiny, PROMPTS[:3], store=store).tables["usage"]
    with_first = Voids().run(tiny, PROMPTS[:3], store=store).tables["usage"]
    assert without["n_tokens"].iloc[0] == with_first["n_tokens"].iloc[0] - 3
    assert without["active_fraction"].tolist() == pytest.approx(with_first["active_fraction_without_first"].tolist())


def test_the_released_batch_threshold(tiny: NativeModel, store: ActivationStore) -> None:
    activity = Voids(batch_layer0_threshold=True, alpha=(0.5,)).run(tiny, PROMPTS, store=store).tables["activity"]
    first = activity.query("layer == 0")
    for _, group in first.groupby("position"):
        expected = 0.5 * (group["delta"].max() - group["delta"].min())
        assert group["threshold"].tolist() == pytest.approx([expected] * len(group), abs=1e-5)
    assert first["threshold"].max() > 0
    assert Voids().run(tiny, PROMPTS, store=store).tables["activity"].query("layer == 0")["threshold"].max() == 0


def test_bfloat16_norms_are_coarser(tiny: NativeModel, store: ActivationStore) -> None:
    fine = Voids().run(tiny, PROMPTS, store=store).tables["activity"]["norm"]
    coarse = Voids(norm_dtype="bfloat16").run(tiny, PROMPTS, store=store).tables["activity"]["norm"]
    rounded = torch.tensor(fine.to_numpy()).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(coarse.to_numpy(), rounded)
    assert (coarse != fine).any()


def test_controls_skip_as_much_elsewhere(store: ActivationStore) -> None:
    prompts = [*PROMPTS, (4, 5), (6, 7, 8)]
    tables = Voids(readout_positions="all", alpha=(0.5,)).run(planted((5,)), prompts, store=store).tables
    assert tables["readout"]["exit_layer"].nunique() > 1, "this seed's exits differ between tokens"
    controls = tables["controls"].set_index("variant")
    assert set(controls.index) == {"voids", "fixed_exit", "shuffled_exit"}
    assert controls["layers_used"].nunique() == 1
    assert (controls["kl_low"] <= controls["kl_to_full"] + 1e-9).all()
    assert controls["kl_to_full"]["voids"] == pytest.approx(tables["readout"]["kl_to_full"].mean(), rel=1e-5)
    assert controls["kl_to_full"]["shuffled_exit"] != pytest.approx(controls["kl_to_full"]["voids"], rel=1e-3)
    assert controls["kl_to_full"]["fixed_exit"] != pytest.approx(controls["kl_to_full"]["voids"], rel=1e-3)


@pytest.mark.parametrize("exits", [[5, 5, 5, 5, 5, 4], [5, 5, 5], [-1, 5, 2, 2], [0], [-1, -1, 0]])
def test_a_fixed_exit_leaves_out_as_much_as_the_rule(exits: list[int]) -> None:
    """One rounded layer would be the last where few tokens leave early, and leave out nothing."""
    fixed = fixed_exits(np.array(exits))
    assert fixed.sum() == sum(exits)
    assert fixed.max() - fixed.min() <= 1
    assert (fixed.min() < 5) == (min(exits) < 5)


def test_no_control_is_empty_where_few_tokens_leave_early(store: ActivationStore) -> None:
    model = planted((), n_layers=6, seed=3)
    tables = Voids(readout_positions="all", alpha=(0.1,)).run(model, PROMPTS, store=store).tables
    exits = tables["readout"]["exit_layer"]
    assert round(exits.mean()) == 5 > exits.min(), "rounded, the mean exit of this seed is the last layer"
    assert (tables["controls"].set_index("variant")["kl_to_full"] > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": (1.5,)}, "option alpha is 1.5: legal values are 0 to 1"),
        ({"alpha": ()}, "option alpha is empty"),
        ({"alpha": (float("nan"),)}, "option alpha is nan"),
        ({"mode": "trim"}, "unknown mode 'trim'.*Legal: measure, early_exit, skip"),
        ({"delta": "norm"}, "unknown delta 'norm'"),
        ({"phases": ("prompts",)}, "Did you mean 'prompt'"),
        ({"max_new_tokens": -1}, "legal values are 0 to 2147483647"),
        ({"norm_dtype": "bfloat16", "delta": "cosine"}, "norm_dtype bfloat16 needs"),
        ({"mode": "skip", "batch_layer0_threshold": True}, "mode skip judges blocks while they run"),
    ],
)
def test_illegal_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Voids(**options)


@pytest.mark.real
def test_choices_are_scored_on_the_real_model(real: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = ActivationStore(tmp_path_factory.mktemp("store"))
    fields = {"choices": ["Paris", "Rome"], "answer": "Paris"}
    prompts = [Prompt(tuple(real.tokenizer("The capital of France is")["input_ids"]), None, fields)]
    accuracy = Voids(max_new_tokens=4).run(real, prompts, store=store).tables["accuracy"]
    full = accuracy.query("variant == 'full'")
    assert full["accuracy"].tolist() == [1.0]
    assert set(accuracy["scoring"]) == {"choice_logit", "response"}
    wrong = [Prompt(prompts[0].tokens, None, {"choices": ["Paris", "Rome"], "answer": "Oslo"})]
    with pytest.raises(PromptError, match="answer 'Oslo' is not among its choices"):
        Voids().run(real, wrong, store=store)
    assert isinstance(accuracy, pd.DataFrame)
