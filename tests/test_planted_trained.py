"""The trained tier: shipped weights carry the truths of their records, and T1 trains again to what was shipped."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.depthbench.enforce import Node, Swap, keep_off, swapped
from benchmarks.depthbench.models import induction
from probes.errors import ModelError
from probes.planted import trained_prompts as data
from probes.planted.certify.certificate import certify
from probes.planted.making import model_digest
from probes.planted.trained import DATA, TRAINED, build, load_weights, untrained


@pytest.mark.parametrize("name", TRAINED)
def test_every_record_agrees_with_the_shipped_weights(name: str) -> None:
    task = build(name)
    assert model_digest(task.module) == task.record.model["digest"]
    certificate = certify(task)
    assert certificate["refuted"] == []
    shipped = task.record.certificate
    for question in task.record.questions:
        assert question.key in shipped
    assert shipped["agrees"]


def test_what_is_shipped_is_small_and_in_half_precision() -> None:
    sizes = {path.name: path.stat().st_size for path in DATA.glob("*.safetensors")}
    assert set(sizes) == {f"{name}.safetensors" for name in TRAINED}
    assert max(sizes.values()) <= 600_000
    assert sum(sizes.values()) <= 4_000_000
    assert {tensor.dtype for name in TRAINED for tensor in load_file(DATA / f"{name}.safetensors").values()} == {
        torch.float16
    }


def test_t1_trains_again_to_what_was_shipped() -> None:
    trained = induction()
    assert trained.losses["answer"] < 0.02
    task = build("T1")
    tokens = torch.tensor([example.tokens for example in task.examples])
    answers = torch.tensor([example.answer for example in task.examples])
    with torch.no_grad():
        right = trained.module(tokens).logits[:, -1].argmax(-1) == answers
    assert float(right.float().mean()) >= 0.95
    assert task.record.accuracy["plain"] >= 0.95
    assert task.record.model["training"]["seed"] == 0


def test_parts_that_were_frozen_are_zero() -> None:
    for name, free in (("T2", {3}), ("T3", {1, 4}), ("T4", {1, 4}), ("T7", {2, 3})):
        blocks = load_weights(name).model.layers
        assert {layer for layer, block in enumerate(blocks) if block.mlp.down_proj.weight.any()} == free
    assert not load_weights("T2").model.layers[5].self_attn.o_proj.weight.any()
    for block in load_weights("T3").model.layers:
        assert not block.self_attn.o_proj.weight.any()


def test_the_composition_that_was_never_trained_fails_and_a_jump_back_mends_it() -> None:
    record = build("T3").record
    assert record.accuracy["plain"] <= 0.02
    mending = record.question("mending")
    assert mending.truth == frozenset({"4->0", "4->1", "5->0", "5->1"})


def test_there_is_nothing_to_find_where_labels_were_redrawn() -> None:
    task = build("T8")
    assert task.record.accuracy["plain"] < 0.5
    assert all(question.nothing for question in task.record.questions if question.kind in ("readable", "mending"))


def test_tables_are_balanced_and_partners_share_no_answer() -> None:
    table = data.latin_square(16, 4, 2)
    assert all((row == value).sum() == 4 for row in (*table, *table.T) for value in range(4))
    for example in build("T2").examples:
        e, r = example.tokens[1], example.tokens[2] - data.FIRST_RELATION
        x, y = example.partner[1], example.partner[2] - data.FIRST_RELATION
        assert int(table[e, r]) not in {int(table[x, r]), int(table[e, y]), int(table[x, y])}


def test_a_swap_gives_the_sources_part_and_nothing_else() -> None:
    module = untrained("T2")
    tokens = torch.randint(0, data.VOCAB, (4, 6), generator=torch.Generator().manual_seed(0))
    values: list[torch.Tensor] = []
    hook = module.model.layers[2].self_attn.o_proj.register_forward_hook(lambda _, args, __: values.append(args[0]))
    with torch.no_grad():
        module(tokens)
        with swapped(module, [Swap(Node(2, 1), (3,), slice(0, 2), slice(2, 4))]):
            module(tokens)
    hook.remove()
    plain, changed = values
    expected = plain.clone()
    expected[:2, 3, 16:32] = plain[2:, 3, 16:32]
    assert torch.equal(changed, expected)


def test_readers_kept_off_a_subspace_do_not_see_it() -> None:
    module = untrained("T7")
    torch.nn.init.uniform_(module.model.norm.weight, 0.5, 2.0)
    space = torch.linalg.qr(torch.randn(64, 3, generator=torch.Generator().manual_seed(1))).Q
    keep_off(module, space, after=2)
    reading = module.lm_head.weight * module.model.norm.weight
    assert (reading @ space).abs().max() < 1e-5
    block = module.model.layers[3]
    assert (block.mlp.gate_proj.weight * block.post_attention_layernorm.weight @ space).abs().max() < 1e-5
    assert (module.model.layers[2].mlp.gate_proj.weight @ space).abs().max() > 1e-3


def test_another_seed_than_the_trained_one_is_refused() -> None:
    with pytest.raises(ModelError, match="trained once: its seed is 0, not 3"):
        build("T2", 3)


def test_the_unused_concept_is_written_by_an_mlp_that_takes_no_part() -> None:
    record = build("T7").record
    assert record.question("written:unused:ask").truth == frozenset({"mlp.2"})
    nodes = record.question("nodes")
    assert "mlp.2" in nodes.candidates
    assert "mlp.2" not in (nodes.truth or ())  # type: ignore[operator]
