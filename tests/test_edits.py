"""Interventions: each does what its words say, an empty one does nothing, and all leave the model as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, make, prompt, shared
from torch import Tensor, nn

from probes.capture.needs import Need
from probes.capture.run import capture, context_of
from probes.edits import (
    Add,
    BlockPath,
    Coefficients,
    EditedModel,
    HeadWriteEdit,
    KnockOut,
    Program,
    Replace,
    Scale,
    Source,
    Values,
    generate,
    logits,
    project_out,
    read,
    repeat,
    skip,
)
from probes.errors import OptionError, PointError, PromptError
from probes.models.backends.native import NativeModel
from probes.points import Address
from probes.store import ActivationStore

CAUSAL = tuple(family for family in FAMILIES if family != "bert")
POST, Z, MLP = Address("resid_post", 1), Address("z", 1), Address("mlp_out", 1)


def native(module: nn.Module) -> NativeModel:
    return NativeModel(module, ref="tiny", weights="digest")


@pytest.fixture(scope="module")
def llama() -> NativeModel:
    return native(shared("llama"))


def one(
    model: NativeModel, address: Address, tokens: Tensor, *edits: object, lengths: list[int] | None = None
) -> Tensor:
    return read(model, tokens, [address], edits, lengths)[address]  # type: ignore[arg-type]


V = Values(torch.arange(32.0) / 10)
EMPTY = (
    Replace(address=POST, value=V, positions=()),
    Add(address=POST, value=V, positions=()),
    Scale(address=Z, factor=3.0, heads=()),
    project_out(POST, torch.eye(32)[:2], positions=()),
    KnockOut((0, 1), queries=(), keys=(0,)),
    KnockOut((0, 1), queries="all", keys="all", heads=()),
    KnockOut((), queries="all", keys="all"),
    BlockPath(Program.plain(3)),
)


@pytest.mark.parametrize("edit", EMPTY, ids=lambda e: e.text()[:24])
def test_an_empty_edit_is_bit_identical(edit: object, llama: NativeModel) -> None:
    tokens = prompt()
    assert torch.equal(logits(llama, tokens, [edit]), logits(llama, tokens))  # type: ignore[list-item]
    assert generate(llama, tokens[0].tolist(), 4, [edit]) == llama.generate(tokens[0].tolist(), 4)  # type: ignore[list-item]


def test_point_edits_by_hand(llama: NativeModel) -> None:
    tokens, base = prompt(), one(llama, POST, prompt())
    replaced = one(llama, POST, tokens, Replace(address=POST, value=V, positions=(2, -1)))
    assert torch.equal(replaced[0, [2, 8]], V.tensor.expand(2, -1))
    assert torch.equal(replaced[0, [0, 1, 3, 4, 5, 6, 7]], base[0, [0, 1, 3, 4, 5, 6, 7]])
    rows = Values(torch.stack((V.tensor, -V.tensor)))
    assert torch.equal(
        one(llama, POST, tokens, Replace(address=POST, value=rows, positions=(-1, 0)))[0, [8, 0]], rows.tensor
    )
    added = one(llama, POST, tokens, Add(address=POST, value=V, factor=2.0, positions="last"))
    torch.testing.assert_close(added[0, -1], base[0, -1] + 2 * V.tensor)
    assert torch.equal(added[0, :-1], base[0, :-1])
    scaled, z = one(llama, Z, tokens, Scale(address=Z, factor=0.5, heads=(3, 1), positions=(4,))), one(llama, Z, tokens)
    torch.testing.assert_close(scaled[0, 4, [1, 3]], z[0, 4, [1, 3]] / 2)
    assert torch.equal(scaled[0, 4, [0, 2]], z[0, 4, [0, 2]])
    assert torch.equal(scaled[0, 5], z[0, 5])


def test_projecting_out_leaves_nothing_inside_and_all_outside(llama: NativeModel) -> None:
    span = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    before, after = one(llama, POST, prompt()), one(llama, POST, prompt(), project_out(POST, span))
    assert (after @ span.T).abs().max() < 1e-4 * before.abs().max()
    outside = torch.eye(32) - torch.linalg.pinv(span) @ span
    torch.testing.assert_close(after @ outside, before @ outside, atol=1e-5, rtol=1e-5)
    with pytest.raises(OptionError, match="dependent"):
        project_out(POST, torch.ones(2, 32))


def test_coefficients_take_the_value_asked_for(llama: NativeModel) -> None:
    read_at = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    write = torch.linalg.pinv(read_at).T
    edit = Coefficients(address=POST, read=Values(read_at), write=Values(write), offset=(3.0, -1.0))
    after = one(llama, POST, prompt(), edit)
    torch.testing.assert_close(after @ read_at.T, torch.tensor([3.0, -1.0]).expand(1, 9, 2), atol=1e-4, rtol=1e-4)
    same = Coefficients(address=POST, read=Values(read_at), write=Values(write), keep=1.0)
    torch.testing.assert_close(one(llama, POST, prompt(), same), one(llama, POST, prompt()))


def test_positions_from_the_end_are_each_prompt_s_own(llama: NativeModel) -> None:
    batch = torch.cat((torch.nn.functional.pad(prompt(5), (0, 3)), prompt(8, seed=4)))
    edit = Replace(address=POST, value=V, positions="last")
    after = one(llama, POST, batch, edit, lengths=[5, 8])
    assert torch.equal(after[0, 4], V.tensor)
    assert torch.equal(after[1, 7], V.tensor)
    assert not torch.equal(after[0, 7], V.tensor)
    knock = KnockOut((1,), queries=(-1,), keys=(-2,))
    pattern = one(llama, Address("pattern", 1), batch, knock, lengths=[5, 8])
    assert (pattern[0, :, 4, 3] == 0).all()
    assert (pattern[1, :, 7, 6] == 0).all()
    assert (pattern[1, :, 4, 3] > 0).all()


def test_a_source_brings_another_prompt_s_row(llama: NativeModel) -> None:
    other = prompt(6, seed=5)
    source = Source(tuple(other[0].tolist()), Address("resid_post", 2), (3,))
    edit = Replace(address=POST, value=source, positions=(1,))
    after = one(llama, POST, prompt(), edit)
    assert torch.equal(after[0, 1], one(llama, Address("resid_post", 2), other)[0, 3])
    assert edit.resolved(llama).text() == edit.text()
    itself = Source(tuple(prompt()[0].tolist()), POST, (-1,))
    unchanged = logits(llama, prompt(), [Replace(address=POST, value=itself, positions="last")])
    torch.testing.assert_close(unchanged, logits(llama, prompt()))
    with pytest.raises(PromptError, match="position 9"):
        Source((4, 5), POST, (9,)).read(llama)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_plain_path_program_gives_the_plain_logits(family: str) -> None:
    from probes.blocks.rerouting import rerouted

    model, tokens = native(shared(family)), prompt(rows=2)

    def plain(hidden: Tensor, call: object) -> Tensor:
        for layer in range(model.shape.n_layers):
            hidden = call(layer, hidden)  # type: ignore[operator]
        return hidden

    with rerouted(model, plain):
        rebuilt = logits(model, tokens)
        # Reads of points inside and at the edges of a block see its real call.
        inside = read(model, tokens, [POST, Address("attn_out", 1)])
    assert torch.equal(rebuilt, logits(model, tokens))
    for address, tensor in inside.items():
        assert torch.equal(tensor, one(model, address, tokens))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "gpt_neox"])
def test_paths_are_what_other_edits_say(family: str) -> None:
    model, tokens = native(shared(family)), prompt()
    skipped = logits(model, tokens, [skip(3, 1)])
    source = one(model, Address("resid_post", 0), tokens)[0]
    by_hand = logits(model, tokens, [Replace(address=POST, value=Values(source), positions=tuple(range(9)))])
    torch.testing.assert_close(skipped, by_hand)
    twice = logits(model, tokens, [repeat(3, 1, 1)])
    fed = one(model, POST, tokens)[0]
    again = read(
        model, tokens, [POST], [Replace(address=Address("resid_pre", 1), value=Values(fed), positions=tuple(range(9)))]
    )
    last = Replace(address=POST, value=Values(again[POST][0]), positions=tuple(range(9)))
    torch.testing.assert_close(twice, logits(model, tokens, [last]))
    assert not torch.allclose(
        logits(model, tokens, [BlockPath(Program.parse("0,2,1"))]), logits(model, tokens), atol=1e-3
    )
    assert torch.equal(logits(model, tokens), logits(model, tokens, []))


def test_writing_under_a_path_is_greedy_on_its_logits(llama: NativeModel) -> None:
    text = prompt(5)[0].tolist()
    for token in generate(llama, list(text), 3, [repeat(3, 0, 1)]):
        assert token == int(logits(llama, torch.tensor([text]), [repeat(3, 0, 1)])[0, -1].argmax())
        text.append(token)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "gpt_neox"])
def test_knockout_is_minus_infinity_before_the_softmax(family: str) -> None:
    model, tokens, at = native(shared(family)), prompt(), Address("pattern", 1)
    edit = KnockOut((1,), queries=(3, 2), keys=(2, 1), heads=(0, 2))
    before, after = one(model, at, tokens), one(model, at, tokens, edit)
    expected = before.clone()
    for head in (0, 2):
        for query in (3, 2):
            expected[0, head, query, [1, 2]] = 0
            expected[0, head, query] /= expected[0, head, query].sum()
    torch.testing.assert_close(after, expected, atol=1e-6, rtol=1e-5)
    renormalised = edit.writes(model.shape)[at](before)
    torch.testing.assert_close(after, renormalised, atol=1e-6, rtol=1e-5)


def test_a_query_without_keys_attends_to_nothing(llama: NativeModel) -> None:
    edit = KnockOut((1,), queries=(3,), keys=tuple(range(9)))
    after = read(llama, prompt(), [Address("pattern", 1), Z], [edit])
    assert (after[Address("pattern", 1)][0, :, 3] == 0).all()
    assert (after[Z][0, 3] == 0).all()


def test_scope_says_whether_written_tokens_are_edited(llama: NativeModel) -> None:
    tokens = prompt(5)[0].tolist()
    first = Add(address=POST, value=Values(V.tensor * 5), positions="last")
    always = Add(address=POST, value=Values(V.tensor * 5), positions="last", scope="every_step")
    text, texts = list(tokens), {}
    for name, edit in (("prefill", first), ("every_step", always)):
        texts[name] = generate(llama, tokens, 4, [edit])
    for step in range(4):
        # Without a cache the same is a prompt edited at its own end, or at every end so far.
        ends = Add(address=POST, value=Values(V.tensor * 5), positions=tuple(range(4, 5 + step)))
        token = int(logits(llama, torch.tensor([text]), [ends])[0, -1].argmax())
        assert token == texts["every_step"][step]
        text.append(token)
    assert texts["prefill"][0] == texts["every_step"][0]
    with pytest.raises(OptionError, match="prefill"):
        Add(address=POST, value=V, positions=(3,), scope="every_step")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "falcon_grouped", "olmo2"])
def test_weight_edit_is_the_activation_edit_and_is_undone(family: str) -> None:
    module = make(family)
    model, tokens = native(module), prompt()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    v = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(3)))[0].T
    plain = logits(model, tokens)
    edited = logits(model, tokens, [HeadWriteEdit(1, 2, Values(v), keep=0.25)])
    assert not torch.allclose(plain, edited, atol=1e-3)
    from probes.weights.head_weights import head_weights

    heads = head_weights(model, fold_norm=False)
    change = heads.w_o[1, 2] @ v.T * (0.25 - 1) @ v
    added = torch.einsum("bpk,kd->bpd", one(model, Z, tokens)[:, :, 2], change)
    out = model.component("attn.o", 1)
    handle = out.register_forward_hook(lambda _, __, output: output + added)
    by_activation = logits(model, tokens)
    handle.remove()
    torch.testing.assert_close(edited, by_activation, atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match="on purpose"), HeadWriteEdit(1, 2, Values(v)).within(model):
        raise RuntimeError("on purpose")
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert torch.equal(logits(model, tokens), plain)


def test_edits_are_values() -> None:
    def edits() -> list[object]:
        a, b = Values(torch.ones(3)), Values(torch.zeros(3))
        return [Add(address=POST, value=a), Add(address=POST, value=b), Add(address=POST, value=a, positions=(1,)),
                Scale(address=POST, factor=2.0), Replace(address=MLP, value=a), KnockOut((1,), "all", (0,)), skip(3, 1),
                HeadWriteEdit(1, 0, a), HeadWriteEdit(1, 0, a, 0.5)]  # fmt: skip

    assert edits() == edits()
    assert len(set(edits()) | set(edits())) == len(edits())
    assert len({edit.text() for edit in edits()}) == len(edits())  # type: ignore[attr-defined]


def test_edits_enter_the_store_key_and_the_captured_rows(llama: NativeModel, tmp_path: object) -> None:
    store = ActivationStore(tmp_path)  # type: ignore[arg-type]
    sequences = [tuple(prompt(n, seed=n)[0].tolist()) for n in (4, 7)]
    for edit in (
        Replace(address=POST, value=V, positions="last"),
        repeat(3, 0, 1),
        HeadWriteEdit(1, 2, Values(torch.eye(32)[:1])),
    ):
        assert context_of(llama, [edit])["edits"] == edit.text()
        rows = capture(llama, sequences, [Need("resid_post.2")], store, edits=[edit]).get("resid_post.2")
        plain = capture(llama, sequences, [Need("resid_post.2")], store).get("resid_post.2")
        for tokens, row, free in zip(sequences, rows, plain, strict=True):
            alone = one(llama, Address("resid_post", 2), torch.tensor([tokens]), edit)
            torch.testing.assert_close(row, alone[0], atol=1e-5, rtol=1e-4)
            assert not torch.allclose(row, free, atol=1e-3)


@pytest.mark.parametrize(
    ("edit", "refused"),
    [
        (skip(3, 1), {1: "does not run"}),
        (repeat(3, 0, 1), {0: "runs 2 times", 1: "runs 2 times"}),
        (BlockPath(Program(((1,), (0,), (2,)))), {}),
    ],
    ids=["skip", "repeat", "order"],
)
def test_a_model_under_edits_refuses_just_the_blocks_that_do_not_run_once(
    llama: NativeModel, edit: BlockPath, refused: dict[int, str], tmp_path: Path
) -> None:
    model = EditedModel(llama, [edit])
    posts = [Address("resid_post", layer) for layer in range(3)]
    reasons = {address.layer: reason for address in posts if (reason := model.refusal(address))}
    assert reasons == {layer: f"block {layer} {words} under these edits" for layer, words in refused.items()}
    legal = [address for address in posts if address.layer not in refused]
    rows = read(model, prompt(), legal)
    for address in legal:
        torch.testing.assert_close(rows[address], one(llama, address, prompt(), edit))
    for layer, words in refused.items():
        with pytest.raises(PointError, match=f"block {layer} {words}"):
            capture(model, [(3, 4)], [Need(f"resid_post.{layer}")], ActivationStore(tmp_path))


def test_impossible_edits_are_refused(llama: NativeModel) -> None:
    with pytest.raises(PointError, match="heads"):
        Scale(address=POST, factor=1.0, heads=(0,))
    with pytest.raises(PointError, match="KnockOut"):
        Scale(address=Address("pattern", 0), factor=1.0)
    with pytest.raises(PointError, match="0 to 3"):
        logits(llama, prompt(), [Scale(address=Z, factor=0.0, heads=(4,))])
    with pytest.raises(PointError, match="0 to 1"):
        logits(llama, prompt(), [Scale(address=Address("k", 0), factor=0.0, heads=(2,))])
    with pytest.raises(PointError, match="layer 3"):
        logits(llama, prompt(), [KnockOut((3,), "all", (0,))])
    with pytest.raises(PointError, match="block 5"):
        logits(llama, prompt(), [BlockPath(Program.of((0, 5)))])
    with pytest.raises(OptionError, match="2 rows of values for 3"):
        logits(llama, prompt(), [Add(address=POST, value=Values(torch.ones(2, 32)), positions=(0, 1, 2))])
