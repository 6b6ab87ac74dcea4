"""The writer of a capture: packets go into the store on a thread of its own, while the model goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from probes.capture.lookup import Lookup
from probes.device_to_host import PendingTensor
from probes.store import Packet, Ragged

Tokens = tuple[int, ...]


class Writer:
    """Commits packets in the order in which it receives them. Only so many wait: two, or what fits the transport's ring.

    Args:
        lookup: the store, and the context under which packets go into it.
        prompt_lengths: of each sequence that is a prompt and its response, the tokens of the prompt.
    """

    def __init__(self, lookup: Lookup, prompt_lengths: Mapping[Tokens, int]) -> None:
        self.lookup, self.prompt_lengths, self.bytes = lookup, prompt_lengths, 0
        self.failed: Callable[[BaseException], None] = lambda _: None
        """Called with what went wrong with pending tensors, at once: their sender may be waiting for room."""
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store-writer")
        self._pending: deque[Future[int]] = deque()

    def put(self, sequences: tuple[Tokens, ...], features: dict[str, Ragged]) -> None:
        """Queue rows in host memory; wait while two packets do."""
        while len(self._pending) >= 2:
            self.bytes += self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._commit, sequences, features))

    def put_pending(
        self, sequences: tuple[Tokens, ...], features: Mapping[str, tuple[PendingTensor, tuple[int, ...]]]
    ) -> None:
        """Queue rows that may still be on their way; each is read once it has arrived, then released."""
        while self._pending and self._pending[0].done():
            self.bytes += self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._receive, sequences, dict(features)))

    def _receive(
        self, sequences: tuple[Tokens, ...], features: dict[str, tuple[PendingTensor, tuple[int, ...]]]
    ) -> int:
        try:
            return self._commit(sequences, {key: Ragged(p.read(), counts) for key, (p, counts) in features.items()})
        except BaseException as error:
            self.failed(error)
            raise
        finally:
            for pending, _ in features.values():
                pending.release()

    def _commit(self, sequences: tuple[Tokens, ...], features: dict[str, Ragged]) -> int:
        size = self.lookup.store.put(Packet(self.lookup.context, sequences, features)).bytes_written
        self.lookup.remember(sequences, self.prompt_lengths)
        return size

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for pending in self._pending:
                if kind is None:
                    self.bytes += pending.result()
        finally:
            self._pool.shutdown(wait=True)
