"""Parts of a loop that overlap in threads, and a clock that says which part the others wait for."""

import contextlib
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tspipe.utils.containers import limits

T = TypeVar("T")
U = TypeVar("U")
_MAX_PENDING = 2  # one more than is worked on, so that the thread does not wait for the next


def prefetch_map(work: Callable[[T], U], items: Iterable[T], threads: int = 1) -> Iterator[U]:
    """Return `map(work, items)`; `threads` threads compute the next results while the caller uses one."""
    pending: deque[Future[U]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextlib.contextmanager
def background_writer() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Yield `submit(task)`, which runs tasks one after the other in a thread; at most two are pending.

    An exception of a task is raised by a later call of `submit`, or at the end of the `with` block. If the block
    raises, the tasks submitted before still run.
    """
    pending: deque[Future[object]] = deque()
    with ThreadPoolExecutor(1) as thread:

        def submit(task: Callable[[], object]) -> None:
            while len(pending) >= _MAX_PENDING:
                pending.popleft().result()
            pending.append(thread.submit(task))

        yield submit
        while pending:
            pending.popleft().result()


class TimeBreakdown:
    """The seconds that a loop spends in each of its parts, by name."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to this part."""
        start = time.monotonic()
        yield
        self._seconds[part] += time.monotonic() - start

    def iterate(self, part: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; add the time that each takes to arrive to this part."""
        source = iter(items)
        while True:
            with self.measure(part):
                item = next(source, None)
            if item is None:
                return
            yield item

    @property
    def longest(self) -> str:
        """The part that took longest."""
        return max(self._seconds, key=self._seconds.__getitem__)


def available_cores() -> int:
    """Return the number of processors for this process, within the CPU quota of its container.

    If torchrun started several processes on this machine, each has its share.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = math.ceil(min(count, limits().cores))
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
