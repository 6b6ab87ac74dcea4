"""The comparison of lenses: identities of Patchscopes, imports with a spot check, controls, known tokens, and the band."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fake_tokenizer import FakeTokenizer
from families import FAMILIES, make, prompt
from tiny import native
from torch import Tensor

from analyses.cli import main
from analyses.latent_language import LatentLanguage
from analyses.lenses import Lenses
from analyses.lenses import analysis as lenses_analysis
from analyses.lenses.band import band_table, curves, effective_dimension, excess_kurtosis, longest_run, workspace
from analyses.lenses.items import Watched, check_places, check_watch
from analyses.lenses.patched import lift_table, matched, patchscopes_of, target_of
from analyses.lenses.watched import pass_at_k, watched_tables
from analyses.reading.quality import quality_rows, read_texts, solid_layers
from analyses.reading.texts import Texts
from analyses.reading.tuned import fit_tuned_on
from analyses.tokens import tokens_text
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.errors import ModelError, OptionError, PointError, PromptError
from probes.lens_fits.foreign import import_jacobian, read_foreign
from probes.lens_fits.jacobian import Estimator
from probes.lens_fits.jacobian_fit import fit_jacobian
from probes.lens_fits.patchscope import Patchscope, Target
from probes.lenses import logit
from probes.lenses.card import card_of
from probes.lenses.controls import rotated, shuffled_layers
from probes.lenses.files import load_lens, save_lens
from probes.lenses.jacobian import JacobianLens
from probes.lenses.logit import LogitLens
from probes.models import weights_digest
from probes.models.backends.native import NativeModel
from probes.models.protocol import Unembedding
from probes.points import Address
from probes.prompts import Prompt
from probes.store import ActivationStore

CAUSAL = [family for family in FAMILIES if family != "bert"]
LENGTH = 9
SHORT = Estimator(target=2, layers=(0, 1), skip=2, length=LENGTH, dim_batch=32)


def texts(n: int, seed: int = 7, length: int = LENGTH) -> Texts:
    sequences = tuple(tuple(row) for row in prompt(length, seed=seed, rows=n).tolist())
    return Texts(sequences, tuple(range(n)), "random tokens")


def jacobian(model: NativeModel, n: int = 4, seed: int = 7) -> JacobianLens:
    return fit_jacobian(model, texts(n, seed).sequences, SHORT, corpus="random tokens").lens


class TestPatchscope:
    @pytest.mark.parametrize("family", CAUSAL)
    def test_a_prompt_put_into_itself_is_the_plain_run(self, family: str, store: ActivationStore) -> None:
        model, tokens = native(family), prompt(6)[0].tolist()
        rows = capture(model, [tokens], [Need("resid_post.*")], store)
        patchscope = Patchscope.of(model, Target(tuple(tokens), 3))
        final = rows.packed(Address("resid_post", 2))[-1]
        for layer in range(2):
            own = rows.packed(Address("resid_post", layer))[3:4]
            torch.testing.assert_close(patchscope.readable(own, layer)[0], final, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(patchscope.unpatched()[0], final, atol=2e-5, rtol=1e-4)
        assert patchscope.readable(own, 2) is own

    def test_identity_blocks_give_the_row_back_at_the_placeholder(self) -> None:
        module: Any = make("llama")
        for block in module.model.layers:
            for part in (block.self_attn.o_proj, block.mlp.down_proj):
                torch.nn.init.zeros_(part.weight)
        model = NativeModel(module, ref="identity", weights=weights_digest(module))
        rows = torch.randn(5, 32)
        patchscope = Patchscope.of(model, Target((5, 6, 7), -1))
        for layer in range(3):
            torch.testing.assert_close(patchscope.readable(rows, layer), rows)
        jacobians = jacobian(model).maps
        assert all(torch.equal(matrix, torch.eye(32)) for matrix in jacobians.values())

    def test_rescaled_rows_have_the_norm_of_the_row_they_replace(self, tiny: NativeModel) -> None:
        patchscope = Patchscope.of(tiny, Target((5, 6, 7, 8), 1, "target_norm"))
        rows = torch.randn(3, 32)
        torch.testing.assert_close(
            patchscope.readable(rows, 0), patchscope.readable(10 * rows, 0), atol=1e-5, rtol=1e-4
        )

    def test_rows_put_at_another_layer_run_its_blocks_only(self, tiny: NativeModel) -> None:
        target = Target((5, 6, 7), -1)
        rows = torch.randn(2, 32)
        high = Patchscope.of(tiny, target, into=1)
        torch.testing.assert_close(high.readable(rows, 0), Patchscope.of(tiny, target).readable(rows, 1))
        with pytest.raises(OptionError, match="legal are 0 to 2"):
            Patchscope.of(tiny, target, into=3)
        with pytest.raises(OptionError, match="prompt of 3 tokens"):
            Target((5, 6, 7), 3)

    def test_a_copier_reads_the_planted_token_and_a_row_that_all_share_has_no_lift(
        self, store: ActivationStore
    ) -> None:
        """Attention adds ten times the mean row, so the prompt's end says what stands at its placeholder."""
        module: Any = make("llama", num_key_value_heads=4)
        for block in module.model.layers:
            attention = block.self_attn
            with torch.no_grad():
                for weight, scale in ((attention.q_proj, 0), (attention.v_proj, 10), (attention.o_proj, 1)):
                    weight.weight.copy_(scale * torch.eye(32))
                block.mlp.down_proj.weight.zero_()
                block.input_layernorm.weight.fill_(1)
        with torch.no_grad():
            module.model.embed_tokens.weight[[5, 6, 7]] = 0  # nothing else is there to copy
        model = NativeModel(module, ref="copier", weights="copier")
        unembedding = model.unembedding()
        rows = 1e4 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
        planted = logit.read(rows, unembedding, top_k=1).top_ids[:, 0]
        assert len(set(planted.tolist())) > 1
        patchscope = Patchscope.of(model, Target((5, 6, 7), -2))
        for layer in (0, 1):
            assert torch.equal(
                logit.read(patchscope.readable(rows, layer), unembedding, top_k=1).top_ids[:, 0], planted
            )
        items = [Watched(i, "x", ("11",), (11,), {"end": 2}) for i in range(2)]
        activations = capture(model, [(8, 9, 11), (8, 9, 11)], [Need(("resid_post.*", "embed"))], store)
        table = lift_table(activations, items, patchscope, "end", 0, (0, 1))
        np.testing.assert_allclose(table["logprob"], table["mean_row"], atol=1e-5)
        assert table["lift"].max() <= 1e-5

    @pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
    def test_a_prompt_put_into_itself_is_continued_as_it_is(self, family: str, store: ActivationStore) -> None:
        model, tokens = native(family), prompt(6)[0].tolist()
        own = capture(model, [tokens], [Need("resid_post.*")], store).packed(Address("resid_post", 1))[3:4]
        patchscope = Patchscope.of(model, Target(tuple(tokens), 3))
        ids = torch.tensor([tokens])
        with torch.no_grad():
            for _ in range(4):
                ids = torch.cat((ids, model.module(ids).logits[:, -1:].argmax(-1)), 1)
        assert patchscope.written(own, 1, 4) == [ids[0, 6:].tolist()] == [patchscope.unpatched_text(4)]

    def test_drawn_texts_follow_their_seed(self, tiny: NativeModel) -> None:
        patchscope, rows = Patchscope.of(tiny, Target((5, 6, 7), 1)), torch.randn(2, 32)
        one, again, other = (patchscope.written(rows, 0, 8, seed) for seed in (1, 1, 2))
        assert one == again != other

    def test_several_placeholders_take_the_same_row(self, tiny: NativeModel) -> None:
        row = torch.randn(1, 32)
        tokens = torch.tensor([[5, 6, 6, 6, 7]])

        def put(_: Any, __: Any, out: Tensor) -> Tensor:
            return torch.cat((out[:, :1], row.expand(1, 3, -1), out[:, 4:]), 1)

        patched, streams = tiny.module.model.layers[1].register_forward_hook(put), []
        seen = tiny.module.model.layers[2].register_forward_hook(lambda _, __, out: streams.append(out))
        with torch.no_grad():
            tiny.module(tokens)
        patched.remove()
        seen.remove()
        read = Patchscope.of(tiny, Target((5, 6, 6, 6, 7), 1, width=3), into=1).readable(row, 0)
        torch.testing.assert_close(read, streams[0][:, -1], atol=1e-5, rtol=1e-4)
        with pytest.raises(OptionError, match="3 wide"):
            Target((5, 6, 7), 1, width=3)

    def test_prompts_are_made_of_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Chat(FakeTokenizer):
            chat_template = "there is one"

            def apply_chat_template(self, turn: Any, **_: Any) -> str:
                return f"<{turn[0]['content']}>"

        model = NativeModel(make("llama"), ref="with words", weights="x", tokenizer=FakeTokenizer())
        words = target_of(model, "relation", ("dog: chien",), "none")
        assert model.tokenizer.decode(words.tokens) == "dog: chien\n?:"
        assert model.tokenizer.decode([words.tokens[words.placeholder]]) == "?"
        with pytest.raises(OptionError, match="no chat template"):
            target_of(model, "selfie", (), "none")
        monkeypatch.setattr(model, "tokenizer", Chat())
        turn = target_of(model, "selfie", (), "none")
        assert (turn.width, model.tokenizer.decode(turn.tokens)) == (5, "<????? What is this about?>")
        scopes = patchscopes_of(native("llama"), Target((5, 6), 0), "selfie", "same", (0, 1))
        assert [scope.into for scope in scopes] == [2]


class TestForeign:
    def write(self, path: Path, maps: dict[int, Tensor], **more: Any) -> Path:
        torch.save({"J": {k: v.half() for k, v in maps.items()}, "n_prompts": 4, "d_model": 32, **more}, path)
        return path

    def test_an_official_file_imports_and_one_off_by_a_layer_is_refused(self, tmp_path: Path) -> None:
        model = native("gpt2")
        lens = jacobian(model, seed=1)
        checked = texts(4, seed=2).sequences
        path = self.write(tmp_path / "official.pt", dict(lens.maps), source_layers=[0, 1])
        imported, check = import_jacobian(model, path, checked, target=2, skip=2, length=LENGTH)
        assert imported.card.foreign
        assert min(check.own.values()) > 0.8
        torch.testing.assert_close(imported.maps[0], lens.maps[0], atol=2e-3, rtol=2e-3)
        saved = save_lens(imported, tmp_path / "J.lens")
        assert load_lens(tmp_path / "J.lens").card == saved.card
        shifted = self.write(tmp_path / "shifted.pt", {0: lens.maps[1], 1: lens.maps[0]})
        with pytest.raises(OptionError, match="counts its layers otherwise"):
            import_jacobian(model, shifted, checked, target=2, skip=2, length=LENGTH)
        with pytest.raises(OptionError, match="counts its layers otherwise"):
            import_jacobian(native("opt"), path, checked, target=2, skip=2, length=LENGTH)

    def test_a_fit_checkpoint_is_divided_by_its_texts(self, tmp_path: Path) -> None:
        total = {0: 3 * torch.eye(4)}
        torch.save({"jacobian_sum": total, "n_done": 3, "next_idx": 3, "skip_first": 16}, tmp_path / "c.pt")
        foreign = read_foreign(tmp_path / "c.pt")
        assert torch.equal(foreign.maps[0], torch.eye(4))
        assert foreign.n_texts == 3

    def test_files_that_are_no_lenses_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x.pt"
        for value, said in (
            ({"J": Path("x")}, "no file is opened that could run code"), ([1], "holds no mapping"),
            ({"K": 1}, "needed are J"), ({"J": {0: torch.zeros(2, 3)}}, "not square"),
        ):  # fmt: skip
            torch.save(value, path)
            with pytest.raises(OptionError, match=said):
                read_foreign(path)
        with pytest.raises(OptionError, match="cannot be read"):
            read_foreign(tmp_path / "none.pt")

    def test_the_command_imports(self, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = native("llama")
        path = self.write(tmp_path / "official.pt", dict(jacobian(model, seed=1).maps))
        lines = tmp_path / "texts.jsonl"
        lines.write_text("\n".join(f'{{"tokens": {list(text)}}}' for text in texts(4, seed=2).sequences))
        args = ["lens", "import", str(path), "--model", str(llama_folder), "--prompts", str(lines), "--skip", "2"]
        assert main([*args, "--out", str(tmp_path / "J.lens")]) == 0
        assert "fitted by another program" in capsys.readouterr().out
        assert main([*args, "--target", "penultimate", "--out", str(tmp_path / "K.lens")]) == 2
        check = [
            "lens",
            "check",
            str(tmp_path / "J.lens"),
            "--model",
            str(llama_folder),
            "--store",
            str(tmp_path / "s"),
        ]
        more = tmp_path / "more.jsonl"
        more.write_text("\n".join(f'{{"tokens": {list(text)}}}' for text in texts(12, seed=3).sequences))
        assert main([*check, "--prompts", str(more), "--texts", "10"]) == 0
        assert "jacobian rotated" in capsys.readouterr().out


class TestQuality:
    @pytest.mark.parametrize("family", CAUSAL)
    def test_at_the_last_layer_every_lens_is_the_model(self, family: str, store: ActivationStore) -> None:
        model = native(family)
        if "lens" in model.faithfulness.refused:
            with pytest.raises(PointError):
                Lenses().run(model, [(5, 6, 7)], store=store)
            return
        lenses = {"j": jacobian(model), "t": fit_tuned_on(model, texts(15, seed=4), store)[0].lens}
        quality = read_texts(model, texts(10, seed=8), lenses, store)
        table = pd.DataFrame(quality_rows(quality))
        last = table[(table["layer"] == 2) & (table["control"] != "unigram")].set_index(["lens", "control", "measure"])
        assert {"shuffled", "rotated", "bias_only", ""} == set(last.index.get_level_values("control"))
        assert last.xs("kl_to_final", level="measure")["value"].max() < 1e-4
        assert last.xs("top1_agreement", level="measure")["value"].min() == 1
        assert last.xs("top10_overlap", level="measure")["value"].min() > 0.99

    def test_a_model_of_linear_blocks_is_read_exactly_and_its_controls_are_not(self, store: ActivationStore) -> None:
        module: Any = make("llama")
        maps = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1)) * 0.1
        for layer, block in enumerate(module.model.layers):
            with torch.no_grad():
                block.self_attn.o_proj.weight.zero_()

            def stand_in(self: Any, x: Tensor, at: int = layer) -> Tensor:
                return x

            block.mlp.forward = MethodType(stand_in, block.mlp)
            block.post_attention_layernorm.forward = MethodType(
                lambda self, x, at=layer: x @ maps[at], block.post_attention_layernorm
            )
        model = NativeModel(module, ref="linear", weights=weights_digest(module))
        card = card_of("jacobian", native("llama"), layers=(0, 1))
        first = (torch.eye(32) + maps[1]) @ (torch.eye(32) + maps[2])
        lens = JacobianLens(card, {0: first.T, 1: (torch.eye(32) + maps[2]).T})
        ids = torch.tensor([prompt(6)[0].tolist()])
        streams: dict[int, Tensor] = {}
        handles = [
            block.register_forward_hook(
                lambda _, __, out, at=at: streams.__setitem__(at, out if isinstance(out, Tensor) else out[0])
            )
            for at, block in enumerate(module.model.layers)
        ]
        with torch.no_grad():
            logits = module(input_ids=ids).logits[0]
        for handle in handles:
            handle.remove()
        every = torch.arange(97)
        unembedding = model.unembedding()
        for layer in range(3):
            rows = streams[layer][0]
            read = logit.read(lens.readable(rows, layer), unembedding, ids=every).logprobs
            torch.testing.assert_close(read, logits.log_softmax(-1), atol=1e-4, rtol=1e-4)
            for control in (shuffled_layers(lens), rotated(lens)) if layer < 2 else ():
                worse = logit.read(control.readable(rows, layer), unembedding, reference=streams[2][0]).kl.mean()
                assert worse > 1e-3

    def test_texts_that_a_lens_was_fitted_on_do_not_judge_it(
        self, tiny: NativeModel, store: ActivationStore, tmp_path: Path
    ) -> None:
        save_lens(jacobian(tiny), tmp_path / "J.lens")
        lines = tmp_path / "same.jsonl"
        lines.write_text("\n".join(f'{{"tokens": {list(text)}}}' for text in texts(4).sequences))
        analysis = Lenses(lenses=("logit", str(tmp_path / "J.lens")), eval_prompts=str(lines), eval_texts=10)
        with pytest.raises(PromptError, match="was fitted on by a lens"):
            analysis.run(tiny, [(5, 6, 7)], store=store)

    def test_a_solid_layer_is_below_both(self) -> None:
        row = {"measure": "kl_to_final", "layer": 0}
        own = {**row, "lens": "t", "control": "", "ci_low": 1.0, "ci_high": 2.0}
        plain = {**row, "lens": "logit", "control": "", "ci_low": 2.5, "ci_high": 3.0}
        near = {**row, "lens": "t", "control": "shuffled", "ci_low": 1.5, "ci_high": 3.0}
        assert solid_layers([own, plain, {**near, "ci_low": 2.1}], "t") == [0]
        assert solid_layers([own, plain, near], "t") == []
        assert solid_layers([own, plain], "t") == []


class TestWatched:
    def test_ranks_are_those_of_the_plain_reading(self, tiny: NativeModel, store: ActivationStore) -> None:
        sequences = [tuple(prompt(5, seed)[0].tolist()) for seed in range(4)]
        watched = [Watched(i, "x", ("a", "b"), (10 + i, 50), {"end": 4}) for i in range(4)]
        activations = capture(tiny, sequences, [Need("resid_post.*")], store)
        table, chance = watched_tables(activations, watched, {"logit": LogitLens(card_of("logit", tiny))}, 0)
        rows = activations.get(Address("resid_post", 1))[2][4:5]
        logprobs = logit.read(rows, tiny.unembedding(), ids=torch.arange(97)).logprobs[0]
        expected = min(int((logprobs > logprobs[token]).sum()) for token in (12, 50))
        one = table[(table["prompt"] == 2) & (table["layer"] == 1)].iloc[0]
        assert one["rank"] == expected
        assert one["logprob"] == pytest.approx(float(logprobs[one["token_id"]]), abs=1e-5)
        assert chance.empty

    def test_shares_layers_and_chance_by_hand(self) -> None:
        ranks = {0: [0, 5, 0, 9], 1: [3, 3, 0, 0], 2: [0, 0, 0, 0]}
        watched = pd.DataFrame(
            [
                ("l", prompt, "x", "end", layer, rank)
                for layer, column in ranks.items()
                for prompt, rank in enumerate(column)
            ],
            columns=["lens", "prompt", "name", "position_name", "layer", "rank"],
        )
        chance = watched.assign(rank=[0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9])
        table = pass_at_k(watched, chance, (1, 4), 0).set_index(["k", "chosen", "layer"])
        assert table.loc[(1, "", 0), "value"] == table.loc[(1, "", 1), "value"] == 0.5
        assert table.loc[(4, "", 1), "value"] == 1
        assert table.loc[(1, "", 0), "chance"] == 0.25
        assert table.loc[(1, "oracle", -1), "value"] == 0.75
        assert table.loc[(1, "oracle", -1), "chance"] == 0.25
        clear = watched.assign(rank=[9, 9, 9, 9, 3, 3, 0, 0, 9, 9, 9, 9])
        table = pass_at_k(clear, chance, (4,), 0).set_index(["k", "chosen", "layer"])
        assert table.loc[(4, "other_half", -1), "value"] == 1

    def test_fields_are_checked(self) -> None:
        assert check_watch({"x": [" a", 5]}) is None
        assert check_places({"end": -1}) is None
        for wrong in ({}, {"x": []}, {"x": "a"}, [1]):
            assert "must be names" in str(check_watch(wrong))
        assert "must be names" in str(check_places({"end": "x"}))


class TestBand:
    def curves(self, layers: int, inside: set[int]) -> pd.DataFrame:
        rows = []
        for layer in range(layers):
            accuracy = 1.0 if layer == layers - 1 else 0.1
            rows.append({"layer": layer, "curve": "accuracy", "lens_or_control": "lens", "value": accuracy})
            for curve in ("kurtosis", "autocorrelation"):
                for name in ("lens", "shuffled", "rotated"):
                    level = 2.0 if name == "lens" and layer in inside else 1.0
                    rows.append(
                        {
                            "layer": layer,
                            "curve": curve,
                            "lens_or_control": name,
                            "value": level,
                            "ci_low": level - 0.1,
                            "ci_high": level + 0.1,
                        }
                    )
        return pd.DataFrame(rows)

    def test_the_rule_takes_the_longest_run(self) -> None:
        assert workspace(self.curves(12, {1, 2, 5, 6, 7, 8})) == [5, 6, 7, 8]
        assert workspace(self.curves(12, {1, 2, 5})) == []
        assert longest_run([0, 1, 2, 3, 4, 5, 6], [True, True, True, False, True, True, True]) == [0, 1, 2]

    def test_a_planted_transport_is_the_band_exactly(self) -> None:
        """Noise below, a token that positions share in the middle, the next token above; every layer in a basis of its own."""
        generator = torch.Generator().manual_seed(0)
        n_layers, middle, n_texts, d_model = 10, range(3, 7), 24, 48
        words = torch.nn.functional.normalize(torch.randn(97, d_model, generator=generator), dim=-1)
        bases = [torch.linalg.qr(torch.randn(d_model, d_model, generator=generator))[0] for _ in range(n_layers - 1)]
        shared = torch.randint(97, (n_texts, 2), generator=generator).repeat_interleave(3, 1)
        following = torch.randint(97, (n_texts, 6), generator=generator)

        def text_rows(layer: int) -> list[Tensor]:
            noise = torch.randn(n_texts, 6, d_model, generator=torch.Generator().manual_seed(100 + layer)) * 0.7
            shown = 5 * words[shared] if layer in middle else 5 * words[following] if layer > max(middle) else 0
            readable = noise + shown
            return list(readable if layer == n_layers - 1 else readable @ bases[layer])

        card = replace(
            card_of("jacobian", native("llama")), n_layers=n_layers, d_model=d_model, target=9, layers=tuple(range(9))
        )
        lens = JacobianLens(card, dict(enumerate(bases)))
        readers = {"lens": lens, "shuffled": shuffled_layers(lens), "rotated": rotated(lens)}
        table = curves(text_rows, list(following), n_layers, readers, Unembedding(lambda x: x, words))
        assert workspace(table) == list(middle)

    def test_random_weights_have_no_band(self, store: ActivationStore) -> None:
        deep = Estimator(target=6, layers=tuple(range(6)), skip=2, length=LENGTH)
        for seed in range(3):
            module = make("llama", seed=seed, num_hidden_layers=7)
            model = NativeModel(module, ref=f"random-{seed}", weights=weights_digest(module))
            lens = fit_jacobian(model, texts(4).sequences, deep, corpus="random tokens").lens
            table, verdict = band_table(model, texts(20, seed=40 + seed), lens, store)
            assert not table["in_band"].any()
            assert verdict.startswith("no band")

    def test_kurtosis_and_dimension_are_what_they_say(self) -> None:
        model = native("llama")
        rows, every = torch.randn(3, 32), torch.arange(97)
        unembedding = model.unembedding()
        logits = logit.token_logits(logit.normalized(rows, unembedding), unembedding, every).double()
        z = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, correction=0, keepdim=True)
        torch.testing.assert_close(
            excess_kurtosis(rows, unembedding), (z.pow(4).mean(-1) - 3).float(), atol=1e-4, rtol=1e-4
        )
        weight = torch.linalg.qr(torch.randn(60, 8))[0]
        weight = weight - weight.mean(0)
        weight = torch.linalg.qr(weight)[0]
        assert effective_dimension(torch.eye(8), weight - weight.mean(0)) == pytest.approx(8, rel=0.05)
        one = torch.zeros(8, 8)
        one[0, 0] = 1
        assert effective_dimension(one, weight) == pytest.approx(1)


WATCHING = {"watch": {"x": [30, 31], "y": [40]}, "named_positions": {"first": 1, "end": -1}}


def test_the_analysis_reads_saves_and_draws(
    tiny: NativeModel, store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = texts(30, seed=3)
    monkeypatch.setattr(lenses_analysis, "shipped_texts", lambda model, most, seed=0: drawn)
    monkeypatch.setattr(lenses_analysis, "target_of", lambda *_: Target((5, 6, 7, 8), -2))
    folder = str(tmp_path / "J.lens")
    save_lens(jacobian(tiny), folder)
    tuned = str(tmp_path / "T.lens")
    save_lens(fit_tuned_on(tiny, texts(15, seed=4), store)[0].lens, tuned)
    analysis = Lenses(lenses=("logit", tuned, folder, "patchscope"), eval_texts=20, band=True, ks=(1, 10))
    lines = [
        Prompt(tuple(prompt(5, seed)[0].tolist()), None, {**WATCHING, "watch": {"x": [30 + seed], "y": [40]}})
        for seed in range(6)
    ]
    result = analysis.run(tiny, lines, store=store)
    assert set(result.figures) == set(Lenses.figures)
    for name in result.figures:
        assert result.figure(name).data
    assert set(result.profiles) == {"agreement", "entropy", "watched_rank"}
    end = result.tables["read"].query("layer == 2")
    assert end["kl_to_final"].max() < 1e-4
    assert end["agrees"].all()
    lift = result.tables["patchscope"]
    assert set(lift["source_layer"]) == {0, 1}
    assert (lift["control_max"] >= lift["unpatched"]).all()
    np.testing.assert_allclose(lift["lift"], lift["logprob"] - lift["control_max"])
    result.save(tmp_path / "run")
    again = analysis.run(tiny, lines, store=store)
    assert again.provenance["counts"]["forwards"] == 0
    pd.testing.assert_frame_equal(again.tables["watched"], result.tables["watched"])


def test_descriptions_are_matched_beside_their_controls(
    tiny: NativeModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lenses_analysis, "target_of", lambda *_: Target((5, 6, 7, 8), -2))
    lines = [Prompt(tuple(prompt(5, seed)[0].tolist()), None, WATCHING) for seed in range(3)]
    options = {"eval_texts": 0, "layers": (0, 1), "max_new_tokens": 3}
    plain = Lenses(lenses=("patchscope",), patchscope="describe", samples=3, target_layer="all", **options)
    tables = plain.run(tiny, lines, store=store).tables
    said = tables["descriptions"]
    assert set(said["control"]) == {"", "unpatched", "foreign_row", "noise", "mean_row", "embedding"}
    assert set(said["sample"]) == {-1, 0, 1, 2}
    assert set(zip(said["source_layer"], said["target_layer"], strict=True)) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    ids = Patchscope.of(tiny, Target((5, 6, 7, 8), -2), into=1)
    row = capture(tiny, [lines[0].tokens], [Need("resid_post.*")], store).packed(Address("resid_post", 0))[4:5]
    item = Watched(0, "x", ("7", "9"), (7, 9), {"end": 4})
    written = ids.written(row, 0, 3)[0]
    assert matched(tiny, [1, 9], item)
    assert not matched(tiny, [1, 97], item)
    own = "prompt == 0 and control == '' and sample == -1 and target_layer == 1 and source_layer == 0 and position_name == 'end'"
    assert set(said.query(own)["text"]) == {tokens_text(tiny, written)}
    result = Lenses(lenses=("patchscope",), target_layer="all", **options).run(tiny, lines, store=store)
    assert len(result.figure("lift").data) == 4
    assert "descriptions" not in result.tables


def test_some_layers_and_last_positions_are_read_as_all_are(tiny: NativeModel, store: ActivationStore) -> None:
    lines = [Prompt(tuple(prompt(5, seed)[0].tolist()), None, WATCHING) for seed in range(4)]
    whole, part = (
        Lenses(lenses=("logit",), eval_texts=0, **options).run(tiny, lines, store=store).tables
        for options in ({}, {"layers": (1,), "positions": "last"})
    )
    for name, keep in (("read", "layer >= 1 and position == 4"), ("watched", "layer >= 1")):
        expected = whole[name].query(keep).reset_index(drop=True)
        numbers = expected.select_dtypes("number").columns
        order = [c for c in ("prompt", "position", "name", "layer") if c in expected]
        one, other = (t.sort_values(order)[numbers].to_numpy() for t in (expected, part[name]))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(OptionError, match="legal are 0 to 2"):
        Lenses(layers=(7,)).run(tiny, lines, store=store)


def test_options_that_do_not_go_together_are_refused(tiny: NativeModel, store: ActivationStore) -> None:
    for wrong, said in (
        ({"lenses": ("jacobian",)}, "takes long to fit"), ({"lenses": ("tunned",)}, "Did you mean 'tuned'"),
        ({"target_layer": "top"}, "give same"), ({"samples": 2}, "say nothing"), ({"relation": ("x",)}, "France: Paris"), ({"eval_texts": 3}, "at least 10"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=said):
            Lenses(**wrong)


def test_latent_languages_are_read_through_any_lens(tiny: NativeModel, store: ActivationStore, tmp_path: Path) -> None:
    folder = str(tmp_path / "J.lens")
    lens = save_lens(jacobian(tiny), folder)
    lines = [Prompt((5 + i, 6), None, {"targets": {"zh": [8], "en": [9]}}) for i in range(3)]
    plain, through = (
        LatentLanguage(lens=name, answers="first_token").run(tiny, lines, store=store) for name in ("logit", folder)
    )
    assert through.provenance["counts"]["forwards"] == 0
    rows = capture(tiny, [(5, 6)], [Need("resid_post.*")], store).get(Address("resid_post", 0))[0][-1:]
    expected = logit.read(lens.readable(rows, 0), tiny.unembedding(), ids=torch.tensor([9])).logprobs.exp().item()
    table = through.tables["probability"].query("prompt == 0 and layer == 0 and language == 'en'")
    assert table["probability"].iloc[0] == pytest.approx(expected, rel=1e-4)
    ends = [r.tables["probability"].query("layer == 2")["probability"].to_numpy() for r in (plain, through)]
    np.testing.assert_allclose(*ends, rtol=1e-5)
    with pytest.raises(ModelError, match="of tiny-llama"):
        LatentLanguage(lens=folder).run(native("qwen2"), lines, store=store)
