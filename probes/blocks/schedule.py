"""Tasks that go through a model's blocks, brought together so that each block is fetched once for all that want it next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from probes.blocks.strands import Cancelled, ContextMaker, Strand, Task

T = TypeVar("T")
W = TypeVar("W")

TASKS = 512
"""Tasks of one sweep, at most; more go one sweep after another."""


@dataclass
class Waiting:
    """How long blocks took."""

    waited: float = 0.0
    """Seconds in which nothing ran because a block was not there yet."""
    worked: float = 0.0
    """Seconds in which a block was in place."""

    @property
    def share(self) -> float:
        """The share of the time spent waiting."""
        return self.waited / max(self.waited + self.worked, 1e-9)


class BlockSchedule(Generic[W]):
    """Fetches blocks when code wants them, the next while one is in place; tasks run together share every fetch.

    Args:
        fetch: reads the weights of a block; called in a thread of its own.
        placed: puts them in place inside a context.
    """

    def __init__(self, fetch: Callable[[int], W], placed: Callable[[int, W], AbstractContextManager[None]]) -> None:
        self.fetch, self.placed = fetch, placed
        self.waiting = Waiting()
        self._lock = threading.RLock()
        self._local = threading.local()
        self._back = threading.Semaphore(0)
        self._tasks: list[Task] = []
        self._coming: tuple[int, Future[W]] | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="block-reader")
        self._in_place: int | None = None

    @property
    def driving(self) -> bool:
        """Whether tasks are under way."""
        return bool(self._tasks)

    def __enter__(self) -> None:
        """Keep other threads out; the tasks of one sweep are not other threads."""
        if self._task is None:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        if self._task is None:
            self._lock.release()

    @contextmanager
    def at(self, layer: int, then: int | None = None) -> Iterator[None]:
        """Have block `layer` in place inside; a task waits until the sweep gets there.

        Args:
            layer: the block.
            then: the block that is likely to be wanted next, which is read ahead.
        """
        strand, task = self._strand, self._task
        if strand.inside == layer:
            yield
            return
        with ExitStack() as stack:
            if task is None:
                stack.enter_context(self._lock)
                stack.enter_context(self._fetched(layer, then))
            else:
                task.layer, task.then = layer, then
                with task.suspended():
                    self._pause(task)
            for place, alteration in strand.alterations:
                if place == layer:
                    stack.enter_context(alteration())
            strand.inside = layer
            stack.callback(setattr, strand, "inside", None)
            yield

    @contextmanager
    def altering(self, layer: int, alteration: ContextMaker) -> Iterator[None]:
        """Have `alteration` entered inside whenever this code has block `layer` in place."""
        alterations = self._strand.alterations
        alterations.append((layer, alteration))
        try:
            yield
        finally:
            alterations.pop()

    @contextmanager
    def during(self, context: ContextMaker) -> Iterator[None]:
        """Have `context` entered inside, except while another task runs."""
        strand = self._strand
        with ExitStack() as entered:
            entered.enter_context(context())
            strand.contexts.append((context, entered))
            try:
                yield
            finally:
                strand.contexts.pop()

    def together(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Return what tasks return, each block fetched once for all of them that want it next.

        Only one task runs at a time, and gives way only where it wants a block.

        Raises:
            BaseException: what the first failing task raised; the others are ended.
        """
        results: list[T] = []
        for i in range(0, len(tasks), TASKS):
            results += self._some(tasks[i : i + TASKS])
        return results

    def _some(self, works: Sequence[Callable[[], T]]) -> list[T]:
        # A task begins under the same reads, writes and alterations as the code that starts it.
        strand, path = self._strand, self.next_path()
        tasks = [
            Task(
                [(context, ExitStack()) for context, _ in strand.contexts],
                list(strand.alterations),
                path=(*path, index),
                work=work,
            )
            for index, work in enumerate(works)
        ]
        parent = self._task
        if parent is not None:
            self._tasks += tasks
            parent.waits_for = tasks
            with parent.suspended():
                self._pause(parent)
            parent.waits_for = ()
        else:
            with self._lock, strand.suspended():
                self._drive(tasks)
        return [task.result for task in tasks]

    def next_path(self) -> tuple[int, ...]:
        """Return the place in the work of what the running code begins next."""
        strand = self._strand
        strand.begun += 1
        return (*strand.path, strand.begun)

    @contextmanager
    def counted_anew(self) -> Iterator[None]:
        """Count what the running code begins from the start inside."""
        strand = self._strand
        before, strand.begun = strand.begun, 0
        yield
        strand.begun = before

    @property
    def _task(self) -> Task | None:
        return getattr(self._local, "task", None)

    @property
    def _strand(self) -> Strand:
        if self._task is not None:
            return self._task
        if not hasattr(self._local, "outside"):
            self._local.outside = Strand()
        outside: Strand = self._local.outside
        return outside

    def _drive(self, tasks: list[Task]) -> None:
        self._tasks = list(tasks)
        try:
            while self._tasks:
                self._run_ready()
                if self._tasks:
                    # Blocks in turn, and from the first again where nobody wants a later one.
                    now = -1 if self._in_place is None else self._in_place
                    layer = min(self._awaited(), key=lambda block: (block <= now, block))
                    with self._fetched(layer, self._after(layer)):
                        self._in_place = layer
                        while self._release(layer):
                            self._run_ready()
        finally:
            for task in [task for task in self._tasks if task.thread is not None]:
                task.cancelled = True
                self._run(task)
            self._tasks, self._in_place = [], None
            self._drop()

    def _awaited(self) -> list[int]:
        return [task.layer for task in self._tasks if task.layer is not None]

    def _after(self, layer: int) -> int | None:
        """The block that will be wanted after this one."""
        coming = [task.then for task in self._tasks if task.layer == layer and task.then is not None]
        coming += [other for other in self._awaited() if other != layer]
        return min(coming, key=lambda other: (other <= layer, other), default=None)

    def _release(self, layer: int) -> bool:
        """Let the tasks that want this block go on; return whether there are any."""
        waiting = [task for task in self._tasks if task.layer == layer]
        for task in waiting:
            task.layer = None
        return bool(waiting)

    def _run_ready(self) -> None:
        while ready := [task for task in self._tasks if task.ready]:
            for task in ready:
                self._run(task)
                if task.error is not None:
                    raise task.error

    def _run(self, task: Task) -> None:
        """Give a task the turn until it waits or is done."""
        if task.thread is None:
            modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
            task.thread = threading.Thread(
                target=copy_context().run, args=(self._main, task, *modes), name="block-task", daemon=True
            )
            task.thread.start()
        else:
            task.turn.release()
        try:
            self._back.acquire()
        except BaseException:
            # Interrupted: whoever has the turn gives it back first.
            self._back.acquire()
            raise
        finally:
            if task.done:
                task.thread.join()
                self._tasks.remove(task)

    def _main(self, task: Task, inference: bool, grad: bool) -> None:
        self._local.task = task
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad), task.inherited():
                task.result = task.work()
        except Cancelled:
            pass
        except BaseException as error:
            task.error = error
        finally:
            task.done = True
            self._back.release()

    def _pause(self, task: Task) -> None:
        self._back.release()
        task.turn.acquire()
        if task.cancelled:
            raise Cancelled

    @contextmanager
    def _fetched(self, layer: int, then: int | None) -> Iterator[None]:
        started = time.perf_counter()
        weights = self._take(layer)
        if then is not None:
            self._coming = (then, self._pool.submit(self.fetch, then))
        arrived = time.perf_counter()
        try:
            with self.placed(layer, weights):
                del weights
                yield
        except BaseException:
            self._drop()
            raise
        finally:
            self.waiting.waited += arrived - started
            self.waiting.worked += time.perf_counter() - arrived

    def _take(self, layer: int) -> W:
        if self._coming is not None and self._coming[0] == layer:
            (_, future), self._coming = self._coming, None
            return future.result()
        self._drop()
        return self._pool.submit(self.fetch, layer).result()

    def _drop(self) -> None:
        """Let go of what was read ahead."""
        if self._coming is not None:
            _, future = self._coming
            self._coming = None
            future.cancel() or future.exception()
