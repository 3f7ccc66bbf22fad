"""What people see of a cache and of a run."""

import math
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tspipe.cache import SPLITS, Cache

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def plain(text: str) -> str:
    """Text of a foreign file made harmless for a terminal: control characters and line ends become visible."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shares(counts: dict[str, int]) -> str:
    """What the teacher calls the random images, as a sentence; classes under half a percent are left out."""
    total = sum(counts.values())
    found = [f"{plain(name)} ({count / total:.0%})" for name, count in counts.items() if count >= total / 200]
    return f"The teacher calls the random images: {', '.join(found[:5])}"


def console() -> Console:
    """Standard output; 80 columns where it is not a terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=80)


def show_cache(cache: Cache) -> None:
    """A cache's facts, in one screen."""
    manifest = cache.manifest
    dataset, teacher, features = manifest["dataset"], manifest["teacher"], manifest["features"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in {
        "file": f"{cache.path.name}, {size(cache.path.stat().st_size)}",
        "id": cache.id[:12],
        "dataset": f"{dataset['name']}, {dataset['classes']} classes: {_few(cache.classes)}",
        "images": ", ".join(f"{dataset['rows'][split]:,} {split}" for split in SPLITS),
        "licence": dataset["license"] or "not stated",
        "preprocess": _preprocess(manifest["preprocess"]),
        "teacher": f"{teacher['network']}, weights {teacher['weights_sha256'][:12]}"
        + (" (in the file)" if cache.has_teacher else " (not in the file)"),
        "accuracy": ", ".join(
            f"{100 * teacher['correct'][split] / dataset['rows'][split]:.2f} % {split}" for split in SPLITS
        ),
        "features": f"{features['width']} × {cache.train.features.dtype}, logits {dataset['classes']} × float32",
        "computed": "{device}, {precision}, batches of {batch_size}".format(**manifest["compute"]),
    }.items():
        table.add_row(name, Text(plain(value)))
    console().print(table)


def size(count: int) -> str:
    """Bytes in a unit people read: `1.4 MiB`."""
    step = min(int(math.log2(max(count, 1)) // 10), len(_UNITS) - 1)
    return f"{count:,} bytes" if step == 0 else f"{count / 1024**step:.1f} {_UNITS[step]}"


def _few(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _preprocess(fields: dict[str, Any]) -> str:
    parts = []
    if fields["resize"]:
        parts.append("resize {}×{} ({})".format(*fields["resize"], fields["interpolation"]))
    if fields["crop"]:
        parts.append(f"centre crop {fields['crop']}")
    parts += [f"mean {fields['mean']}", f"std {fields['std']}"]
    return ", ".join(parts)
