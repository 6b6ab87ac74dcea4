"""The tuned lens: planted maps are recovered, its choice never loses to the logit lens where it was made, and files keep it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make

from analyses.cli import main
from analyses.logit_lens import LogitLens as LogitLensAnalysis
from analyses.reading.texts import Texts
from analyses.reading.tuned import fit_tuned_on, kl_to_fixed, unigram_logprobs
from probes.errors import ModelError, OptionError, ProbeError
from probes.lenses import logit as lens
from probes.lenses import tuned_fit
from probes.lenses.card import Corpus, LensCard, card_of
from probes.lenses.files import load_lens, save_lens
from probes.lenses.tuned import unit_scale
from probes.lenses.tuned_fit import TunedFit, fit_tuned
from probes.lenses.tuned_refine import refined
from probes.models import weights_digest
from probes.models.backends.native import NativeModel
from probes.models.protocol import Model
from probes.store import ActivationStore

D_MODEL = 32


def planted(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a layer, and final rows that are an affine image of them (at unit scale)."""
    generator = torch.Generator().manual_seed(seed)
    early = unit_scale(torch.randn(n, D_MODEL, generator=generator))
    turn = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(9)))[0]
    return early, early @ turn


def fitted(
    model: Model, rows: Sequence[torch.Tensor], text_length: int, offsets: Sequence[int] = (0,), **options: Any
) -> TunedFit:
    """A fit on rows [n, d_model] of each layer, cut into texts of equal length."""
    card = dataclasses.replace(card_of("tuned", model), n_layers=len(rows), d_model=D_MODEL, target=len(rows) - 1)
    texts = [torch.split(layer, text_length) for layer in rows]
    groups = list(range(len(texts[0])))
    return fit_tuned(lambda layer: texts[layer], groups, model.unembedding(), card, offsets=offsets, **options)


def random_texts(n: int, length: int = 12, seed: int = 0) -> Texts:
    ids = torch.randint(3, 97, (n, length), generator=torch.Generator().manual_seed(seed))
    return Texts(tuple(tuple(row) for row in ids.tolist()), tuple(range(n)), "random tokens")


def test_a_planted_map_is_recovered(tiny: NativeModel) -> None:
    fit = fitted(tiny, planted(1500), 10)
    assert fit.kl["tuned"][0].mean() < 1e-4 < 0.1 < fit.kl["logit"][0].mean()
    new, image = planted(50, seed=5)
    torch.testing.assert_close(fit.lens.readable(new, 0), image, atol=1e-2, rtol=1e-2)
    assert (fit.rows_fitted, len(fit.text_of)) == (900, tuned_fit.SCORED_ROWS)
    assert fit.kl["shuffled"][0].mean() > fit.kl["tuned"][0].mean() + 0.1


def test_the_last_layer_is_read_as_it_is(tiny: NativeModel) -> None:
    rows = planted(200)
    fit = fitted(tiny, rows, 10)
    assert fit.lens.readable(rows[1], 1) is rows[1]
    assert fit.kl["tuned"][1].mean() == fit.kl["logit"][1].mean() == pytest.approx(0, abs=1e-6)


def test_where_little_is_to_be_learned_the_logit_lens_stays(tiny: NativeModel) -> None:
    """Final rows that are the layer's own plus noise: any map but the identity only fits the noise."""
    generator = torch.Generator().manual_seed(0)
    early = torch.randn(60, D_MODEL, generator=generator)
    rows = [early, early + 0.3 * torch.randn(60, D_MODEL, generator=generator)]
    assert fitted(tiny, rows, 3).choice[0, 0] == "identity"


def test_steps_down_the_divergence_count_where_they_help(tiny: NativeModel) -> None:
    """From the closed form, on the rows it was fitted on, the divergence falls; on the choosing fold it never rises."""
    early, image = planted(300)
    rows = (early, image + torch.randn(image.shape, generator=torch.Generator().manual_seed(3)))
    plain, further = (fitted(tiny, rows, 20, refine=steps) for steps in (0, 40))
    x, y = (unit_scale(part) for part in rows)
    start = plain.lens.maps[0, 0]
    before, after = (
        lens.read(one(x), tiny.unembedding(), reference=y).kl.mean()
        for one in (start, refined(start, x, y, tiny.unembedding(), 40, 0))
    )
    assert after < 0.98 * before
    assert further.choosing[0, 0]["refined"] < plain.choosing[0, 0][plain.choice[0, 0]]
    assert (further.choice[0, 0], further.lens.card.options["refine"]) == ("refined", 40)


def test_layers_that_are_not_fitted_are_read_as_they_are(tiny: NativeModel) -> None:
    rows = [*planted(100), torch.randn(100, D_MODEL, generator=torch.Generator().manual_seed(0))]
    fit = fitted(tiny, rows, 10, layers=(1,))
    assert (fit.layers, fit.lens.card.layers) == ((1, 2), (1,))
    assert fit.kl["tuned"].shape[0] == 2
    assert fit.lens.readable(rows[0], 0) is rows[0]
    with pytest.raises(OptionError, match="legal are 0 to 2"):
        fitted(tiny, rows, 10, layers=(4,))


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_never_loses_to_the_logit_lens_on_its_fold(tiny: NativeModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(80, D_MODEL, generator=generator) for _ in range(3)]
    fit = fitted(tiny, rows, 4)
    for place, losses in fit.choosing.items():
        assert losses[fit.choice[place]] == min(losses.values()) <= losses["identity"]


def test_held_out_rows_decide_the_losses(tiny: NativeModel) -> None:
    """Pure memory must not look good: targets drawn apart from the rows cannot be predicted on new texts."""
    generator = torch.Generator().manual_seed(1)
    fit = fitted(tiny, [torch.randn(80, D_MODEL, generator=generator) for _ in range(2)], 2)
    assert fit.kl["tuned"][0].mean() > 0.5 * fit.kl["logit"][0].mean()


def test_the_scale_of_rows_does_not_matter(tiny: NativeModel) -> None:
    rows = planted(100)
    a, b = fitted(tiny, rows, 5), fitted(tiny, [7 * layer for layer in rows], 5)
    np.testing.assert_allclose(a.kl["tuned"], b.kl["tuned"], rtol=1e-2, atol=1e-5)
    read = [lens.read(f.lens.readable(rows[0] * k, 0), tiny.unembedding()).entropy_bits for f, k in ((a, 1), (b, 7))]
    torch.testing.assert_close(read[0], read[1], rtol=1e-3, atol=1e-3)


def test_a_copier_is_read_by_the_offset_it_copies_with(tiny: NativeModel) -> None:
    """The last row at t + 1 is the image of the row at t; the last row at t is another token's."""
    early, image = planted(1200)
    fit = fitted(tiny, [early, image.roll(1, 0)], 12, offsets=(0, 1))
    at_once, ahead = (min(fit.choosing[0, offset].values()) for offset in (0, 1))
    assert ahead < 1e-3 < 0.05 < at_once
    torch.testing.assert_close(fit.lens.readable(early[:9], 0, 1), image[:9], atol=2e-2, rtol=2e-2)
    with pytest.raises(OptionError, match="--offsets 0,2"):
        fit.lens.readable(early, 0, 2)


def test_rows_without_signal_are_read_no_better_than_by_token_frequencies(tiny: NativeModel) -> None:
    """Where every row is the same, the bias gives the mean final row, which says what the frequencies of tokens say."""
    generator = torch.Generator().manual_seed(3)
    unembedding = tiny.unembedding()
    same, noise = torch.randn(2, 1, D_MODEL, generator=generator), torch.randn(900, D_MODEL, generator=generator)
    fit = fitted(tiny, [same[0].expand(900, -1), same[1] + 0.3 * noise], 9)
    final = same[1] + 0.3 * noise
    said = lens.read(final, unembedding, ids=torch.arange(97)).logprobs.exp().mean(0).log()
    unigram = kl_to_fixed(final, unembedding, said).mean()
    assert fit.kl["bias_only"][0].mean() == pytest.approx(unigram, rel=0.1)
    assert fit.kl["shuffled"][0].mean() >= 0.95 * unigram


def test_token_frequencies_are_smoothed_and_compared_exactly(tiny: NativeModel) -> None:
    logprobs = unigram_logprobs([(1, 1, 2)], 4)
    torch.testing.assert_close(logprobs.exp(), torch.tensor([1, 3, 2, 1]) / 7)
    rows, unembedding = planted(5)[0], tiny.unembedding()
    uniform = torch.full((97,), -np.log(97))
    entropy = lens.read(rows, unembedding).entropy_bits.double().numpy() * np.log(2)
    np.testing.assert_allclose(kl_to_fixed(rows, unembedding, uniform), np.log(97) - entropy, rtol=1e-4)


def test_too_few_texts_are_refused(tiny: NativeModel) -> None:
    with pytest.raises(ProbeError, match="at least 5"):
        fitted(tiny, [torch.randn(8, D_MODEL) for _ in range(2)], 2)


def test_moments_of_texts_add_up_and_the_ladder_is_plain_ridge() -> None:
    x, y = planted(60)
    moments = tuned_fit.Moments(D_MODEL, D_MODEL)
    for part in (slice(0, 25), slice(25, 60)):
        moments.add(x[part], y[part])
    centred, residual = (v - v.mean(0) for v in (x.double(), (y - x).double()))
    gram = centred.T @ centred
    shrink = 0.1 * gram.diagonal().mean() * torch.eye(D_MODEL)
    expected = torch.linalg.solve(gram + shrink, centred.T @ residual)
    torch.testing.assert_close(moments.ridges([0.1])[0].change, expected.float(), atol=1e-5, rtol=1e-4)


def test_a_fit_from_stored_rows_runs_no_forward_and_its_file_reads_alike(
    tiny: NativeModel, store: ActivationStore, tmp_path: Path
) -> None:
    first, captured = fit_tuned_on(tiny, random_texts(20), store)
    again, stored = fit_tuned_on(tiny, random_texts(20), store)
    assert (captured.done.forwards, stored.done.forwards) == (20, 0)
    saved = save_lens(again.lens, tmp_path / "T.lens")
    loaded = load_lens(tmp_path / "T.lens")
    rows = torch.randn(7, D_MODEL)
    for layer in range(3):
        one = first.lens.readable(rows, layer)
        assert torch.equal(one, saved.readable(rows, layer))
        assert torch.equal(one, loaded.readable(rows, layer))
    assert loaded.card == saved.card
    assert {row["lens"] for row in loaded.card.quality} == {"tuned", *tuned_fit.CONTROLS}
    assert loaded.card.corpus == Corpus.of("random tokens", random_texts(20).sequences)


def test_a_lens_of_other_weights_is_refused_by_name(tiny: NativeModel, store: ActivationStore, tmp_path: Path) -> None:
    folder = str(tmp_path / "T.lens")
    save_lens(fit_tuned_on(tiny, random_texts(20), store)[0].lens, folder)
    module = make("llama")
    with torch.no_grad():
        next(module.parameters())[0, 0] += 1e-3
    other = NativeModel(module, ref="another-llama", weights=weights_digest(module))
    with pytest.raises(ModelError, match=r"of tiny-llama .* not of another-llama"):
        LogitLensAnalysis(lens=folder).run(other, [[5, 6, 7]], store=store)
    short = make("llama", num_hidden_layers=2)
    shallow = NativeModel(short, ref="shallow", weights=weights_digest(short))
    with pytest.raises(ModelError, match="of tiny-llama, 3 layers of width 32"):
        load_lens(folder).card.check_model(shallow)
    allowed = LogitLensAnalysis(lens=folder, allow_other_weights=True).run(other, [[5, 6, 7]], store=store)
    assert any("other weights" in note for note in allowed.notes)


def test_the_logit_lens_analysis_switches_lenses_without_a_forward(
    tiny: NativeModel, store: ActivationStore, tmp_path: Path
) -> None:
    folder = str(tmp_path / "T.lens")
    tuned = save_lens(fit_tuned_on(tiny, random_texts(40), store)[0].lens, folder)
    plain = LogitLensAnalysis().run(tiny, [[5, 6, 7, 8]], store=store)
    through = LogitLensAnalysis(lens=folder).run(tiny, [[5, 6, 7, 8]], store=store)
    assert (plain.provenance["counts"]["forwards"], through.provenance["counts"]["forwards"]) == (1, 0)
    read = [result.tables["read"].set_index(["layer", "position"])["entropy_bits"] for result in (plain, through)]
    np.testing.assert_allclose(read[0].loc[2], read[1].loc[2], atol=1e-4)
    assert (abs(read[0] - read[1]).groupby("layer").max().loc[list(tuned.card.layers)] > 1e-4).all()
    assert "tiny-llama" in through.notes[-1]
    with pytest.raises(OptionError, match="reads resid_post, not mlp_out"):
        LogitLensAnalysis(lens=folder, point="mlp_out").run(tiny, [[5, 6]], store=store)


def test_damaged_and_missing_lenses_are_refused(tiny: NativeModel, store: ActivationStore, tmp_path: Path) -> None:
    folder = tmp_path / "T.lens"
    save_lens(fit_tuned_on(tiny, random_texts(20), store)[0].lens, folder)
    card = json.loads((folder / "lens.json").read_text())
    for change, said in (
        ({"format": 99}, "format 99"),
        ({"tensors": "0"}, "not those of its card"),
        ({"x": 1}, "not the card"),
    ):
        (folder / "lens.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(OptionError, match=said):
            load_lens(folder)
    with pytest.raises(OptionError, match="is there and is no lens"):
        save_lens(fit_tuned_on(tiny, random_texts(20), store)[0].lens, tmp_path)
    with pytest.raises(OptionError, match=r"unknown lens 'logitt'\. Did you mean 'logit'"):
        LogitLensAnalysis(lens="logitt")


def test_the_command_fits_shows_and_reads(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"tokens": tokens}) for tokens in random_texts(12).sequences]
    (tmp_path / "fit.jsonl").write_text("\n".join(lines))
    model = ["--model", str(llama_folder), "--prompts", str(tmp_path / "fit.jsonl"), "--store", str(tmp_path / "s")]
    folder = str(tmp_path / "T.lens")
    assert main(["lens", "fit", *model, "--out", folder]) == 0
    assert main(["lens", "fit", *model, "--out", folder]) == 0
    assert "0 forward passes" in capsys.readouterr().out
    assert main(["lens", "show", folder]) == 0
    shown = capsys.readouterr().out
    assert "reads what the model will say next" in shown
    assert "kl_to_final" in shown
    assert main(["run", "logit_lens", *model, "--lens", folder, "--out", str(tmp_path / "run")]) == 0
    assert main(["lens", "show", str(tmp_path)]) == 2
    assert "lens.json" not in capsys.readouterr().out


def test_a_card_survives_its_json(tiny: NativeModel) -> None:
    card = card_of("tuned", tiny, corpus=Corpus.of("x", [(1, 2), (1, 3)]), options={"a": 1}, layers=(0, 1))
    assert LensCard.from_json(json.loads(json.dumps(card.as_json())), "x") == card
    assert card.corpus.first_tokens == (1,)
