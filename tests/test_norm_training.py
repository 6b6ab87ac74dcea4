"""Removal by training: schedules, text, exact resume, what stops a run, and the report of a whole removal."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make
from tiny import native

from analyses.norm_removal import NormRemoval
from analyses.norm_removal import training as training_module
from analyses.norm_removal.evaluation import Predictions, calibration_error, loss_table, predict
from analyses.norm_removal.schedule import RELEASED, Phase, Schedule, get_schedule, proportional
from analyses.norm_removal.text import Blocks, make_blocks
from analyses.norm_removal.training import Setting, next_token_loss, spread, train
from analyses.results.result import Result
from probes.anatomy import Anatomy
from probes.errors import OptionError, PointError, PromptError, TrainingError
from probes.models import load_model
from probes.models.backends.native import NativeModel
from probes.norms import NormSite, Rows, Switches
from probes.progress import Progress
from probes.prompts import Prompt
from probes.store import ActivationStore


def gpt2_sites(n_layers: int) -> list[NormSite]:
    return [NormSite(k, n) for n in range(n_layers) for k in ("qk", "v", "mlp")] + [NormSite("final")]  # type: ignore[arg-type]


TABLE = {
    "small": (12, 20, 44, 68, 104, 106, 116),
    "medium": (24, 20, 68, 116, 188, 190, 200),
    "large": (36, 30, 174, 318, 534, 536, 546),
    "xl": (48, 50, 242, 434, 722, 724, 734),
    "small_2024": (12, 200, 440, 680, 1040, 1060, 1160),
}


@pytest.mark.parametrize("name", TABLE)
def test_released_schedules_have_the_published_step_numbers(name: str) -> None:
    n_layers, *steps = TABLE[name]
    sites = gpt2_sites(n_layers)
    schedule = get_schedule(name, sites)
    assert [phase.sites for phase in schedule.phases] == ["mlp", "qk", "v", "final", "end_of_text", "first"]
    assert [phase.start for phase in schedule.phases] == steps
    events = schedule.events(sites)
    gap = RELEASED[name].gaps[0]
    assert [e.step for e in events if e.name.startswith("mlp")] == [steps[0] + gap * n for n in range(n_layers)]
    assert next(e.name for e in events if e.step == steps[1]) == "qk.0"
    assert sorted(s for e in events for s in e.sites) == sorted(sites)


def test_a_proportional_schedule_ends_where_the_small_run_ends() -> None:
    sites = gpt2_sites(4)
    events = proportional(sites, 600).events(sites)
    assert events[-1].step == 2 * 116
    assert next(e for e in events if e.name == "final").step == 2 * 104
    short = proportional(sites, 40)
    assert short.events(sites)[-1].step < 20
    assert sorted(s for e in short.events(sites) for s in e.sites) == sorted(sites)
    qwen = Switches(native("qwen3").anatomy).sites
    assert {s.kind for e in proportional(qwen, 300).events(qwen) for s in e.sites} == {s.kind for s in qwen}


def test_the_learning_rate_warms_up_and_falls_by_half_a_cosine() -> None:
    schedule = Schedule("s", (), 110, 1.0, 0.2, 10)
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(9) == pytest.approx(1.0)
    assert schedule.rate(10) == pytest.approx(1.0)
    assert schedule.rate(60) == pytest.approx(0.6)
    assert schedule.rate(110) == pytest.approx(0.2)


def test_schedules_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    sites = gpt2_sites(2)
    base = Schedule("mine", (), 10, 1e-3, 1e-4, 1)
    with pytest.raises(OptionError, match=r"unknown norm site 'mlp\.7'.*mlp\.0 to mlp\.1"):
        replace(base, phases=(Phase("mlp.7", 0),)).events(sites)
    with pytest.raises(OptionError, match=r"freezes mlp\.0 twice"):
        replace(base, phases=(Phase("mlp", 0), Phase("mlp.0", 3))).events(sites)
    with pytest.raises(OptionError, match=r"unknown schedule 'smal'\. Did you mean 'small'"):
        get_schedule("smal", sites)
    with pytest.raises(OptionError, match=r"mlp\.10 comes at step 40, but the training has 40 steps"):
        get_schedule("small", gpt2_sites(12), steps=40)
    with pytest.raises(OptionError, match="learning_rate is nan"):
        replace(base, learning_rate=math.nan)
    file = tmp_path / "mine.toml"
    file.write_text(
        'steps = 9\nlearning_rate = 1e-3\nmin_learning_rate = 1e-4\nwarmup = 1\n[[phases]]\nsites = "mlp"\nstart = 2\ngap = 3\n'
    )
    assert [(e.step, e.name) for e in get_schedule(str(file), sites).events(sites)] == [(2, "mlp.0"), (5, "mlp.1")]
    file.write_text("stepz = 9\n")
    with pytest.raises(OptionError, match=r"unknown field 'stepz'\. Did you mean 'steps'"):
        get_schedule(str(file), sites)
    file.write_text("steps = \n")
    with pytest.raises(OptionError, match="cannot be read"):
        get_schedule(str(file), sites)
    with pytest.raises(OptionError, match="cannot be read"):
        get_schedule("absent.toml", sites)


def tokens_file(folder: Path, n: int = 640) -> str:
    """Token ids with a pattern to learn: each is one of the three that follow the one before."""
    steps = torch.randint(1, 4, (n,), generator=torch.Generator().manual_seed(0))
    ids = (steps.cumsum(0) % 60 + 3).tolist()
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"tokens": ids[i : i + 80]}) + "\n" for i in range(0, n, 80)))
    return str(path)


def test_text_becomes_blocks(tmp_path: Path) -> None:
    source = tokens_file(tmp_path)
    blocks = make_blocks(source, None, 16, 10**6)
    assert blocks.training.shape == (36, 16)
    assert blocks.held_out.shape == (4, 16)
    assert make_blocks(source, None, 16, 100).training.shape[0] < 10
    one = blocks.batch(3, 8, seed=1)
    assert torch.equal(one, blocks.batch(3, 8, seed=1))
    assert not torch.equal(one, blocks.batch(3, 8, seed=2))
    epoch = torch.cat([blocks.batch(step, 6, seed=0) for step in range(6)])
    assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, blocks.training.tolist()))
    nested = tmp_path / "nested" / "deep"
    nested.mkdir(parents=True)
    (nested / "b.jsonl").write_text('{"tokens": [1, 2, 3, 4]}\n')
    (nested.parent / "a.jsonl").write_text('{"tokens": [5, 6, 7, 8]}\n')
    (nested / "ignored.bin").write_bytes(b"\xff")
    blocks = make_blocks(str(nested.parent), None, 4, 10**6)
    assert blocks.training.tolist() == [[5, 6, 7, 8]]
    assert blocks.held_out.tolist() == [[1, 2, 3, 4]]


def test_documents_are_joined_by_the_end_of_text(tmp_path: Path) -> None:
    class Letters:
        eos_token_id = 0

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) - 96 for c in text]}

    for name, text in (("a.txt", "abc"), ("b.txt", "de")):
        (tmp_path / name).write_text(text)
    blocks = make_blocks(str(tmp_path), Letters(), 3, 10**6)
    assert torch.cat([blocks.training, blocks.held_out]).flatten().tolist() == [1, 2, 3, 0, 4, 5]
    assert blocks.end_of_text == 0


def test_text_that_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    source = tokens_file(tmp_path)
    with pytest.raises(TrainingError, match="640 tokens, fewer than two blocks of 400"):
        make_blocks(source, None, 400, 10**6)
    plain = tmp_path / "plain.txt"
    plain.write_text("some text")
    with pytest.raises(PromptError, match="no tokenizer"):
        make_blocks(str(plain), None, 4, 10**6)
    with pytest.raises(PromptError, match="no file or folder; a data set"):
        make_blocks("absent.txt", None, 4, 10**6)
    plain.write_bytes(b"\xff\xfe")
    with pytest.raises(PromptError, match="not UTF-8"):
        make_blocks(str(plain), object(), 4, 10**6)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PromptError, match="holds no text"):
        make_blocks(str(tmp_path / "empty"), None, 4, 10**6)


def small(family: str = "gpt2") -> Anatomy:
    module = make(family, **({"resid_pdrop": 0.1} if family == "gpt2" else {}))
    return NativeModel(module, ref=family, weights="x").anatomy


def a_schedule(steps: int = 12, name: str = "mine") -> Schedule:
    phases = (
        Phase("mlp", 2, 1),
        Phase("qk", 4),
        Phase("v", 5),
        Phase("final", 6),
        Phase("end_of_text", 7),
        Phase("first", 8),
    )
    return Schedule(name, phases, steps, 3e-3, 1e-3, 2, aux_weight=0.1)


def a_setting(folder: str = "", every: int = 4) -> Setting:
    return Setting(4, 2, True, True, 0, every, folder)


def test_training_freezes_every_site_and_then_no_position_is_special(tmp_path: Path) -> None:
    blocks = make_blocks(tokens_file(tmp_path), None, 16, 10**6)
    anatomy = small("llama")
    before = [p.clone() for p in anatomy.map.module.parameters()]
    done = train(anatomy, blocks, a_schedule(), a_setting())
    assert all(torch.equal(a, b) for a, b in zip(before, anatomy.map.module.parameters(), strict=True))
    assert [h["frozen"] for h in done.history] == [0, 0, 1, 2, 6, 9, 10, 10, 10, 10, 10, 10]
    assert [h["event"] for h in done.history][2:9] == [
        "mlp.0",
        "mlp.1",
        "mlp.2 qk",
        "v",
        "final",
        "end_of_text",
        "first",
    ]
    assert all(scale.constant for scale in done.switches.on.values())
    kept = train(anatomy, blocks, a_schedule(24).control, a_setting())
    assert kept.history[-1]["loss"] < kept.history[0]["loss"] - 0.3
    assert not kept.switches.on
    norm = done.switches.norm(NormSite("qk", 0))
    assert done.switches.on[NormSite("qk", 0)].value == done.switches.on[NormSite("v", 0)].value
    assert norm.path in done.switches.running


def test_until_they_are_withdrawn_special_positions_keep_a_scale_of_their_own(tmp_path: Path) -> None:
    blocks = make_blocks(tokens_file(tmp_path), None, 16, 10**6)
    run = training_module._Run(small("llama"), blocks, a_schedule(), a_setting())
    with run.switches.attached():
        for expected in ((True, True), (True, False), (False, False)):
            while run.step < {(True, True): 6, (True, False): 8, (False, False): 9}[expected]:
                run.take(Progress())
            v, qk = run.switches.on[NormSite("v", 1)], run.switches.on[NormSite("qk", 1)]
            assert (v.first is not None, v.ends_as_first) == expected
            assert not qk.ends_as_first
            assert (qk.first is not None) == expected[0]


class Stop(Exception):
    pass


class Interrupt(Progress):
    """Breaks a run off at a step."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def advance(self, done: int = 1) -> None:
        self.seen += done
        if self.seen == self.at:
            raise Stop


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_interrupted_training_goes_on_bit_for_bit(family: str, tmp_path: Path) -> None:
    blocks = make_blocks(tokens_file(tmp_path), None, 16, 10**6)
    whole = train(small(family), blocks, a_schedule(), a_setting())
    setting = a_setting(str(tmp_path / "kept"))
    for at in (6, 11):  # before and after the last event; each some steps after a checkpoint
        with pytest.raises(Stop):
            train(small(family), blocks, a_schedule(), setting, Interrupt(at))
    torch.manual_seed(99)
    resumed = train(small(family), blocks, a_schedule(), setting)
    assert [h["loss"] for h in resumed.history] == [h["loss"] for h in whole.history]
    assert resumed.history == whole.history
    for a, b in zip(whole.anatomy.map.module.parameters(), resumed.anatomy.map.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert {str(s): v.value for s, v in whole.switches.on.items()} == {
        str(s): v.value for s, v in resumed.switches.on.items()
    }
    (folder,) = (tmp_path / "kept").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["step-0000008", "step-0000012"]
    again = train(small(family), blocks, a_schedule(), setting)
    assert again.history == whole.history
    other = train(small(family), blocks, replace(a_schedule(), learning_rate=1e-3), setting)
    assert other.history[0]["learning_rate"] == 5e-4
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    blocks = make_blocks(tokens_file(tmp_path), None, 16, 10**6)
    setting = a_setting(str(tmp_path / "kept"), every=2)
    done = train(small(), blocks, a_schedule(10), setting)
    assert done.checkpoint is not None
    (done.checkpoint / "optimizer.safetensors").write_bytes(b"no")
    with pytest.raises(TrainingError, match=r"step-0000010 cannot be read"):
        train(small(), blocks, a_schedule(10), setting)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = make_blocks(tokens_file(tmp_path), None, 16, 10**6)
    setting = a_setting(str(tmp_path / "kept"), every=2)
    calls = 0

    def loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return next_token_loss(logits, tokens) * (math.nan if calls == 11 else 1)  # in step 5, of two forwards each

    monkeypatch.setattr(training_module, "next_token_loss", loss)
    with pytest.raises(
        TrainingError, match=r"loss is nan at step 5 \(last event: v\).*checkpoint is .*step-0000004"
    ) as caught:
        train(small(), blocks, a_schedule(), setting)
    monkeypatch.undo()
    (folder,) = (tmp_path / "kept").iterdir()
    assert [p.name for p in sorted(folder.iterdir())] == ["step-0000002", "step-0000004"]
    assert "Lower the learning rate" in str(caught.value)
    resumed = train(small(), blocks, a_schedule(), setting)
    assert all(math.isfinite(h["loss"]) for h in resumed.history)
    assert len(resumed.history) == 12


def test_micro_batches_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    blocks = make_blocks(tokens_file(tmp_path), None, 16, 10**6)
    control = a_schedule(6).control
    whole = train(small("llama"), blocks, control, replace(a_setting(), micro_batch=4))
    parts = train(small("llama"), blocks, control, replace(a_setting(), micro_batch=1))
    assert [h["loss"] for h in parts.history] == pytest.approx([h["loss"] for h in whole.history], rel=1e-4)


def test_the_penalty_is_zero_for_equal_scales_and_leaves_its_target_alone() -> None:
    ordinary = Rows.of(torch.zeros(2, 5, dtype=torch.long)).ordinary
    equal = torch.full((2, 5), 3.0, requires_grad=True)
    value = spread(equal, ordinary)
    value.backward()
    assert value == 0
    assert equal.grad is not None
    assert not equal.grad.any()
    spiked = torch.tensor([[9.0, 3, 3, 3, 3]], requires_grad=True)
    value = spread(spiked, Rows.of(torch.zeros(1, 5, dtype=torch.long)).ordinary)
    value.backward()
    assert value.item() == pytest.approx(36 / 5)  # special positions count in the penalty, not in its target
    assert spiked.grad.tolist()[0] == pytest.approx([12 / 5, 0, 0, 0, 0])


def test_calibration_by_hand() -> None:
    confidence, correct = np.array([[0.9, 0.9, 0.35, 0.35]]), np.array([[1.0, 0.0, 0.0, 1.0]])
    assert calibration_error(confidence, correct) == pytest.approx(0.5 * 0.4 + 0.5 * 0.15)
    loss = np.array([[1.0, 2.0], [3.0, 6.0]])
    control = Predictions(loss, loss, np.full((2, 2), 0.5), np.ones((2, 2)))
    table = loss_table({"control": control, "worse": replace(control, loss=loss + 1)}, "control", 0).set_index(
        "variant"
    )
    assert table.loc["worse", ["mean", "median", "gap_to_control"]].tolist() == [4, 3.5, 1]
    assert table.loc["worse", ["gap_low", "gap_high"]].isna().all(), "two blocks support no interval"
    many = {
        name: Predictions(*(np.repeat(v, 3, 0) for v in vars(p).values()))
        for name, p in {"control": control, "worse": replace(control, loss=loss + 1)}.items()
    }
    gaps = loss_table(many, "control", 0)
    assert gaps.set_index("variant").loc["worse", ["gap_low", "gap_high"]].tolist() == [1, 1]


def test_predictions_are_the_models_own() -> None:
    blocks = torch.randint(3, 90, (3, 7))
    module = native("llama").module
    predictions, distances = predict({"a": module, "b": native("gpt2").module}, blocks)
    with torch.no_grad():
        logits = module(blocks).logits
    assert predictions["a"].loss == pytest.approx(next_token_loss(logits, blocks).numpy(), abs=1e-5)
    assert predictions["a"].correct.tolist() == (logits[:, :-1].argmax(-1) == blocks[:, 1:]).double().tolist()
    assert distances["a", "b"].shape == (3, 6)


@pytest.fixture(scope="module")
def removal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path, Path]:
    """A whole removal on a tiny model: its result, the exported folder and the folder of everything."""
    folder = tmp_path_factory.mktemp("removal")
    source = tokens_file(folder)
    analysis = NormRemoval(
        schedule="proportional", steps=40, text=source, block=16, batch=8, micro_batch=8, learning_rate=3e-3, neurons=2, at_once=True,
        checkpoints=str(folder / "kept"), export=str(folder / "export"),
    )  # fmt: skip
    model = NativeModel(make("llama"), ref="tiny", weights="w")
    prompts = [tuple(range(3 + i, 15 + i)) for i in range(4)]
    result = analysis.run(model, prompts, store=ActivationStore(folder / "store"))
    return result, folder / "export", folder


def test_a_removal_reports_before_and_after(removal: tuple[Result, Path, Path]) -> None:
    result, _, folder = removal
    tables = result.tables
    assert {"step", "event", "loss"} <= set(tables["training"])
    assert {"variant", "mean", "median", "p999", "n_tokens"} <= set(tables["losses"])
    assert set(tables["losses"]["variant"]) == {"original", "norm_free", "control", "at_once", "untrained"}
    totals = tables["attribution_total"].set_index("variant")["nmae"]
    assert totals["norm_free"] < 1e-12
    assert totals["original"] > 0.01
    assert totals["control"] > 0.01
    per_head = tables["attribution_error"]
    assert per_head.loc[per_head["variant"] == "norm_free", "nmae"].max() < 1e-9
    neurons = tables["neurons"]
    free = neurons[neurons["variant"] == "norm_free"]
    assert (free["abs_delta_ce"] - free["abs_delta_ce_held"]).abs().max() < 1e-6
    kept = neurons[neurons["variant"] == "original"]
    assert (kept["abs_delta_ce"] - kept["abs_delta_ce_held"]).abs().max() > 1e-4
    assert set(tables["sinks"]["variant"]) == set(tables["stream"]["variant"]) == {"original", "control", "norm_free"}
    assert set(tables["freeze_effect"]["variant"]) == {"original", "control"}
    loaded = Result.load(result.save(folder / "report"))
    assert {"training", "losses", "freeze_effect", "attribution_error"} <= set(loaded.figures)
    for name in loaded.figures:
        assert loaded.figure(name).data
    for name in loaded.profiles:
        assert set(loaded.profile(name)) >= {"layer", "value"}


def test_a_removal_counts_what_it_trained_on_and_froze(removal: tuple[Result, Path, Path]) -> None:
    result, _, _ = removal
    analysis = NormRemoval(**{**result.options, "layers": ()})
    prompts = [Prompt(tuple(range(3 + i, 15 + i))) for i in range(4)]
    foretold = analysis.interventions(NativeModel(make("llama"), ref="tiny", weights="w"), prompts)
    blocks = int(result.tables["losses"]["n_tokens"].iloc[0]) // 15
    assert foretold.forwards["training sequences"] == 3 * 40 * 8
    assert 5 * blocks <= foretold.forwards["comparisons"]
    known = foretold.forwards["training sequences"] + foretold.forwards["frozen norms"]
    assert result.provenance["counts"]["intervention_forwards"] == known + 5 * blocks


def test_the_export_is_the_norm_free_model(removal: tuple[Result, Path, Path]) -> None:
    result, folder, _ = removal
    assert result.tables["export"]["difference"].max() < 1e-5
    model = load_model(str(folder))
    with pytest.raises(PointError, match="nothing to freeze"):
        NormRemoval(schedule="at_once", text="x").run(model, [(3, 4)])
    again = NormRemoval(neurons=0, sinks=False).run(
        model, [tuple(range(3, 15))], store=ActivationStore(folder.parent / "other")
    )
    assert again.tables["attribution_total"]["nmae"].max() < 1e-12
    assert "freeze_effect" not in again.tables


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="schedule is given without text"):
        NormRemoval(schedule="small")
    with pytest.raises(OptionError, match="text is given without schedule"):
        NormRemoval(text="x")
    with pytest.raises(OptionError, match="export is given without schedule"):
        NormRemoval(export="x")
    with pytest.raises(OptionError, match="nothing to do"):
        NormRemoval(diagnose=False)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(OptionError, match="holds something other than a model"):
        NormRemoval(schedule="small", text="x", export=str(tmp_path))
    partial = tmp_path / "part.toml"
    partial.write_text(
        'steps = 9\nlearning_rate = 1e-3\nmin_learning_rate = 1e-4\nwarmup = 1\n[[phases]]\nsites = "mlp"\nstart = 2\n'
    )
    with pytest.raises(OptionError, match=r"leaves 7 sites with their norms, first qk\.0"):
        NormRemoval(schedule=str(partial), text=tokens_file(tmp_path), block=16, checkpoints="").run(native(), [(3, 4)])
    with pytest.raises(OptionError, match="block is 65, but the context window"):
        NormRemoval(schedule="at_once", text="x", block=65, checkpoints="").run(native(), [(3, 4)])
    with pytest.raises(PromptError, match="no prompt has a second token"):
        NormRemoval().run(native(), [(3,)])
    with pytest.raises(PointError, match="reads both ways"):
        NormRemoval().run(native("bert"), [(3, 4)])


def test_blocks_hold_out_at_least_one() -> None:
    blocks = Blocks(torch.zeros(2, 4), torch.zeros(1, 4), None)
    assert blocks.batch(0, 5, 0).shape == (5, 4)
