"""Which outputs of a joint query-key-value projection belong to which head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from probes.anatomy.mapping import ArchitectureMap


@dataclass(frozen=True, eq=False)
class Layout:
    """Indices into the joint projection's outputs: `q` [head, d_head], `k` and `v` [kv_head, d_head]."""

    name: str
    q: Int[Tensor, "head d_head"]
    k: Int[Tensor, "kv_head d_head"]
    v: Int[Tensor, "kv_head d_head"]


def joint_layouts(known: ArchitectureMap, width: int, heads: int, kv_heads: int, d_head: int) -> Iterator[Layout]:
    """Give every layout that fits; which one is in use is told by the values it yields, never by the family's name."""
    rows = torch.arange(width)
    if width == (heads + 2 * kv_heads) * d_head:
        q, k, v = torch.split(rows, [heads * d_head, kv_heads * d_head, kv_heads * d_head])
        yield Layout("concatenated", q.view(heads, d_head), k.view(kv_heads, d_head), v.view(kv_heads, d_head))
        grouped = rows.view(kv_heads, heads // kv_heads + 2, d_head)
        yield Layout("grouped", grouped[:, :-2].reshape(heads, d_head), grouped[:, -2], grouped[:, -1])
    parts = known.split_joint(width)
    if parts and [len(part) for part in parts] == [heads * d_head, kv_heads * d_head, kv_heads * d_head]:
        q, k, v = parts
        yield Layout("mapped", q.view(heads, d_head), k.view(kv_heads, d_head), v.view(kv_heads, d_head))
