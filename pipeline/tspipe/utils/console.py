"""Text for people: harmless for a terminal, in units that people read."""

import math

from rich.console import Console

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def printable(text: str, most: int = 2000) -> str:
    """Text of a foreign file made harmless for a terminal: control characters and line ends become visible.

    A longer one than `most` loses its middle: of an error, what to do about it comes last.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-(most // 2) :]}"


def echo(text: str) -> None:
    """Print a line now, harmless for a terminal whatever is in it."""
    print(printable(text), flush=True)


def pluralize(count: int, what: str) -> str:
    """`1 epoch`, `1,000 epochs`."""
    return f"{count:,} {what}{'s' * (count > 1)}"


def stdout_console() -> Console:
    """Standard output; 80 columns where it is not a terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=80)


def format_bytes(count: int) -> str:
    """Bytes in a unit people read: `1.4 MiB`."""
    step = min(int(math.log2(max(count, 1)) // 10), len(_UNITS) - 1)
    return f"{count:,} bytes" if step == 0 else f"{count / 1024**step:.1f} {_UNITS[step]}"
