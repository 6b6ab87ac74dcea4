"""The suite every backend inherits: the right tensor, or a refusal with its reason; never a wrong number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from families import FAMILIES, make, prompt, shared
from reference import REFUSED, edit, edited, expected
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from probes.anatomy import ArchitectureMap
from probes.errors import ModelError, OptionError, PointError, PromptError
from probes.models.protocol import Model, Write
from probes.points import POINTS, Address

CAUSAL = tuple(family for family in FAMILIES if family != "bert")
WRITABLE = tuple(point for point in POINTS if not point.endswith("_scale"))
TOLERANCE = 1e-5


def addresses(point: str, model: Model) -> list[Address]:
    return [Address(point, layer) for layer in (range(model.shape.n_layers) if POINTS[point].layered else (None,))]


def readable(model: Model) -> list[Address]:
    """Every address of the vocabulary that the model does not refuse."""
    return [address for name in POINTS for address in addresses(name, model) if model.refusal(address) is None]


def read(
    model: Model, at: list[Address], tokens: Tensor, writes: Mapping[Address, Write] | None = None, **how: object
) -> dict[Address, Tensor]:
    """The tensors at `at`, each handed over exactly once."""
    tensors: dict[Address, Tensor] = {}

    def keep(address: Address):  # type: ignore[no-untyped-def]
        def reader(tensor: Tensor) -> None:
            assert address not in tensors, f"{address} was handed over twice"
            tensors[address] = tensor.detach().cpu().clone()

        return reader

    model.run(tokens, {address: keep(address) for address in at}, writes, **how)  # type: ignore[arg-type]
    assert set(tensors) == set(at)
    return tensors


def one(model: Model, address: Address, tokens: Tensor, writes: Mapping[Address, Write] | None = None) -> Tensor:
    return read(model, [address], tokens, writes)[address]


def close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE, at: object = "") -> None:
    assert actual.shape == expected.shape, at
    error = float((actual.float() - expected.float()).abs().max())
    assert error <= tolerance * max(1.0, float(expected.abs().max())), at


def hooks(module: nn.Module) -> int:
    """How many forward hooks hang on a module and its parts."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def state(module: Any, ignored: frozenset[str] = frozenset()) -> tuple[object, ...]:
    """All that a use of the module must leave as it was."""
    training = tuple(m.training for m in module.modules())
    tensors = tuple((p.dtype, p.device, p.data_ptr(), p.requires_grad) for p in module.parameters())
    own = tuple(sorted(k for m in module.modules() for k in vars(m) if k not in ignored))
    attention = (module.config._attn_implementation, tuple(ALL_ATTENTION_FUNCTIONS))
    return training, tensors, own, attention, str(module.config), hooks(module)


def run_well(model: Model) -> None:
    read(model, [Address("pattern", 1), Address("resid_post", 0)], prompt())


def run_with_failing_read(model: Model) -> None:
    def fail(_: Tensor) -> None:
        raise KeyError("the reader's own")

    with pytest.raises(KeyError, match="the reader's own"):
        model.run(prompt(), {Address("pattern", 1): lambda _: None, Address("resid_post", 1): fail})


def run_interrupted(model: Model) -> None:
    def interrupt(_: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.run(prompt(), {Address("pattern", 2): lambda _: None}, {Address("mlp_out", 1): interrupt})


def decode(model: Model) -> None:
    model.generate([5, 6, 7], 3, writes=lambda: {Address("pattern", 0): lambda p: p, Address("z", 1): lambda z: z * 2})


USES = (run_well, run_with_failing_read, run_interrupted, decode)


class Conformance:
    """Subclass, and say how this backend loads a plain float32 module (which it must not spoil for the others)."""

    families: ClassVar[tuple[str, ...]] = FAMILIES
    leaves: ClassVar[frozenset[str]] = frozenset()
    """Attributes the backend's library leaves on a module's parts."""
    own_copy: ClassVar[bool] = False
    """Whether the backend runs a copy of the module, which the caller's hooks do not reach."""
    _loaded: ClassVar[dict[tuple[type, str], Model]] = {}
    _clean: ClassVar[dict[tuple[type, str], dict[Address, Tensor]]] = {}

    def load(self, module: nn.Module, family: str) -> Model:
        raise NotImplementedError

    def model(self, family: str) -> Model:
        if family not in self.families:
            pytest.skip(f"{family} is not among this backend's families")
        key = (type(self), family)
        if key not in self._loaded:
            self._loaded[key] = self.load(make(family) if self.leaves else shared(family), family)
        return self._loaded[key]

    def clean(self, family: str) -> dict[Address, Tensor]:
        """What one forward of `prompt()` gives at every address that can be read."""
        model, key = self.model(family), (type(self), family)
        if key not in self._clean:
            self._clean[key] = read(model, readable(model), prompt())
        return self._clean[key]

    def any_causal(self) -> tuple[Model, str]:
        family = next(f for f in ("llama", *CAUSAL) if f in self.families)
        return self.model(family), family

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_point_is_the_right_tensor_or_refused(self, family: str) -> None:
        model, right = self.model(family), expected(family)
        for point in POINTS:
            allowed = [address for address in addresses(point, model) if model.refusal(address) is None]
            for address in addresses(point, model):
                if point in REFUSED.get(family, ()):
                    assert address not in allowed, f"{family} has no {address}, so it must be refused"
                if address not in allowed:
                    assert model.refusal(address).strip(), address  # type: ignore[union-attr]
                    with pytest.raises(PointError):
                        model.run(prompt(), {address: lambda _: None})
            for address, tensor in read(model, allowed, prompt(rows=2)).items() if allowed else ():
                close(tensor, right[str(address)], at=address)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_shapes_are_what_the_vocabulary_says(self, family: str) -> None:
        model = self.model(family)
        for address, tensor in read(model, readable(model), prompt(7, rows=2)).items():
            dims = POINTS[address.point].dims
            sizes = [7 if d in ("pos", "query", "key") else model.shape.width(d) for d in dims]
            assert list(tensor.shape) == [2, *sizes], address

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_point_of_one_forward_is_the_right_tensor(self, family: str) -> None:
        model, right = self.model(family), expected(family)
        for address, tensor in read(model, readable(model), prompt(rows=2)).items():
            close(tensor, right[str(address)], at=address)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_faithfulness_holds_and_names_what_is_refused(self, family: str) -> None:
        model = self.model(family)
        assert model.faithfulness.identities
        assert model.faithfulness.holds
        for name, reason in model.faithfulness.refused.items():
            assert name == "lens" or all(model.refusal(a) for a in addresses(name, model))
            assert reason.strip()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_unembedding_reproduces_the_logits_or_is_refused(self, family: str) -> None:
        model, right = self.model(family), expected(family)
        if "lens" in model.faithfulness.refused:
            with pytest.raises(PointError, match=r"unembed"):
                model.unembedding()
            return
        u = model.unembedding()
        last = right[f"resid_post.{model.shape.n_layers - 1}"]
        logits = nn.functional.linear(u.norm(last), u.weight, u.bias)
        logits = logits if u.softcap is None else u.softcap * torch.tanh(logits / u.softcap)
        close(logits.detach(), right["logits"])

    @pytest.mark.parametrize("family", FAMILIES)
    def test_padding_changes_no_row(self, family: str) -> None:
        model, lengths = self.model(family), [9, 4, 1]
        rows = [prompt(n, seed=n)[0] for n in lengths]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        points = ("resid_post", "z", "mlp_out", "attn_in")
        sites = [address for address in readable(model) if address.point in points] + [Address("logits")]
        batched = read(model, sites, padded, lengths=lengths)
        for i, row in enumerate(rows):
            alone = read(model, sites, row[None])
            for address in sites:
                close(batched[address][i, : lengths[i]], alone[address][0], at=address)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_same_forward_twice_is_bit_identical(self, family: str) -> None:
        model = self.model(family)
        sites = [Address("resid_post", 1), Address("logits")]
        first, second = read(model, sites, prompt()), read(model, sites, prompt(), {})
        assert all(torch.equal(first[a], second[a]) for a in sites)

    def last_writable(self, family: str) -> list[Address]:
        """The deepest address of every point that can be written."""
        model = self.model(family)
        deepest = [addresses(point, model)[-1 if POINTS[point].layered else 0] for point in WRITABLE]
        return [address for address in deepest if model.refusal(address) is None]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_write_is_read_back_and_reaches_the_logits(self, family: str) -> None:
        model, tokens, clean, logits = self.model(family), prompt(), self.clean(family), Address("logits")
        for address in self.last_writable(family):
            # Rolled, because a norm undoes a mere change of scale or mean.
            old = clean[address]
            new = old.flip(-1) if address.point == "pattern" else old.roll(1, -1) * 1.5 + 0.25
            given = new.clone()
            sites = list(dict.fromkeys((address, logits)))
            after = read(model, sites, tokens, {address: lambda old, given=given: given.to(old)})
            assert torch.equal(after[address], new), address
            assert not torch.allclose(clean[logits], after[logits], atol=1e-4), address
            assert torch.equal(given, new), f"the model must not change the tensor it was given at {address}"

    @pytest.mark.parametrize("family", FAMILIES)
    def test_an_edit_gives_what_plain_hooks_give(self, family: str) -> None:
        model, tokens, logits = self.model(family), prompt(rows=2), Address("logits")
        clean = expected(family)["logits"]
        for point in WRITABLE:
            address = Address(point, 1 if POINTS[point].layered else None)
            if model.refusal(address) is None:
                right = edited(family, point, 1)
                for row in (0, 1):
                    assert not torch.allclose(right[row], clean[row], atol=1e-4), f"the edit of {address} must matter"
                close(one(model, logits, tokens, {address: edit}), right, at=address)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_written_attention_input_reaches_queries_keys_and_values(self, family: str) -> None:
        model = self.model(family)
        sites = [Address(p, 1) for p in ("attn_in", "q", "k", "v")]
        if any(model.refusal(address) for address in sites):
            pytest.skip("this model does not have the points")
        tensors = read(model, sites, prompt(), {sites[0]: lambda old: old * 0})
        for address in sites:
            close(tensors[address], tensors[address][:, :1].expand_as(tensors[address]))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_writing_back_the_clean_value_changes_nothing(self, family: str) -> None:
        model, clean, logits = self.model(family), self.clean(family), Address("logits")
        for address in self.last_writable(family):
            if address.point != "pattern":
                after = one(model, logits, prompt(), {address: lambda old, at=address: clean[at].to(old)})
                assert torch.equal(after, clean[logits]), address

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_written_stream_is_the_one_the_block_goes_on_with(self, family: str) -> None:
        model, tokens = self.model(family), prompt()
        mid, mlp, post = (Address(p, 1) for p in ("resid_mid", "mlp_out", "resid_post"))
        if model.refusal(mid) is not None:
            pytest.skip("this model does not have the point")
        tensors = read(model, [mid, mlp, post], tokens, {mid: lambda old: old.roll(1, -1) * 2})
        close(tensors[post], tensors[mid] + tensors[mlp])
        assert not torch.allclose(tensors[mlp], one(model, mlp, tokens), atol=1e-4)

    def test_writes_to_several_points_compose(self) -> None:
        model, _ = self.any_causal()
        tokens = prompt()
        edits = {Address(p, 1): (lambda old: old * 0) for p in ("attn_out", "mlp_out")}
        tensors = read(model, [Address("resid_pre", 1), Address("resid_post", 1)], tokens, edits)
        assert torch.equal(tensors[Address("resid_post", 1)], tensors[Address("resid_pre", 1)])

    def test_a_write_of_another_shape_is_refused(self) -> None:
        model, _ = self.any_causal()
        with pytest.raises(PointError, match=r"resid_post\.1 gave"):
            one(model, Address("logits"), prompt(), {Address("resid_post", 1): lambda old: old[:, :1]})

    @pytest.mark.parametrize("point", ["attn_scale", "mlp_scale", "final_scale"])
    def test_a_write_to_a_derived_point_is_refused(self, point: str) -> None:
        model, _ = self.any_causal()
        with pytest.raises(PointError, match="cannot be written"):
            model.run(prompt(), {}, {addresses(point, model)[0]: lambda old: old})

    def test_a_layer_too_deep_is_refused(self) -> None:
        model, _ = self.any_causal()
        with pytest.raises(PointError, match="layers 0 to 2"):
            model.run(prompt(), {Address("resid_post", 3): lambda _: None})

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (torch.zeros(1, 0, dtype=torch.long), "empty"),
            (torch.tensor([[5, 97]]), "token id 97"),
            (torch.tensor([[5, -1]]), "token id -1"),
            (torch.full((1, 65), 5), "context window"),
        ],
    )
    def test_bad_tokens_are_refused_by_name(self, tokens: Tensor, message: str) -> None:
        model, _ = self.any_causal()
        with pytest.raises(PromptError, match=message):
            model.run(tokens, {Address("logits"): lambda _: None})

    @pytest.mark.parametrize("family", CAUSAL)
    def test_greedy_decoding_is_the_argmax_of_full_forwards(self, family: str) -> None:
        model, tokens = self.model(family), prompt(6)[0].tolist()
        written = model.generate(tokens, 6)
        grown = list(tokens)
        for token in written:
            assert token == int(one(model, Address("logits"), torch.tensor([grown]))[0, -1].argmax())
            grown.append(token)
        assert len(written) == 6 or written[-1] == 2

    def test_sampling_depends_on_its_seed_and_nothing_else(self) -> None:
        model, _ = self.any_causal()
        tokens = prompt(6)[0].tolist()
        state = torch.get_rng_state()
        first = model.generate(tokens, 8, temperature=2.0, seed=7)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(123)
        assert model.generate(tokens, 8, temperature=2.0, seed=7) == first
        assert any(model.generate(tokens, 8, temperature=2.0, seed=s) != first for s in range(3))
        assert model.generate(tokens, 6, temperature=2.0, top_p=1e-6) == model.generate(tokens, 6)

    def test_decoding_with_writes_applies_them_at_every_step(self) -> None:
        model, _ = self.any_causal()
        seen: list[int] = []

        def writes() -> Mapping[Address, Write]:
            def first_id_wins(logits: Tensor) -> Tensor:
                seen.append(logits.shape[1])
                out = torch.zeros_like(logits)
                out[..., 11] = 1
                return out

            return {Address("logits"): first_id_wins}

        assert model.generate(prompt(6)[0].tolist(), 4, writes=writes) == [11, 11, 11, 11]
        assert len(seen) == 4
        assert seen[1:] == [1, 1, 1]

    def test_bad_decoding_options_are_refused(self) -> None:
        model, _ = self.any_causal()
        with pytest.raises(OptionError, match="top_p"):
            model.generate([5], 2, top_p=0.0)
        with pytest.raises(OptionError, match="temperature"):
            model.generate([5], 2, temperature=-1.0)
        with pytest.raises(PromptError, match="context window"):
            model.generate([5] * 60, 5)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("use", USES)
    def test_the_module_is_left_as_it_was(self, use: Callable[[Model], None], training: bool) -> None:
        module = make("llama").train(training)
        module.get_submodule("model.layers.1.mlp").eval()
        fired: list[int] = []
        handle = module.get_submodule("model.layers.0").register_forward_hook(lambda *_: fired.append(1))
        before, weights = state(module, self.leaves), {k: v.clone() for k, v in module.state_dict().items()}
        model = self.load(module, "llama")
        assert fired
        fired.clear()
        use(model)
        assert bool(fired) != self.own_copy, "the caller's hook must still run, and never in a copy"
        assert state(module, self.leaves) == before
        assert all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())
        assert module.state_dict().keys() == weights.keys()
        handle.remove()
        assert hooks(module) == 0

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_failed_forward_changes_no_later_one(self, family: str) -> None:
        model, before = self.model(family), self.clean(family)

        def fail(_: Tensor) -> None:
            raise KeyError("the reader's own")

        for address in [*before][::5]:
            with pytest.raises(KeyError):
                model.run(prompt(), {address: fail})
        after = read(model, [*before], prompt())
        assert all(torch.equal(before[a], after[a]) for a in before)

    def test_dropout_is_off_whatever_the_module_s_flag(self) -> None:
        module = make("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
        clean = one(self.load(module, "gpt2"), Address("logits"), prompt())
        model = self.load(module.train(), "gpt2")
        assert torch.equal(one(model, Address("logits"), prompt()), clean)
        assert model.generate([5, 6], 4) == self.load(module.eval(), "gpt2").generate([5, 6], 4)

    @pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "bert"])
    def test_half_precision_keeps_its_dtype_and_holds(self, family: str) -> None:
        model = self.load(make(family).to(torch.bfloat16), family)
        assert model.context.dtype == "bfloat16"
        assert model.faithfulness.holds
        assert {i.tolerance for i in model.faithfulness.identities} == {1e-2}
        tensors = read(model, [Address("resid_post", 0), Address("logits")], prompt())
        assert all(t.dtype == torch.bfloat16 for t in tensors.values())
        if model.refusal(Address("attn_scale", 0)) is None:
            assert one(model, Address("attn_scale", 0), prompt()).dtype == torch.float32

    def test_weights_that_are_not_finite_are_refused_by_name(self) -> None:
        module = make("llama")
        module.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 4] = float("nan")
        with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
            self.load(module, "llama")

    def test_a_module_that_runs_twice_is_refused(self) -> None:
        module: Any = make("llama")
        module.model.layers[2] = module.model.layers[1]
        with pytest.raises(ModelError, match="more than once"):
            self.load(module, "llama")

    def test_a_model_whose_identities_fail_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The planted map says that attention's output is what the MLP puts out."""
        plain = ArchitectureMap.path

        def wrong(self: ArchitectureMap, component: str, layer: int | None = None) -> str | None:
            return plain(self, "mlp" if component == "attn" else component, layer)

        monkeypatch.setattr(ArchitectureMap, "path", wrong)
        with pytest.raises(ModelError, match=r"does not fit this model: .* is off by"):
            self.load(make("llama"), "llama")
