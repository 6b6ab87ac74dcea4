"""The weights digest: equal where the computation is equal, different where one bit of it differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from probes.errors import ModelError
from probes.models.sources.digest import weights_digest


class Bag(nn.Module):
    """Parameters and buffers under given names, in given order."""

    def __init__(self, names: list[str], values: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name in names:
            self.register_buffer(name, values[name])


def test_a_saved_and_loaded_model_has_the_same_digest(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    for attention in ("sdpa", "eager"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
        assert weights_digest(loaded) == weights_digest(model)


def flip_lowest_bit(model: nn.Module) -> None:
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight").data.view(torch.int32)
    weight[3, 5] ^= 1


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "one bit": flip_lowest_bit,
    "rope": lambda model: model.config.rope_parameters.update(rope_theta=500.0),  # type: ignore[union-attr,operator]
    "epsilon": lambda model: setattr(model.config, "rms_norm_eps", 1e-3),  # type: ignore[arg-type]
    "activation": lambda model: setattr(model.config, "hidden_act", "gelu"),  # type: ignore[arg-type]
    "dtype": lambda model: model.to(torch.bfloat16) and None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_computation_changes_it(change: str) -> None:
    model = tiny_llama()
    before = weights_digest(model)
    CHANGES[change](model)
    assert weights_digest(model) != before


COSMETIC = {
    "_name_or_path": "other",
    "transformers_version": "0",
    "architectures": ["Other"],
    "use_cache": False,
    "attention_dropout": 0.5,
    "dtype": torch.bfloat16,
}


@pytest.mark.parametrize("field", COSMETIC)
def test_cosmetic_fields_do_not(field: str) -> None:
    model = tiny_llama()
    before = weights_digest(model)
    setattr(model.config, field, COSMETIC[field])
    assert weights_digest(model) == before


def test_tied_weights_enter_once() -> None:
    shared = torch.arange(4.0)
    twice, once = Bag(["a", "b"], {"a": shared, "b": shared}), Bag(["a"], {"a": shared})
    assert weights_digest(twice) == weights_digest(once)
    copies = Bag(["a", "b"], {"a": shared, "b": shared.clone()})
    assert weights_digest(copies) != weights_digest(once)


def test_buffers_that_are_not_saved_do_not_enter() -> None:
    module = Bag(["a"], {"a": torch.ones(2)})
    before = weights_digest(module)
    module.register_buffer("scratch", torch.rand(3), persistent=False)
    assert weights_digest(module) == before


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(["a", "b", "c", "d"]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
def test_order_of_registration_does_not_matter_but_names_do(order: list[str], dtype: torch.dtype) -> None:
    values = {name: torch.full((2, 3), index, dtype=dtype) for index, name in enumerate("abcd")}
    digest = weights_digest(Bag(list("abcd"), values))
    assert weights_digest(Bag(order, values)) == digest
    renamed = {name: values[other] for name, other in zip("abcd", order, strict=True)}
    assert (weights_digest(Bag(list("abcd"), renamed)) == digest) is (order == list("abcd"))


def test_shape_enters_and_strides_do_not() -> None:
    square = torch.arange(16.0).reshape(4, 4)
    assert weights_digest(Bag(["a"], {"a": square})) != weights_digest(Bag(["a"], {"a": square.reshape(2, 8)}))
    assert weights_digest(Bag(["a"], {"a": square.t()})) == weights_digest(Bag(["a"], {"a": square.t().contiguous()}))


def test_the_same_bytes_as_another_dtype_are_other_weights() -> None:
    numbers = torch.arange(4.0)
    assert weights_digest(Bag(["a"], {"a": numbers})) != weights_digest(Bag(["a"], {"a": numbers.view(torch.int32)}))


def test_weights_without_data_are_refused() -> None:
    with torch.device("meta"):
        hollow = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="no data"):
        weights_digest(hollow)
