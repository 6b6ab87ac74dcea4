"""The graph of a model: what writes to the stream, what reads from it, and the edges between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from probes.errors import OptionError
from probes.models.protocol import Shape


@dataclass(frozen=True, order=True)
class Sender:
    """What writes to the stream: the embedding (layer -1), a head, or an MLP (head -1)."""

    layer: int
    head: int = -1

    @property
    def embed(self) -> bool:
        """Whether it is the embedding."""
        return self.layer < 0

    def __str__(self) -> str:
        return "embed" if self.embed else f"m{self.layer}" if self.head < 0 else f"{self.layer}.{self.head}"


@dataclass(frozen=True, order=True)
class Receiver:
    """What reads the stream: queries, keys or values of a head, an MLP, or the final norm."""

    layer: int
    """The number of layers for the final norm."""
    input: str
    """`q`, `k`, `v`, `mlp` or `logits`."""
    head: int = -1
    """A key-value head for `k` and `v`, unless `alone`; -1 for an MLP and the final norm."""
    alone: bool = False
    """Whether `head` is a query head that by itself sees the changed key or value of its group."""

    def __str__(self) -> str:
        if self.input == "logits":
            return "logits"
        return f"m{self.layer}" if self.input == "mlp" else f"{self.layer}.{self.head}.{self.input}"

    @property
    def unit(self) -> str:
        """What kind of unit it is, for tables."""
        return (
            {"q": "query_head", "k": "kv_head", "v": "kv_head"}.get(self.input, self.input)
            if not self.alone
            else "query_head"
        )


Edge = tuple[Sender, Receiver]


def senders_of(shape: Shape) -> list[Sender]:
    """Return everything that writes to the stream, in order."""
    inside = [Sender(layer, head) for layer in range(shape.n_layers) for head in (*range(shape.n_heads), -1)]
    return [Sender(-1), *inside]


def receivers_of(shape: Shape) -> list[Receiver]:
    """Return everything that reads the stream, layer by layer: queries, keys, values, MLP; last the final norm."""
    inside = [
        Receiver(layer, name, head)
        for layer in range(shape.n_layers)
        for name, heads in (("q", shape.n_heads), ("k", shape.n_kv_heads), ("v", shape.n_kv_heads), ("mlp", 0))
        for head in (range(heads) if heads else (-1,))
    ]
    return [*inside, Receiver(shape.n_layers, "logits")]


def reaches(sender: Sender, receiver: Receiver, parallel: bool) -> bool:
    """Return whether what the sender writes is in what the receiver reads."""
    if receiver.input == "mlp" and sender.head >= 0 and not parallel:
        return sender.layer <= receiver.layer
    return sender.layer < receiver.layer


def count_edges(shape: Shape, parallel: bool, expanded: bool = False) -> int:
    """Return how many edges there are; `expanded` counts keys and values once for every query head, as some papers do."""
    each = shape.n_heads // shape.n_kv_heads if expanded else 1
    weight = {"k": each, "v": each}
    senders = senders_of(shape)
    return sum(
        weight.get(receiver.input, 1) * sum(reaches(sender, receiver, parallel) for sender in senders)
        for receiver in receivers_of(shape)
    )


def parse_edges(texts: Sequence[str], shape: Shape, parallel: bool, alone: bool = False) -> list[Edge]:
    """Return the edges named as `9.6>10.0.q`: a sender `embed`, `m5` or `9.6`, and a receiver `10.0.q`, `m7` or `logits`.

    Args:
        parallel: whether attention and MLP read the same stream.
        alone: heads of keys and values are query heads, each of which sees the change by itself.

    Raises:
        OptionError: a name that is none, a head or layer that does not exist, or a receiver that comes first.
    """
    senders = {str(sender): sender for sender in senders_of(shape)}
    receivers = {str(receiver): receiver for receiver in receivers_of(shape)}
    if alone:
        heads = [(layer, name, h) for layer in range(shape.n_layers) for name in "kv" for h in range(shape.n_heads)]
        receivers |= {f"{layer}.{h}.{name}": Receiver(layer, name, h, alone=True) for layer, name, h in heads}
    edges = []
    for text in texts:
        first, arrow, second = (part.strip() for part in text.partition(">"))
        if not arrow or first not in senders or second not in receivers:
            raise OptionError(
                f"path {text!r} is none of this model: write SENDER>RECEIVER, such as 3.1>5.0.q, embed>m2 or m4>logits; layers "
                f"are 0 to {shape.n_layers - 1}, heads 0 to {shape.n_heads - 1}, key-value heads 0 to {shape.n_kv_heads - 1}"
            )
        edge = senders[first], receivers[second]
        if not reaches(*edge, parallel):
            raise OptionError(f"path {text!r} leads nowhere: {second} reads before {first} writes")
        edges.append(edge)
    return edges
