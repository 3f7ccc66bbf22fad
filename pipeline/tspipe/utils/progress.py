"""Progress with a rate and the time left: a bar on a terminal, plain lines elsewhere."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from tspipe.utils.console import printable

LINE_SECONDS = 15.0  # between plain lines
Advance = Callable[[float, str], None]
_MIB = 2**20

# Where it is no terminal, lines are not wrapped, so that logs can be searched for them.
stderr_console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=not sys.stderr.isatty())
_remarks: dict[str, object] = {}


def warn(text: str) -> None:
    """Print a remark on standard error, made safe for a terminal."""
    stderr_console.print(printable(text))


def remark_once(key: str, text: str) -> None:
    """Print a remark on standard error, unless this process has printed one with the same key. Safe in threads."""
    token = object()
    if _remarks.setdefault(key, token) is token:
        warn(text)


class _Rate(ProgressColumn):
    """The recent rate in units per second."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{_digits(speed)} {self.unit}/s", style="progress.data.speed")


@contextlib.contextmanager
def progress(what: str, total: int, unit: str, done: int = 0, visible: bool = True) -> Iterator[Advance]:
    """Show progress; yield `advance(count, what)`, whose text replaces the description.

    Args:
        what: the description.
        total: the number of units.
        unit: their name, in the plural.
        done: the number of units that an earlier run has done.
        visible: False for a rank that prints nothing.
    """
    if not visible:
        yield lambda count, what: None
        return
    display = _bar if stderr_console.is_terminal else _lines
    with display(what, total, unit, done) as advance:
        yield advance


@contextlib.contextmanager
def byte_progress(what: str, total: Callable[[], int | None]) -> Iterator[Callable[[int], None]]:
    """Show progress in bytes; yield `advance(count)`. `total` is called when the first bytes are read or sent."""
    with contextlib.ExitStack() as stack:
        show: Advance | None = None

        def advance(count: int) -> None:
            nonlocal show
            if show is None:
                show = stack.enter_context(progress(what, math.ceil((total() or 0) / _MIB), "MiB"))
            show(count / _MIB, what)

        yield advance


@contextlib.contextmanager
def _bar(what: str, total: int, unit: str, done: int) -> Iterator[Advance]:
    columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn()
    with Progress(*columns, console=stderr_console, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda count, what: bar.update(task, advance=count, description=what)


@contextlib.contextmanager
def _lines(what: str, total: int, unit: str, done: int) -> Iterator[Advance]:
    start = printed = time.monotonic()
    count: float = done

    def advance(more: float, what: str) -> None:
        nonlocal count, printed
        count += more
        now = time.monotonic()
        if now - printed >= LINE_SECONDS:
            printed = now
            rate = (count - done) / (now - start)
            left = timedelta(seconds=int((total - count) / rate) if rate else 0)
            stderr_console.print(f"{what}: {count:,.0f}/{total:,} {unit}, {_digits(rate)}/s, {left} left")

    yield advance


def _digits(rate: float) -> str:
    """Format a rate: 1,234, 12, 1.23."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.3g}"
