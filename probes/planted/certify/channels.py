"""Which head speaks to which: what one writes is kept from one input (q, k or v) of a later one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from probes.planted.certify.ablation import TAKES_PART, ablated, handled, node_means, replacing
from probes.planted.certify.bench import Bench, Change, Site
from probes.planted.certify.measured import Measured, set_of
from probes.planted.record import Question


@torch.no_grad()
def channel(bench: Bench, question: Question) -> Measured:
    """Measure the share of answers changed when a reader's q, k or v gets the mean of what one earlier head writes.

    Readers are the heads whose own mean changes an answer: no path that ends in another can.
    """
    few = bench.few(24)
    heads = [name for name in bench.nodes if not name.startswith("mlp")]
    alone = dict(zip(heads, ablated(few, [(name,) for name in heads]), strict=True))
    written = {name: _written(few, name) for name in heads}
    shares: dict[str, float] = {}
    for reader in (name for name, share in alone.items() if share > 0):
        writers = [name for name in heads if int(name.split(".")[0]) < int(reader.split(".")[0])]
        for kind in "qkv" if writers else "":
            named = _without(few, reader, kind, [written[writer] for writer in writers])
            for writer, row in zip(writers, named, strict=True):
                shares[f"{writer}->{reader}:{kind}"] = float((row != few.plain).float().mean())
    measured = {name: share for name, share in shares.items() if share > 0}
    return Measured(measured, set_of(shares, least=TAKES_PART, most=1 - bench.sure) == question.truth)


def _written(bench: Bench, head: str) -> Float[Tensor, "example pos d_model"]:
    """What a head writes beyond its mean."""
    site, columns = handled(bench, head)
    z = bench.read([site], bench.tokens)[site][..., columns]
    weight = bench.output_weight(site[1])[:, columns]
    return (z - node_means(bench.whole)[site][: z.shape[1], columns]) @ weight.T


def _without(bench: Bench, reader: str, kind: str, written: list[Tensor]) -> Tensor:
    """The words named when the reader's input of a kind lacks each of the writings, [writer, example]."""
    (_, layer), columns = handled(bench, reader)
    stream = bench.streams[layer]
    inputs = torch.cat([bench.projected(stream - lacking, layer, kind)[..., columns] for lacking in written])
    changes: dict[Site, Change] = {(kind, layer): replacing((..., columns), inputs)}  # type: ignore[dict-item]
    named = bench.answer(bench.tokens.repeat(len(written), 1), bench.last.repeat(len(written)), changes)
    return named.reshape(len(written), -1)
