"""The Jacobian lens: the estimator equals plain autograd on every causal family, closed forms hold, and fits go on after a kill."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from fake_tokenizer import FakeTokenizer
from families import FAMILIES, make, prompt
from tiny import native
from torch import Tensor

from analyses.cli import main
from analyses.reading import jacobian as reading
from analyses.reading.jacobian import held_out_rows, with_halves
from analyses.reading.quality import judged_rows
from analyses.reading.texts import Texts
from analyses.studies.local_engine import FORKSERVER, PRELOADED
from probes.blocks.rerouting import Caller, call_blocks
from probes.errors import OptionError, PointError, PromptError
from probes.lens_fits.jacobian import Estimator, text_jacobians, whole_jacobians
from probes.lens_fits.jacobian_fit import fit_cost, fit_jacobian
from probes.lens_fits.mlp_maps import _mlp_of
from probes.lenses import logit
from probes.lenses.files import load_lens, save_lens
from probes.lenses.jacobian import JacobianLens, merged
from probes.models import weights_digest
from probes.models.backends.native import NativeModel
from probes.progress import Progress
from probes.store import ActivationStore

CAUSAL = [family for family in FAMILIES if family != "bert"]
SPLIT = [family for family in CAUSAL if not family.startswith("falcon")]
"""Families whose attention goes through the interface that cuts gradients."""
LENGTH, D_MODEL = 8, 32
TOKENS = prompt(LENGTH)[0].tolist()
SHORT = Estimator(target=2, layers=(0, 1), skip=2, length=LENGTH, dim_batch=8)
TEXTS = [tuple(row) for row in prompt(LENGTH, seed=5, rows=5).tolist()]


def every_derivative(model: NativeModel, source: int, target: int = 2) -> Tensor:
    """d row at t' of the target / d row at t of the source, [t', out, t, in], by plain autograd through the blocks."""

    def work(hidden: Tensor, call: Caller) -> Tensor:
        with torch.no_grad():
            for layer in range(source + 1):
                hidden = call(layer, hidden)

        def carried(entering: Tensor) -> Tensor:
            for layer in range(source + 1, target + 1):
                entering = call(layer, entering)
            return entering

        return torch.autograd.functional.jacobian(carried, hidden.detach(), vectorize=True)[0][:, :, 0]

    with torch.enable_grad():
        return call_blocks(model, torch.tensor([TOKENS]), work, use_cache=False)


def averaged(every: Tensor, positions: str) -> Tensor:
    """The estimator's definition, written out."""
    counted = range(SHORT.skip, LENGTH - 1)
    reach = {
        "later": lambda t: range(t, LENGTH - 1),
        "self": lambda t: [t],
        "future": lambda t: range(t + 1, LENGTH - 1),
    }
    total = sum((every[later, :, t] for t in counted for later in reach[positions](t)), torch.zeros(D_MODEL, D_MODEL))
    return total / len(counted)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_estimator_is_its_definition(family: str) -> None:
    model = native(family)
    jacobians = whole_jacobians(model, TOKENS, SHORT)
    for layer in SHORT.layers:
        every = every_derivative(model, layer)
        torch.testing.assert_close(jacobians[layer], averaged(every, "later"), atol=1e-5, rtol=1e-4)
        for positions in ("self", "future") if family in SPLIT else ():
            part = whole_jacobians(model, TOKENS, replace(SHORT, positions=positions))[layer]
            torch.testing.assert_close(part, averaged(every, positions), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_how_many_cotangents_go_together_changes_nothing(family: str) -> None:
    loop, batched = (whole_jacobians(native(family), TOKENS, replace(SHORT, dim_batch=n)) for n in (1, 32))
    for layer in SHORT.layers:
        torch.testing.assert_close(loop[layer], batched[layer], atol=1e-6, rtol=1e-5)


def test_chosen_tokens_need_their_own_cotangents_only() -> None:
    model = native("llama")
    vectors = model.unembedding().weight[[3, 50]].detach().float()
    whole, restricted = whole_jacobians(model, TOKENS, SHORT), text_jacobians(model, TOKENS, SHORT, vectors)
    for layer in SHORT.layers:
        torch.testing.assert_close(restricted[layer], vectors @ whole[layer], atol=1e-4, rtol=1e-4)


def test_frozen_weights_leave_values_alone() -> None:
    """With attention's weights constant, values and the output map still carry gradients: another matrix, of the same output."""
    model = native("llama")
    frozen, free = (whole_jacobians(model, TOKENS, replace(SHORT, freeze_qk=freeze)) for freeze in (True, False))
    assert not torch.allclose(frozen[0], free[0], atol=1e-3)
    assert model.refusal is not None
    again = whole_jacobians(model, TOKENS, SHORT)
    assert torch.equal(again[0], free[0])


MAPS = torch.randn(3, D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(2)) * 0.1


def planted(added: Callable[[int, Tensor], Tensor], averaging: bool = False) -> NativeModel:
    """A model whose MLPs add `added(layer, stream)`; its attention adds nothing, or the running mean's image, unscaled."""
    module: Any = make("llama")
    for layer, block in enumerate(module.model.layers):
        with torch.no_grad():
            block.self_attn.q_proj.weight.zero_()  # every score is 0, so every earlier position weighs the same
            if not averaging:
                block.self_attn.o_proj.weight.zero_()

        def unscaled(_: Any, rows: Tensor) -> Tensor:
            return rows

        def add(_: Any, rows: Tensor, *, at: int = layer) -> Tensor:
            return added(at, rows)

        for part, forward in (
            (block.input_layernorm, unscaled), (block.post_attention_layernorm, unscaled), (block.mlp, add),
        ):  # fmt: skip
            part.forward = MethodType(forward, part)
    return NativeModel(module, ref="planted", weights=weights_digest(module))


def attention_map(model: NativeModel, layer: int) -> Tensor:
    """[out, in], what attention makes of the mean row: two query heads read each of the two value heads."""
    attention = model.module.model.layers[layer].self_attn
    return attention.o_proj.weight @ attention.v_proj.weight.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)


@pytest.mark.parametrize(("skip", "length"), [(0, 8), (2, 8), (3, 6)])
def test_identity_blocks_have_the_identity(skip: int, length: int) -> None:
    model = planted(lambda _, rows: torch.zeros_like(rows))
    jacobians = whole_jacobians(model, TOKENS, replace(SHORT, skip=skip, length=length))
    assert all(torch.equal(matrix, torch.eye(D_MODEL)) for matrix in jacobians.values())


def linear_model() -> NativeModel:
    return planted(lambda layer, rows: rows @ MAPS[layer])


def test_linear_blocks_have_the_product_of_their_maps() -> None:
    """And the lens then says at every layer what the model says at its end."""
    jacobians = whole_jacobians(linear_model(), TOKENS, SHORT)
    product = torch.eye(D_MODEL)
    for layer in (1, 0):
        product = (torch.eye(D_MODEL) + MAPS[layer + 1]) @ product
        torch.testing.assert_close(jacobians[layer], product.T, atol=1e-5, rtol=1e-5)
    rows = torch.randn(4, D_MODEL)
    final = rows + rows @ MAPS[1]
    final = final + final @ MAPS[2]
    torch.testing.assert_close(rows @ jacobians[0].T, final, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("skip", "length"), [(1, 8), (3, 7)])
def test_averaging_attention_has_the_closed_form(skip: int, length: int) -> None:
    """One block that adds the running mean's image: d h_t' / d h_t = [t' = t] + A / (t' + 1)."""
    model = planted(lambda _, rows: torch.zeros_like(rows), averaging=True)
    jacobian = whole_jacobians(model, TOKENS, replace(SHORT, layers=(1,), skip=skip, length=length))[1]
    counted = range(skip, length - 1)
    weight = sum(1 / (later + 1) for t in counted for later in range(t, length - 1)) / len(counted)
    expected = torch.eye(D_MODEL) + weight * attention_map(model, 2)
    torch.testing.assert_close(jacobian, expected.detach(), atol=1e-5, rtol=1e-5)


def test_random_signs_are_unbiased_and_worse() -> None:
    """On a linear model one-hot rows are exact; n sign vectors have the relative squared error (d - 1) / n."""
    model = linear_model()
    exact = whole_jacobians(model, TOKENS, SHORT)[0]
    drawn = [
        whole_jacobians(model, TOKENS, replace(SHORT, cotangents="rademacher", seed=seed))[0] for seed in range(40)
    ]
    squares = [float((one - exact).square().sum() / exact.square().sum()) for one in drawn]
    assert sum(squares) / 40 == pytest.approx((D_MODEL - 1) / D_MODEL, rel=0.1)
    assert float((torch.stack(drawn).mean(0) - exact).square().sum() / exact.square().sum()) < 0.05


WITH_MAPS = [family for family in CAUSAL if family not in ("mixtral", "opt", "opt_post_norm")]


@pytest.mark.parametrize("family", CAUSAL)
def test_an_mlp_is_its_matrices_where_it_has_them(family: str) -> None:
    """Experts and loose layers have none, and are differentiated as they are."""
    model = native(family)
    mlp = _mlp_of(model.anatomy, 1)
    rows = torch.randn(1, 3, D_MODEL)
    maps = None if mlp is None else mlp.maps(rows)
    assert (maps is not None) == (family in WITH_MAPS)
    if mlp is not None and maps is not None:
        module = mlp.module
        every = torch.autograd.functional.jacobian(module, rows, vectorize=True)[0][:, :, 0]
        torch.testing.assert_close(maps, torch.stack([every[at, :, at] for at in range(3)]), atol=1e-5, rtol=1e-4)


def test_matrices_that_are_not_the_derivative_are_not_used() -> None:
    model = NativeModel(make("llama"), ref="odd", weights="odd")
    mlp = _mlp_of(model.anatomy, 0)
    assert mlp is not None
    plain = mlp.module.forward
    mlp.module.forward = lambda x: plain(x) + x.cumsum(1)
    assert mlp.maps(torch.randn(1, 3, D_MODEL)) is None


class Doomed(Progress):
    """Kills its process at the fourth text."""

    done = 0

    def advance(self, done: int = 1) -> None:
        self.done += 1
        if self.done == 4:
            os.kill(os.getpid(), signal.SIGKILL)


def doomed_fit(checkpoint: Path) -> None:
    fit_jacobian(native("llama"), TEXTS, SHORT, corpus="x", checkpoint=checkpoint, save_seconds=0, progress=Doomed())


def test_sigkill_loses_no_more_than_the_text_at_hand(tmp_path: Path) -> None:
    FORKSERVER.set_forkserver_preload(list(PRELOADED))
    process = FORKSERVER.Process(target=doomed_fit, args=(tmp_path / "J.partial",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    model = native("llama")
    resumed = fit_jacobian(model, TEXTS, SHORT, corpus="x", checkpoint=tmp_path / "J.partial")
    assert resumed.resumed == 3
    whole = fit_jacobian(model, TEXTS, SHORT, corpus="x").lens.maps
    assert all(torch.equal(resumed.lens.maps[layer], whole[layer]) for layer in SHORT.layers)


class Killed(Progress):
    """Ends the fit after some texts."""

    def __init__(self, texts: int) -> None:
        self.left = texts

    def advance(self, done: int = 1) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_a_killed_fit_goes_on_bit_for_bit_and_halves_merge(tmp_path: Path) -> None:
    model, running = native("llama"), tmp_path / "J.partial"
    whole = fit_jacobian(model, TEXTS, SHORT, corpus="x")
    with pytest.raises(KeyboardInterrupt):
        fit_jacobian(model, TEXTS, SHORT, corpus="x", checkpoint=running, save_seconds=0, progress=Killed(3))
    resumed = fit_jacobian(model, TEXTS, SHORT, corpus="x", checkpoint=running, save_seconds=0)
    assert resumed.resumed == 3
    parts = [fit_jacobian(model, TEXTS[part], SHORT, corpus="x").lens for part in (slice(0, 2), slice(2, 5))]
    union = merged(parts)
    mean = {
        layer: torch.stack([whole_jacobians(model, text, SHORT)[layer] for text in TEXTS]).mean(0) for layer in (0, 1)
    }
    for layer in SHORT.layers:
        assert torch.equal(resumed.lens.maps[layer], whole.lens.maps[layer])
        torch.testing.assert_close(union.maps[layer], whole.lens.maps[layer], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(whole.lens.maps[layer], mean[layer], atol=1e-6, rtol=1e-5)
    assert union.card.corpus.texts == 5
    longer = fit_jacobian(model, [*TEXTS, tuple(TOKENS)], SHORT, corpus="x", checkpoint=running, save_seconds=0)
    assert longer.resumed == 5
    for changed in ({"estimator": replace(SHORT, skip=1)}, {"texts": TEXTS[::-1]}):
        with pytest.raises(OptionError, match="the sums of a fit with another"):
            fit_jacobian(
                **{"model": model, "texts": TEXTS, "estimator": SHORT, "corpus": "x", "checkpoint": running, **changed}
            )
    with pytest.raises(OptionError, match="share a text"):
        merged([parts[0], parts[0]])
    with pytest.raises(OptionError, match="differ in weights"):
        merged([parts[0], fit_jacobian(native("qwen2"), TEXTS, SHORT, corpus="x").lens])


def test_halves_say_how_settled_a_lens_is() -> None:
    fit = fit_jacobian(native("llama"), TEXTS, SHORT, corpus="x")
    quality = {(row["measure"], row["layer"]): row["value"] for row in with_halves(fit).card.quality}
    assert 0.5 < quality["split_half_cosine", 0] < 1
    assert quality["relative_error", 1] < quality["relative_error", 0]


def test_halves_are_read_side_by_side_on_other_text(store: ActivationStore) -> None:
    model = native("llama")
    fit = fit_jacobian(model, TEXTS, SHORT, corpus="x")
    other = Texts(tuple(tuple(row) for row in prompt(LENGTH, seed=9, rows=3).tolist()), (0, 1, 2), "other")
    judged = judged_rows(model, other, store, positions=2)
    quality = {
        (q["measure"], q["layer"]): q["value"] for q in with_halves(fit, judged, model.unembedding()).card.quality
    }
    assert fit.halves is not None
    first = [
        logit.read(half.readable(judged.rows(0), 0), model.unembedding(), ids=torch.arange(97))
        .logprobs.topk(10)
        .indices
        for half in fit.halves
    ]
    same = [len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(*first, strict=True)]
    assert quality["split_half_top10", 0] == pytest.approx(sum(same) / len(same))
    assert quality["split_half_top1", 0] == pytest.approx(float((first[0][:, 0] == first[1][:, 0]).float().mean()))
    twice = with_halves(replace(fit, halves=(fit.lens, fit.lens)), judged, model.unembedding()).card.quality
    assert {q["value"] for q in twice if q["measure"].startswith("split_half_top")} == {1.0}


def test_sentences_inside_a_fitted_text_are_not_held_out(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = NativeModel(make("llama"), ref="with words", weights="x", tokenizer=FakeTokenizer())
    sentences = Texts(((9, 5, 6, 8), (9, 40, 41, 8), (9, 6, 7, 8)), (0, 1, 2), "sentences")
    monkeypatch.setattr(reading, "shipped_texts", lambda *_: sentences)
    judged = held_out_rows(model, Texts(((4, 5, 6, 7),), (0,), "packed"), store)
    assert judged is not None
    assert judged.groups.tolist() == [1, 1]
    assert held_out_rows(native("llama"), sentences, store) is None


def test_files_keep_readings_to_half_precision(tmp_path: Path) -> None:
    model = native("llama")
    lens = fit_jacobian(model, TEXTS, SHORT, corpus="x").lens
    saved = save_lens(lens, tmp_path / "J.lens")
    loaded = load_lens(tmp_path / "J.lens")
    rows, ids = torch.randn(9, D_MODEL), torch.arange(97)
    exact, kept, again = (
        logit.read(one.readable(rows, 0), model.unembedding(), ids=ids).logprobs for one in (lens, saved, loaded)
    )
    assert torch.equal(kept, again)
    torch.testing.assert_close(kept, exact, atol=2e-3, rtol=0)
    assert lens.readable(rows, 2) is rows
    wide = JacobianLens(lens.card, {layer: 1e6 * matrix for layer, matrix in lens.maps.items()})
    assert torch.equal(save_lens(wide, tmp_path / "W.lens").readable(rows, 0), wide.readable(rows, 0))


def test_taking_one_vector_off_every_lens_vector_changes_no_reading() -> None:
    lens = fit_jacobian(native("gpt2"), TEXTS[:2], SHORT, corpus="x").lens
    vectors = native("gpt2").unembedding().weight.detach().float() @ lens.maps[0]
    rows = torch.randn(6, D_MODEL)
    plain, centred = ((rows @ v.T).softmax(-1) for v in (vectors, vectors - vectors.mean(0)))
    torch.testing.assert_close(plain, centred, atol=1e-6, rtol=1e-5)


def test_what_cannot_be_fitted_is_refused() -> None:
    llama = native("llama")
    with pytest.raises(PointError, match="reads both ways"):
        fit_jacobian(native("bert"), TEXTS, SHORT, corpus="x")
    with pytest.raises(PromptError, match=r"the longest has 3\): give longer texts"):
        fit_jacobian(llama, [(5, 6, 7)], SHORT, corpus="x")
    with pytest.raises(PointError, match="split its attention"):
        whole_jacobians(native("falcon_grouped"), TOKENS, replace(SHORT, positions="self"))
    for wrong in (replace(SHORT, target=3), replace(SHORT, layers=(2,)), replace(SHORT, skip=7)):
        with pytest.raises(OptionError):
            fit_jacobian(llama, TEXTS, wrong, corpus="x")


def test_the_estimate_counts_backwards_and_texts() -> None:
    cost = fit_cost(native("llama"), [*TEXTS, (4, 5)], SHORT)
    assert (cost.texts, cost.backwards_per_text) == (5, 4)
    assert cost.seconds == pytest.approx(5 * cost.seconds_per_text)


def test_the_command_fits_and_reads_a_jacobian_lens(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fit.jsonl").write_text("\n".join(json.dumps({"tokens": text}) for text in TEXTS))
    model = ["--model", str(llama_folder), "--prompts", str(tmp_path / "fit.jsonl"), "--store", str(tmp_path / "s")]
    fit = ["lens", "fit", "--kind", "jacobian", *model, "--skip", "2", "--out", str(tmp_path / "J.lens")]
    assert main([*fit, "--dry-run"]) == 0
    assert not (tmp_path / "J.lens").exists()
    assert main(fit) == 0
    assert not (tmp_path / "J.lens.partial").exists()
    assert "split_half_cosine" in capsys.readouterr().out
    run = ["run", "logit_lens", *model, "--lens", str(tmp_path / "J.lens"), "--out", str(tmp_path / "run")]
    assert main(run) == 0
    assert main([*fit, "--layers", "0-x"]) == 2
    assert "give layers such as" in capsys.readouterr().err
