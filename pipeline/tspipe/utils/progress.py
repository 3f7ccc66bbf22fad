"""Progress with a rate and the time left: a bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from tspipe.utils.callbacks import ignore

LINE_SECONDS = 15.0  # between plain lines
Advance = Callable[[int, str], None]
_MIB = 2**20

stderr_console = Console(stderr=True, highlight=False)


class _Rate(ProgressColumn):
    """Units per second, over the last of them."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{_digits(speed)} {self.unit}/s", style="progress.data.speed")


@contextlib.contextmanager
def progress(what: str, total: int, unit: str, done: int = 0, shown: bool = True) -> Iterator[Advance]:
    """Show how far something has come; gives `advance(count, what)`, whose text replaces the description.

    Args:
        what: the description.
        total: how many units there are.
        unit: their name, in the plural.
        done: how many of them an earlier run has done.
        shown: False for a process beside the one that speaks.
    """
    if not shown:
        yield ignore
        return
    form = _bar if stderr_console.is_terminal else _lines
    with form(what, total, unit, done) as advance:
        yield advance


@contextlib.contextmanager
def byte_progress(what: str, total: Callable[[], int | None]) -> Iterator[Callable[[int], None]]:
    """Progress in bytes that are read or sent; gives `moved(count)`. `total` is asked when the first bytes move."""
    done = shown = 0
    with contextlib.ExitStack() as stack:
        advance: Advance | None = None

        def moved(count: int) -> None:
            nonlocal advance, done, shown
            if advance is None:
                advance = stack.enter_context(progress(what, math.ceil((total() or 0) / _MIB), "MiB"))
            done += count
            advance(done // _MIB - shown, what)
            shown = done // _MIB

        yield moved


@contextlib.contextmanager
def _bar(what: str, total: int, unit: str, done: int) -> Iterator[Advance]:
    columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn()
    with Progress(*columns, console=stderr_console, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda count, what: bar.update(task, advance=count, description=what)


@contextlib.contextmanager
def _lines(what: str, total: int, unit: str, done: int) -> Iterator[Advance]:
    start = printed = time.monotonic()
    count = done

    def advance(more: int, what: str) -> None:
        nonlocal count, printed
        count += more
        now = time.monotonic()
        if now - printed >= LINE_SECONDS:
            printed = now
            rate = (count - done) / (now - start)
            left = timedelta(seconds=int((total - count) / rate) if rate else 0)
            stderr_console.print(f"{what}: {count:,}/{total:,} {unit}, {_digits(rate)}/s, {left} left", markup=False)

    yield advance


def _digits(rate: float) -> str:
    """A rate as people read it: 1,234, 12, 1.23."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.3g}"
