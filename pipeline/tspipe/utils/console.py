"""Text for people: safe for a terminal, in readable units."""

import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich is imported where it is used, for quick shell completion
    from rich.console import Console
    from rich.table import Table

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def printable(text: str, limit: int = 2000) -> str:
    """Return text of unknown origin made safe for a terminal: control characters and line ends are escaped.

    Text longer than `limit` loses its middle, since the remedy for an error is at its end.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-(limit // 2) :]}"


def echo(text: str) -> None:
    """Print a line at once, made safe for a terminal."""
    print(printable(text), flush=True)


def quote(text: str | Path) -> str:
    """Return a word for a shell, in bytes as `$'…'` if standard output cannot show it."""
    text = str(text)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return (
            "$'"
            + "".join(f"\\x{byte:02x}" if byte > 126 or byte in b"\\'" else chr(byte) for byte in os.fsencode(text))
            + "'"
        )
    return shlex.quote(text)


def pluralize(count: int, noun: str) -> str:
    """Return `1 epoch` or `1,000 epochs`."""
    return f"{count:,} {noun}{'s' * (count > 1)}"


def stdout_console() -> "Console":
    """Return a console on standard output, 80 columns wide if that is not a terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=80)


def plain_table(texts: Sequence[str], numbers: Sequence[str] = ()) -> "Table":
    """Return a table without lines, with these headings: texts may be folded, numbers are to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def format_count(number: int) -> str:
    """Format a large number in three digits: 970, 5.8k, 11.2M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 1000)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def format_bytes(count: int) -> str:
    """Return a number of bytes in a readable unit: `1.4 MiB`."""
    power = min(int(math.log2(max(count, 1)) // 10), len(_UNITS) - 1)
    return f"{count:,} bytes" if power == 0 else f"{count / 1024**power:.1f} {_UNITS[power]}"
