"""A row never belongs to another model: whatever is done to a module, before or after it is wrapped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from changes import CHANGES, attention, mlp, with_buffer
from families import FAMILIES, make
from forked import forked
from tiny import PROMPTS
from torch import Tensor, nn

from probes.capture.needs import Need
from probes.capture.run import Sequences, capture, context_of, plan_capture
from probes.errors import ModelError, PromptError
from probes.models import Model, from_bridge, from_hf, load_model, weights_digest
from probes.models.backends.native import NativeModel
from probes.models.fingerprint.plain_model import deviations
from probes.reducers import Reducer
from probes.store import ActivationStore

NEEDS = [Need("resid_post.2"), Need("logits")]
REFUSED = {
    "forward of a block", "forward of the model", "forward of a class", "hook", "pre-hook", "global hook", "autocast",
}  # fmt: skip
"""Changes that no key can name."""


def llama(change: str) -> Any:
    tied = {"tie_word_embeddings": True} if change == "untied unembedding" else {}
    module = make("llama", **tied)
    return with_buffer(module) if change == "saved buffer" else module


@torch.no_grad()
def hooked(module: Any) -> list[Tensor]:
    """The last block's output and the logits of each prompt, by torch's own hooks: [pos, width] each."""
    rows: list[Tensor] = []
    handle = module.model.layers[2].register_forward_hook(lambda _, __, out: rows.append(out[0].clone()))
    try:
        logits = [module(input_ids=torch.tensor([prompt]), use_cache=False).logits[0] for prompt in PROMPTS]
    finally:
        handle.remove()
    return [*rows, *logits]


def stored(model: Model, store: ActivationStore) -> tuple[list[Tensor], int]:
    """The same from the store, and how many forwards that took."""
    done = capture(model, PROMPTS, NEEDS, store)
    return [*done.get("resid_post.2"), *done.get("logits")], done.done.forwards


def alike(rows: list[Tensor], expected: list[Tensor], half: bool = False) -> None:
    for one, other in zip(rows, expected, strict=True):
        torch.testing.assert_close(
            one, other, **({"atol": 0.1, "rtol": 0.05} if half else {"atol": 2e-5, "rtol": 1e-4})
        )


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_changed_after_wrapping_is_refused_or_gets_its_own_rows(change: str, store: ActivationStore) -> None:
    module = llama(change)
    model = from_hf(module)
    alike(stored(model, store)[0], hooked(module))
    before = context_of(model)
    with CHANGES[change](module):
        if change in REFUSED:
            with pytest.raises(ModelError, match=r"its rows cannot be told from other rows: .*"):
                capture(model, PROMPTS, NEEDS, store)
            with pytest.raises(ModelError, match="its rows cannot be told"):
                plan_capture(model, PROMPTS, NEEDS, store)
            return
        expected = hooked(module)
        assert context_of(model) != before
        rows, forwards = stored(model, store)
        assert forwards == len(PROMPTS), "rows of the model as it was were read"
        alike(rows, expected, half=change == "bfloat16")
        assert rows[0].dtype == expected[0].dtype
        assert stored(from_hf(module), store)[1] == 0, "the changed model does not find its own rows"


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_changed_before_wrapping_leaves_no_rows_to_the_plain_model(
    change: str, store: ActivationStore
) -> None:
    changed, plain = llama(change), llama(change)
    with CHANGES[change](changed):
        if change in REFUSED:
            # Some of these already contradict the identities that are checked when a module is wrapped.
            with pytest.raises(ModelError, match=r"its rows cannot be told|does not fit this model"):
                capture(from_hf(changed), PROMPTS, NEEDS, store)
        else:
            alike(stored(from_hf(changed), store)[0], hooked(changed), half=change == "bfloat16")
    rows, forwards = stored(from_hf(plain), store)
    assert forwards == len(PROMPTS)
    alike(rows, hooked(plain))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_of_every_family_keeps_the_digest_as_its_key(family: str, tmp_path: Path) -> None:
    module = make(family)
    module.save_pretrained(tmp_path)  # type: ignore[operator]
    for model in (from_hf(module), load_model(str(tmp_path)), load_model(str(tmp_path), dtype="bfloat16")):
        assert deviations(model.module) == ()  # type: ignore[attr-defined]
        assert model.current().weights == model.context.weights == weights_digest(model.module)  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_and_buffer_of_every_family_enters_the_key(family: str) -> None:
    module = make(family)
    model = from_hf(module)
    first = model.current()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        before = tensor.detach().clone()
        tensor.data.view(-1)[-1:].add_(1)
        assert model._fingerprint() != model._state, name  # type: ignore[attr-defined]
        tensor.data.copy_(before)
        assert model._fingerprint() == model._state, name  # type: ignore[attr-defined]
    assert model.current() == first


def test_a_model_put_back_finds_its_rows_again(store: ActivationStore) -> None:
    module = make("llama")
    model = from_hf(module)
    rows, _ = stored(model, store)
    before = context_of(model)
    with torch.no_grad():
        mlp(module).up_proj.weight.mul_(2)
        assert stored(model, store)[1] == len(PROMPTS)
        mlp(module).up_proj.weight.div_(2)
    again, forwards = stored(model, store)
    assert (context_of(model), forwards) == (before, 0)
    alike(again, rows)


def test_points_follow_a_part_that_was_exchanged(store: ActivationStore) -> None:
    module = make("llama")
    model = from_hf(module)
    with CHANGES["adapter"](module):
        activations = capture(model, PROMPTS, [Need("pattern.1"), Need("attn_out.1")], store)
        fresh = from_hf(module)
        assert capture(fresh, PROMPTS, [Need("attn_out.1")], store).done.forwards == 0
        assert activations.get("pattern.1")[0].shape == (4, 4, 4)


def test_two_functions_of_one_name_are_told_apart(store: ActivationStore) -> None:
    keys = set()
    for scale in (2.0, 3.0):
        module = make("llama")
        del mlp(module).act_fn
        mlp(module).act_fn = lambda x, scale=scale: x * scale
        keys.add(from_hf(module).current().weights)
    assert len(keys) == 2


@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_the_other_backends_follow_or_refuse(backend: str, store: ActivationStore) -> None:
    module = make("llama")
    model = from_hf(module, backend=backend)
    plain = [Need("resid_post.2")]
    first = capture(model, PROMPTS, plain, store).get("resid_post.2")
    for row, other in zip(first, hooked(module), strict=False):
        torch.testing.assert_close(row, other, atol=2e-5, rtol=1e-4)
    assert capture(from_hf(module, backend=backend), PROMPTS, plain, store).done.forwards == 0
    with torch.no_grad():
        mlp(module).up_proj.weight.mul_(1.5)
    if backend == "transformer_lens":
        with pytest.raises(ModelError, match="wrap the module again"):
            capture(model, PROMPTS, plain, store)
        return
    activations = capture(model, PROMPTS, plain, store)
    assert activations.done.forwards == len(PROMPTS)
    for row, other in zip(activations.get("resid_post.2"), hooked(module), strict=False):
        torch.testing.assert_close(row, other, atol=2e-5, rtol=1e-4)
    mlp(module).act_fn = nn.Tanh()
    with pytest.raises(ModelError, match="wrap the module again"):
        capture(model, PROMPTS, plain, store)


def test_a_module_under_nnsight_still_shares_rows_with_itself(store: ActivationStore) -> None:
    module = make("llama")
    rows, _ = stored(from_hf(module), store)
    from_hf(module, backend="nnsight")
    again, forwards = stored(from_hf(module), store)
    assert forwards == 0
    alike(again, rows)


def test_a_bridge_with_a_user_s_hook_is_run_but_not_stored(store: ActivationStore) -> None:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    module = make("llama")
    bridge = build_bridge_from_module(module, type(module).__name__, hf_config=module.config, model_name="llama")
    model = from_bridge(bridge)
    assert capture(model, PROMPTS, [Need("resid_post.1")], store).done.forwards == len(PROMPTS)
    assert capture(model, PROMPTS, [Need("resid_post.1")], store).done.forwards == 0
    bridge.add_hook("blocks.1.hook_out", lambda tensor, hook: tensor * 0)
    with pytest.raises(ModelError, match=r"hook\(s\) of the user"):
        capture(model, PROMPTS, [Need("resid_post.1")], store)


def test_rows_of_a_model_changed_since_are_not_read_through_its_unembedding(store: ActivationStore) -> None:
    module = make("llama")
    activations = capture(from_hf(module), PROMPTS, [Need("resid_post.1")], store)
    before = activations.packed("resid_post.1").clone()
    with torch.no_grad():
        module.lm_head.weight.mul_(2)  # type: ignore[union-attr,operator]
    assert torch.equal(activations.packed("resid_post.1"), before), (
        "stored rows stay those of the model that was captured"
    )
    with pytest.raises(ModelError, match="has been changed since these rows were captured"):
        activations.get("resid_post.1", Reducer("lens_ids", ids=(3,)))


def test_damaged_rows_of_a_model_changed_since_are_not_captured_from_what_it_is_now(store: ActivationStore) -> None:
    module = make("llama")
    capture(from_hf(module), PROMPTS, [Need("resid_post.1")], store)
    for shard in (store.root / "shards").rglob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-5] ^= 0xFF
        shard.write_bytes(data)
    activations = capture(from_hf(module), PROMPTS, [Need("resid_post.1")], ActivationStore(store.root))
    with torch.no_grad():
        mlp(module).up_proj.weight.mul_(2)
    with pytest.raises(ModelError, match="has been changed since these rows were captured"):
        activations.get("resid_post.1")


def test_a_model_that_computes_something_else_under_the_same_key_is_refused(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(from_hf(make("llama")), PROMPTS, NEEDS, store)
    monkeypatch.setattr(torch.nn.functional, "silu", torch.nn.functional.gelu)
    other = from_hf(make("llama"))
    with pytest.raises(
        ModelError, match=r"that it does not reproduce: a fixed prompt differs by .* a store of its own"
    ):
        capture(other, PROMPTS, NEEDS, store)
    with pytest.raises(ModelError, match="does not reproduce"):
        plan_capture(other, PROMPTS, NEEDS, store)


def test_pruning_and_epsilon_of_two_runs_meet_under_one_key() -> None:
    for change in ("pruning", "norm epsilon", "unsaved buffer", "adapter", "parametrisation"):
        keys = set()
        for _ in range(2):
            module = make("llama")
            with CHANGES[change](module):
                keys.add(from_hf(module).current().weights)
        assert len(keys) == 1, change


def capture_changed(folder: Path, root: Path, change: str) -> None:
    model = load_model(str(folder), device="cpu")
    block = model.module.model.layers[1]
    if change == "weight":
        with torch.no_grad():
            block.mlp.up_proj.weight.mul_(1.5)
    else:
        block.register_forward_hook(lambda _, __, out: out * 1.5)
    try:
        capture(model, [(5, 6, 7)], [Need("resid_post.2")], ActivationStore(root))
    except ModelError:
        os._exit(2)


@pytest.mark.parametrize("change", ["weight", "hook"])
def test_another_process_leaves_no_rows_of_a_changed_model(change: str, llama_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    assert forked(lambda: capture_changed(llama_folder, root, change)) == (0 if change == "weight" else 2)
    model = load_model(str(llama_folder), device="cpu")
    assert plan_capture(model, [(5, 6, 7)], [Need("resid_post.2")], ActivationStore(root)).forwards == 1


class Letters:
    """A tokenizer of one id per letter."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") + 3 for letter in text]}


def test_texts_are_taken_as_analyses_take_them(store: ActivationStore) -> None:
    model = NativeModel(make("llama"), Letters(), ref="letters", weights="letters")
    texts: Sequences = ["abc", (5, 6), [7, 8, 9]]
    assert plan_capture(model, texts, [Need("resid_post.1")], store).forwards == 3
    activations = capture(model, texts, [Need("resid_post.1")], store)
    assert activations.sequences == [(3, 4, 5), (5, 6), (7, 8, 9)]
    again = capture(model, [(3, 4, 5)], [Need("resid_post.1")], store)
    assert again.done.forwards == 0
    assert torch.equal(again.get("resid_post.1")[0], activations.get("resid_post.1")[0])


def test_what_is_no_prompt_is_refused_by_what_it_is(tiny: NativeModel, store: ActivationStore) -> None:
    for sequences, message in (
        (["some text"], "has no tokenizer"),
        ("some text", "one text 'some text' where a list belongs"),
        ([""], "must be a string that is not empty"),
        ([()], "not empty"),
        ([(1.5,)], "1.5 is not a whole number"),
        ([(97,)], "outside the vocabulary"),
    ):
        with pytest.raises(PromptError, match=message):
            capture(tiny, sequences, [Need("resid_post.1")], store)


def test_scaling_is_named_by_the_attention_it_belongs_to() -> None:
    module = make("llama")
    attention(module).scaling = 1.0
    assert deviations(module) == ("('model.layers.1.self_attn', 'scaling')=1.0",)
