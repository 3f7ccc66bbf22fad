"""Parts of a loop that overlap, in threads ahead of it or behind; a clock says for which part the others wait."""

import contextlib
import itertools
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")
_MOST = 2  # tasks begun or waiting: one more than is worked on, so that the thread need not wait for the next


def prefetch_map(work: Callable[[T], U], items: Iterable[T], threads: int = 1) -> Iterator[U]:
    """`map(work, items)`, so many threads working on the next results while the caller uses one."""
    waiting: deque[Future[U]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """The items, each made in a thread while the caller uses the one before."""
    source = iter(items)
    for found in prefetch_map(lambda _: list(itertools.islice(source, 1)), itertools.count()):
        if not found:
            return
        yield found.pop()


@contextlib.contextmanager
def background_writer() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Gives `do(task)`: tasks are done one after the other in a thread behind the caller's, at most two at a time.

    What a task raises, a later call of `do` raises, or the end of the `with`. Where the caller raises, tasks it gave
    are still done.
    """
    waiting: deque[Future[object]] = deque()
    with ThreadPoolExecutor(1) as thread:

        def do(task: Callable[[], object]) -> None:
            while len(waiting) >= _MOST:
                waiting.popleft().result()
            waiting.append(thread.submit(task))

        yield do
        while waiting:
            waiting.popleft().result()


class TimeBreakdown:
    """How long a loop was at each of its parts, by name."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Count what is inside to this part."""
        start = time.monotonic()
        yield
        self._seconds[part] += time.monotonic() - start

    def waiting(self, part: str, items: Iterable[T]) -> Iterator[T]:
        """The items, the time until each is there counted to this part."""
        source = iter(items)
        while True:
            with self.on(part):
                item = next(source, None)
            if item is None:
                return
            yield item

    @property
    def most(self) -> str:
        """The part that took longest."""
        return max(self._seconds, key=self._seconds.__getitem__)


def available_cores() -> int:
    """The processors this process may use; where torchrun started several on this machine, its share of them."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
