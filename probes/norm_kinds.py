"""The uses of a norm that can be named."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["mlp", "mlp_post", "q_norm", "k_norm", "qk", "v", "attn_post", "final"]
"""Which use of a norm: the MLP's input, what the MLP adds, queries and keys per head, the input of queries and keys, the
input of values, what attention adds, or the input of the unembedding."""
KINDS: tuple[Kind, ...] = get_args(Kind)
