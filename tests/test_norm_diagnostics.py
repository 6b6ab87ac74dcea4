"""Diagnostics from stored rows: they are what whole forwards give, they add up, and planted structure is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from families import make
from tiny import PROMPTS, native
from torch import Tensor

from analyses.cli import main
from analyses.norm_removal import NormRemoval
from analyses.norm_removal import diagnose as diagnose_module
from analyses.norm_removal.attribution import HeadOutputs, read_out
from analyses.norm_removal.figures import sizes
from analyses.norm_removal.measured import Measured, needs
from analyses.norm_removal.neurons import Ablations, rank
from analyses.norm_removal.scale_tables import outliers, sink_rate
from analyses.results.result import Result
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.models import Model
from probes.models.backends.native import NativeModel
from probes.norms import NormSite, Scale, Switches, choose
from probes.points import Address
from probes.progress import QUIET
from probes.store import ActivationStore

LONG = [*PROMPTS, *[tuple(range(3 + i, 13 + 2 * i)) for i in range(4)]]
CONTRACT = {
    "scales": "site layer position_class scale",
    "freeze_effect": "site layer delta_ce",
    "attribution_error": "variant layer head nmae",
}


def measured(model: Model, store: ActivationStore, prompts: list[tuple[int, ...]] = LONG) -> Measured:
    return Measured(
        capture(model, prompts, needs(model, range(model.shape.n_layers), True, True), store), first_token=False
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return NormRemoval(neurons=3).run(native("gpt2"), LONG, store=ActivationStore(tmp_path_factory.mktemp("store")))


@pytest.mark.parametrize("table", CONTRACT)
def test_tables_have_the_columns_of_the_contract(table: str, result: Result) -> None:
    assert set(CONTRACT[table].split()) <= set(result.tables[table].columns)


def test_every_norm_has_a_row_and_an_interval(result: Result) -> None:
    table = result.tables["freeze_effect"]
    whole = table[table["site"].isin(["attn", "mlp", "final"])]
    assert len(whole) == 2 * 3 + 1
    assert len(table) == len(whole) + 2 * 3
    assert (table["ci_low"] <= table["delta_ce"] + 1e-9).all()
    assert (table["delta_ce"] <= table["ci_high"] + 1e-9).all()
    assert any("control" in note for note in result.notes)
    for name in result.figures:
        assert result.figure(name).data
    for name in result.profiles:
        assert result.profile(name)["layer"].is_monotonic_increasing


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2", "phi"])
def test_a_freeze_effect_is_that_of_whole_forwards(family: str, store: ActivationStore) -> None:
    model = native(family)
    table = NormRemoval(neurons=0, sinks=False).run(model, LONG, store=store).tables
    switches = Switches(model.anatomy)
    scales = table["scales"].set_index(["site", "layer", "position_class"])["scale"]
    for name, site, layer in (("mlp.1", "mlp", 1), ("v.0", "v", 0), ("final", "final", 3), ("q_norm.2", "q_norm", 2)):
        try:
            chosen = choose(switches.sites, [name])
        except Exception:
            continue
        scale = Scale(scales[site, layer, "other"], scales[site, layer, "first"])
        changes = []
        for tokens in (torch.tensor([p]) for p in LONG if len(p) > 1):
            with torch.no_grad():
                clean = model.module(tokens).logits
                with switches.attached():
                    switches.freeze(chosen, scale)
                    frozen = model.module(tokens).logits
                    switches.on.clear()
            start = 1 if tokens.shape[1] > 2 else 0
            pair = [
                torch.nn.functional.cross_entropy(x[0, start:-1], tokens[0, start + 1 :], reduction="none")
                for x in (clean, frozen)
            ]
            changes.append(pair[1] - pair[0])
        rise = table["freeze_effect"].query("site == @site and layer == @layer")["delta_ce"].item()
        assert rise == pytest.approx(torch.cat(changes).mean().item(), abs=2e-5), name
        assert abs(rise) > 1e-4, name


def test_a_loss_that_overflows_is_infinite_and_said(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny_scales(measured: dict[NormSite, list[Tensor]], *_: object) -> dict[NormSite, Scale]:
        return {site: Scale(1e-30 if site.kind == "mlp" else float(rows[0].mean())) for site, rows in measured.items()}

    monkeypatch.setattr(diagnose_module, "mean_scales", tiny_scales)
    result = NormRemoval(neurons=0, sinks=False).run(native("llama"), LONG, store=store)
    table = result.tables["freeze_effect"]
    broken = table["site"] == "mlp"
    assert (table.loc[broken, "delta_ce"] == np.inf).all()
    assert (table.loc[broken, "diverged"] > 0).all()
    assert np.isfinite(table.loc[~broken, "delta_ce"]).all()
    assert table["tokens"].nunique() == 1
    assert any("freezing mlp of layer 1 leaves" in note for note in result.notes)
    assert any("infinite" in str(note.text) for note in result.figure("freeze_effect").layout.annotations)
    assert len(result.profile("freeze_attn")) == 3


def test_the_own_scale_control_changes_nothing(store: ActivationStore) -> None:
    result = NormRemoval(neurons=0, sinks=False).run(native("llama"), LONG, store=store)
    note = next(note for note in result.notes if "the control" in note)
    assert "of no token" in note or float(note.split("at most ")[1].split(" ")[0]) < 1e-5


def test_scales_by_position_take_away_all_that_one_prompt_varies(store: ActivationStore) -> None:
    result = NormRemoval(neurons=0, sinks=False, scale_source="per_position").run(
        native("llama"), LONG[2:3], store=store
    )
    assert result.tables["freeze_effect"]["delta_ce"].abs().max() < 1e-5
    assert result.tables["freeze_together"]["delta_ce"].abs().max() < 1e-5


def test_stored_rows_are_enough(
    tiny: NativeModel, store: ActivationStore, count_forwards: Callable[[Model], list[int]]
) -> None:
    seen = count_forwards(tiny)
    first = NormRemoval(neurons=2).run(tiny, LONG, store=store)
    assert sum(seen) == len(LONG)
    second = NormRemoval(neurons=2).run(tiny, LONG, store=store)
    assert sum(seen) == len(LONG)
    for name, table in first.tables.items():
        assert table.equals(second.tables[name]), name


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_attributions_of_all_components_sum_to_the_logit(family: str, store: ActivationStore) -> None:
    model = native(family)
    points = ("resid_pre.0", "resid_post.*", "z.*", "attn_out.*", "mlp_out.*", "logits")
    activations = capture(model, [LONG[2]], [Need(points)], store)
    tokens = torch.tensor(LONG[2])
    one = Measured(capture(model, [LONG[2]], needs(model, range(model.shape.n_layers), False, False), store), True)
    out = read_out(one, tokens)
    stream = activations.get("resid_post.2")[0].double()
    scale = out.scale(stream)
    total = out.attribution(activations.get("resid_pre.0")[0].double(), scale) + out.constant()
    for layer in range(3):
        total += out.attribution(activations.get(f"mlp_out.{layer}")[0].double(), scale)
        heads = HeadOutputs(one, layer)(activations.get(f"z.{layer}")[0])
        added = activations.get(f"attn_out.{layer}")[0].double()
        bias = added - heads.sum(1)
        assert bias.std(0).max() < 1e-5  # what heads leave out is the projection's bias, alike everywhere
        total += out.attribution(heads, scale[:, None]).sum(1) + out.attribution(bias, scale)
    logits = activations.get("logits")[0].gather(1, tokens[:, None])[:, 0].double()
    if cap := model.unembedding().softcap:
        total = cap * torch.tanh(total / cap)
    assert torch.allclose(total, logits, rtol=1e-4, atol=1e-4)
    assert torch.allclose(out.logit(stream), out.attribution(stream, scale) + out.constant(), rtol=1e-10)


def test_the_direct_effect_is_that_of_a_stream_without_the_head(store: ActivationStore) -> None:
    model = native("gpt2")
    one = measured(model, store, [LONG[2]])
    targets = torch.tensor([9, 8, 7])
    stream = one.activations.get("resid_post.2")[0][:3]
    written = HeadOutputs(one, 1)(one.activations.get("z.1")[0][:3])
    effects = read_out(one, targets).effect(stream.double(), written)
    own = model.unembedding()
    with torch.no_grad():
        for row, target in enumerate(targets):
            for head in range(4):
                pair = [
                    own.norm(x.float()) @ own.weight[target] for x in (stream[row], stream[row] - written[row, head])
                ]
                assert effects[row, head].item() == pytest.approx((pair[0] - pair[1]).item(), abs=1e-4)


def planted() -> tuple[NativeModel, int]:
    """A Llama whose last-layer neuron 7 writes only where the unembedding, with the final norm's gain, reads nothing."""
    module = make("llama")
    with torch.no_grad():
        read = module.lm_head.weight * module.model.norm.weight
        hidden = torch.linalg.svd(torch.randn(30, 32))[2]  # 30 directions that are read
        module.lm_head.weight.copy_((read @ hidden[:30].T @ hidden[:30]) / module.model.norm.weight)
        module.model.layers[2].mlp.down_proj.weight[:, 7] = 6 * hidden[31]
    return NativeModel(module, ref="planted", weights="planted"), 7


def test_a_neuron_in_the_unembeddings_null_space_acts_through_the_norm_alone(store: ActivationStore) -> None:
    model, neuron = planted()
    one = measured(model, store)
    ranking = rank(one)
    assert int(ranking.ratio.argmax()) == neuron
    ablations = Ablations(one, ranking, [(neuron, "top"), (3, "random")])
    ablations.measure(QUIET)
    table = ablations.table(0).set_index("neuron")
    assert table.loc[neuron, "abs_delta_ce"] > 1e-3
    assert table.loc[neuron, "abs_delta_ce_held"] < 1e-5
    assert table.loc[3, "abs_delta_ce_held"] > 1e-3
    assert table.loc[neuron, "rank"] == 0


def test_a_planted_neuron_scales_all_logits_alike(store: ActivationStore) -> None:
    model, neuron = planted()
    rows = measured(model, store, [LONG[2]]).activations.get("resid_post.2")[0]
    written = model.module.model.layers[2].mlp.down_proj.weight[:, neuron].detach()
    own = model.unembedding()
    with torch.no_grad():
        before, after = (own.norm(x) @ own.weight.T for x in (rows, rows + written))
    scale = [x.square().mean(-1).sqrt() for x in (rows, rows + written)]
    assert torch.allclose(after, before * (scale[0] / scale[1])[:, None], rtol=1e-3, atol=1e-4)


def test_ablating_a_neuron_is_what_a_whole_forward_does(store: ActivationStore) -> None:
    for family in ("gpt2", "gemma2"):
        model = native(family)
        one = measured(model, store, LONG[2:3])
        ablations = Ablations(one, rank(one), [(5, "top")])
        ablations.measure(QUIET)
        tokens = torch.tensor([LONG[2]])
        losses: list[Tensor] = []
        for on in (False, True):

            def write(hidden: Tensor, on: bool = on, mean: Tensor = ablations.mean) -> Tensor:
                out = hidden.clone()
                if on:
                    out[..., 5] = mean[5]
                return out

            seen: list[Tensor] = []
            model.run(
                tokens,
                {Address("logits"): lambda t, seen=seen: seen.append(t.clone())},
                {Address("mlp_post", 2): write},
            )
            losses.append(torch.nn.functional.cross_entropy(seen[0][0, 1:-1], tokens[0, 2:], reduction="none"))
        expected = (losses[1] - losses[0]).mean().item()
        assert ablations.table(0)["delta_ce"].item() == pytest.approx(expected, abs=2e-5)
        assert abs(expected) > 1e-6


def test_uniform_attention_sinks_for_three_queries() -> None:
    n = 12
    pattern = (torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None])[None]
    assert sink_rate(pattern).item() == 3 / n
    assert sink_rate(torch.eye(n)[None]).item() == 1 / n


def test_outliers_of_known_rows() -> None:
    even = torch.ones(4, 8)
    assert outliers(even) == (1.0, 0, 1 / 8)
    one = torch.zeros(4, 8)
    one[:, 5] = 3
    kurtosis, feature, share = outliers(one)
    assert (kurtosis, feature, share) == (8.0, 5, 1.0)


def test_position_classes_tell_the_first_position_and_ends_of_text(store: ActivationStore) -> None:
    class Tokenizer:
        eos_token_id = 12

    module = native("llama").module
    model = NativeModel(module, Tokenizer(), ref="x", weights="y")
    one = measured(model, store, [(12, 5, 12, 6)])
    assert {k: v.tolist() for k, v in one.classes(0).items()} == {
        "first": [True, False, False, False],
        "end_of_text": [False, False, True, False],
        "other": [False, True, False, True],
    }


def test_the_command_line(llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"tokens": [3, 4, 5, 6, 7]}\n{"tokens": [8, 9, 10]}\n')
    common = [
        "run",
        "norm_removal",
        "--model",
        str(llama_folder),
        "--prompts",
        str(prompts),
        "--store",
        str(tmp_path / "store"),
    ]
    assert main([*common, "--out", str(tmp_path / "out"), "--neurons", "1", "--diagnose"]) == 0
    assert "freeze_effect: 13 rows" in capsys.readouterr().out
    loaded = Result.load(tmp_path / "out")
    assert np.isfinite(loaded.tables["freeze_effect"]["delta_ce"]).all()
    text = tmp_path / "t.jsonl"
    text.write_text('{"tokens": [3, 4, 5]}\n')
    training = [
        "--schedule",
        "proportional",
        "--steps",
        "30",
        "--train-on",
        str(text),
        "--block",
        "8",
        "--checkpoints",
        str(tmp_path / "kept"),
    ]
    assert main([*common, "--out", str(tmp_path / "out2"), *training]) == 2
    error = capsys.readouterr().err
    assert "fewer than two blocks of 8" in error
    assert "Traceback" not in error
    assert (
        main([*common, "--out", str(tmp_path / "out3"), "--schedule", "smal", "--train-on", str(text), "--block", "8"])
        == 2
    )
    assert "Did you mean 'small'" in capsys.readouterr().err


@pytest.mark.real
def test_the_default_model_has_61_norms_and_a_spike(real: Model, store: ActivationStore) -> None:
    prompts = ["The capital of France"]
    analysis = NormRemoval(neurons=0, sinks=False, split_paths=False)
    tables = analysis.run(real, prompts, store=store).tables
    assert len(tables["freeze_effect"]) == 61
    assert len(tables["attribution_error"]) == 30 * 9
    stream = tables["stream"].pivot(index="layer", columns="position_class", values="norm")
    assert (stream["first"] / stream["other"]).max() > 10


def test_changes_of_several_norms_stand_on_a_logarithmic_axis() -> None:
    rows = [
        ("all qk", 1e-4, 5e-5, 2e-4),
        ("all mlp", -0.01, -0.02, 0.005),
        ("all", 300.0, 200.0, 400.0),
        ("all v", 0.0, 0.0, 0.0),
    ]
    table = pd.DataFrame(rows, columns=["site", "delta_ce", "ci_low", "ci_high"])
    rows = pd.DataFrame(sizes(table))
    assert rows.loc[0].tolist() == pytest.approx([1e-4, 5e-5, 2e-4])
    assert rows.loc[1].tolist() == pytest.approx([0.01, 0.001, 0.02])  # a fall, mirrored; its interval crosses zero
    assert rows.loc[3].isna().all()
    joint = table.assign(diverged=0.0, tokens=5, variant="original")
    alone = pd.DataFrame([("mlp", 0, 0.1, 0.0, 0.2, 0.0, 5, "original")], columns=["site", "layer", *joint.columns[1:]])
    figure = NormRemoval.figures["freeze_effect"].draw({"freeze_effect": alone, "freeze_together": joint})
    assert figure.layout.xaxis2.type == "log"
    points = figure.data[-1]
    assert list(points.marker.symbol) == ["circle", "circle-open", "circle", "circle"]
    assert list(points.y) == ["every qk", "every mlp", "all norms", "every v"]
