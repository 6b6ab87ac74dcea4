"""GPT-2 small's shape with random weights: nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from probes.models.backends.native import NativeModel


def make(n_layers: int = 12) -> NativeModel:
    """A model, the same at each call."""
    torch.manual_seed(0)
    return NativeModel(GPT2LMHeadModel(GPT2Config(n_layer=n_layers)).eval(), ref="gpt2-shape", weights="random")
