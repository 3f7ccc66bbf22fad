"""What the command line prints: caches, differences, benchmarks, scores, evaluations."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from tspipe.cache import SPLITS, Cache, Manifest, open_cache
from tspipe.cache.diff import Diff, SplitDiff
from tspipe.cache.layout import DTYPE_NAMES, UNLABELLED
from tspipe.errors import CacheError
from tspipe.utils.console import format_bytes, plain_table, printable, stdout_console

if TYPE_CHECKING:
    from tspipe.cache.peek import Peek  # imported only where a command reads a URL
    from tspipe.data.random_images.score import Score
    from tspipe.experiments.tables import Table

_NAME = 60  # characters shown of a class's name


def show_cache(cache: "Cache | Peek") -> None:
    """Print a cache's facts on one screen."""
    manifest = cache.manifest
    dataset, teacher, features = manifest["dataset"], manifest["teacher"], manifest["features"]
    order = (*SPLITS, UNLABELLED)
    table = plain_table(("", ""))
    table.show_header, table.columns[0].style, table.columns[0].no_wrap = False, "bold", True
    for name, value in {
        "file": f"{cache.name}, {format_bytes(cache.size)}",
        "id": cache.id[:12] + ("" if cache.identified else " (as it states; not checked)"),
        "dataset": f"{dataset['name']}, {dataset['classes']} classes: {_few(cache.classes, dataset['classes'])}",
        "images": ", ".join(f"{dataset['rows'][split]:,} {split}" for split in sorted(dataset["rows"], key=order.index))
        + (f", split {held['fraction']:g} with seed {held['seed']}" if (held := dataset.get("split")) else "")
        + (" (pixels in the file)" if cache.has_images else ""),
        **_views(manifest["views"]),
        "licence": printable(dataset["license"], 400) or "not stated",
        "preprocess": _preprocess(manifest["preprocess"]),
        "teacher": f"{teacher['network']}, weights {teacher['weights_sha256'][:12]}"
        + (" (in the file" if cache.has_teacher else " (not in the file")
        + (", with its operations)" if "program_sha256" in teacher else ")"),
        "accuracy": ", ".join(f"{_accuracy(manifest, split):.2f} % {split}" for split in SPLITS),
        "features": f"{features['width']} × {DTYPE_NAMES[features['dtype']]}, logits {dataset['classes']} × float32",
        **_pool(manifest["random"]),
        "computed": "{device}, {precision}, batches of {batch_size}".format(**manifest["compute"]),
    }.items():
        table.add_row(name, Text(printable(value)))
    stdout_console().print(table)


def show_caches(folder: Path) -> None:
    """Print the caches in a folder and below it, a line each, and the files that cannot be opened."""
    table = plain_table(("name", "id", "dataset", "teacher"), ("test %", "images", "d", "dtype", "size"))
    table.columns[1].no_wrap, table.padding = True, (0, 1, 0, 0)
    if not folder.is_dir():
        raise CacheError(f"{folder} is not a folder. Name the folder of the caches: tspipe list caches FOLDER")
    problems: list[str] = []
    for path in sorted(folder.rglob("*.h5")):
        try:
            cache = open_cache(path)
        except CacheError as problem:
            problems.append(str(problem))
            continue
        manifest = cache.manifest
        dataset, features = manifest["dataset"], manifest["features"]
        texts = str(path.relative_to(folder)), cache.id[:12], dataset["name"], manifest["teacher"]["network"]
        dtype = DTYPE_NAMES[features["dtype"]].replace("float", "f")
        numbers = f"{sum(dataset['rows'].values()):,}", str(features["width"]), dtype, format_bytes(cache.size)
        table.add_row(*(Text(printable(t, 40)) for t in texts), f"{_accuracy(manifest, 'test'):.2f}", *numbers)
    out = stdout_console()
    if table.row_count:
        out.print(table)
    elif not problems:
        out.print(Text(f"There are no caches in {folder}. Make one: tspipe cache --dataset NAME"))
    for reason in problems:
        out.print(Text(printable(reason)))


def show_diff(difference: Diff) -> None:
    """Print how two caches, A and B, differ."""
    out, table = stdout_console(), plain_table(("", "A", "B"))
    for name, one, two in difference.fields:
        table.add_row(*(Text(printable(text, 100)) for text in (name, _value(one), _value(two))))
    if table.row_count:
        out.print(table)
    for split, rows in difference.splits.items():
        for line in _row_lines(rows):
            out.print(Text(printable(f"{split}: {line}", 400)))
    if difference.same:
        out.print("They hold the same.")


def show_bench(result: dict[str, Any]) -> None:
    """Print the JSON result of `tspipe bench`: a table, the machine, and advice."""
    out, table = stdout_console(), plain_table(("",), ("beside", "tspipe", "ratio", "(quartiles)", "n"))
    for line in result["lines"]:
        spread = "({lower} to {upper})".format(**{end: _ratio(line[end]) for end in ("lower", "upper")})
        times = (_seconds(line[way]) for way in ("floor", "ours"))
        table.add_row(Text(printable(line["what"])), *times, _ratio(line["ratio"]), spread, str(line["n"]))
    out.print(table)
    out.print(
        "\nEach line compares tspipe with a floor: an epoch with its test, the random images of a batch, or a batch of "
        "a cohort. step ratio: the learner's steps in tspipe's loop beside the same steps alone, on tensors in memory; "
        "bare: the same for a cohort, with one teacher pass; live: with the teacher in the loop. Times are "
        "medians of n turns; a ratio is the median over turns, with its quartiles."
    )
    for name, value in result["facts"].items():
        out.print(Text(printable(f"{name}: {value:.3g}")))
    machine = result["environment"]
    packages = ("python", "torch", "torchvision", "numpy", "h5py")
    out.print(
        "{device}, {threads} threads of {cores} cores, {processor}, {system}".format(**machine)
        + "".join(f", {name} {machine[name]}" for name in packages)
    )
    out.print(Text(f"\n{printable(result['sentence'])}"))


def show_scores(scores: "Mapping[str, Score]", classes: Sequence[str]) -> None:
    """Print how random images score with the teacher."""
    table = plain_table(("kind",), ("images", "classes", "largest", "entropy", "T. stddev"))
    for name, one in scores.items():
        largest = f"{printable(classes[one.largest], 20)} {one.share:.0%}"
        numbers = f"{one.images:,}", f"{one.classes:.1f}", largest, f"{one.entropy:.2f}", f"{one.deviation:.4f}"
        table.add_row(Text(name), *map(Text, numbers))
    out = stdout_console()
    out.print(table)
    out.print(
        f"classes: how many of the {len(classes)} the labels cover, as exp of their entropy. entropy: of the teacher's "
        "probabilities, in nats. T. stddev: of the teacher's mean probability over 640 images (arXiv 2012.02909). The "
        "smaller it is, the more images of this kind help distillation. It is small, too, where all images get one "
        "label, so compare kinds whose labels cover most classes."
    )


def show_evaluations(tables: "Sequence[Table]", notes: Sequence[str]) -> None:
    """Print the tables of `tspipe eval`, and what they show."""
    out = stdout_console()
    for content in tables:
        table = plain_table(("",), content.headings[1:])
        table.padding = (0, 1, 0, 0)
        for name, *cells in content.rows:
            table.add_row(Text(printable(name, 40)), *cells)
        out.print(table)
        out.print()
    for note in notes:
        out.print(Text(printable(note)))


def _ratio(value: float) -> str:
    """Format a ratio: 0.012, 0.98, 1.04, 12."""
    return f"{value:.2f}" if 0.1 <= value < 10 else f"{value:.2g}"


def _seconds(value: float) -> str:
    """Format a time: 9.87 µs, 12.3 ms, 4.56 s, 1:02:03."""
    if value < 1e-3:
        return f"{value * 1e6:.3g} µs"
    if value < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < 1000 else str(timedelta(seconds=round(value)))


def _row_lines(rows: SplitDiff) -> Iterator[str]:
    """Yield the differences of a split, a sentence each."""
    for side, keys in zip("AB", rows.only, strict=True):
        if keys:
            yield f"{len(keys):,} images only in {side}, first {keys[0]!r}"
    for what, keys in (("another image", rows.edited), ("another label", rows.relabelled)):
        if keys:
            yield f"{len(keys):,} keys of {what}, first {keys[0]!r}"
    if rows.moved:
        yield f"{rows.moved:,} of {rows.common:,} common images in another order"
    same = rows.common - len(rows.edited)
    if rows.features is None:
        yield "features of different widths"
    elif rows.features:
        yield f"features of {same:,} unchanged images differ by up to {rows.features:.2g}"
    if rows.logits is None:
        yield "logits of different numbers of classes"
    elif rows.logits:
        yield f"logits of {same:,} unchanged images differ by up to {rows.logits:.2g}, {rows.argmax:,} in their argmax"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value[:8])) + (", …" if len(value) > 8 else "")
    if isinstance(value, str) and len(value) == 64:  # a SHA-256
        return f"{value[:12]}…"
    if isinstance(value, dict):  # a section that the other cache has not
        return ", ".join(f"{name} {v}" for name, v in value.items())
    return "none" if value is None else str(value)


def _few(names: list[str], of: int, most: int = 5) -> str:
    return ", ".join(printable(name, _NAME) for name in names[:most]) + (", …" if of > most else "")


def _accuracy(manifest: Manifest, split: str) -> float:
    return 100 * float(manifest["teacher"]["correct"][split]) / float(manifest["dataset"]["rows"][split])


def _pool(random: dict[str, Any] | None) -> dict[str, str]:
    if not random:
        return {}
    kind = f"{random['kind']}, " if "kind" in random else ""
    balanced = ", balanced" if "rounds" in random else ""
    return {"random pool": f"{random['rows']:,} images, {kind}{random['generator']}, seed {random['seed']}{balanced}"}


def _views(views: dict[str, Any] | None) -> dict[str, str]:
    if not views:
        return {}
    shifts = "moved by up to {shift} pixels".format(**views) + (", mirrored" if views["flip"] else "")
    return {"views": f"{views['count']:,} of each training image, {shifts}, seed {views['seed']}"}


def _preprocess(fields: dict[str, Any]) -> str:
    parts = []
    if fields["resize"]:
        parts.append("resize {}×{} ({})".format(*fields["resize"], fields["interpolation"]))
    if fields["crop"]:
        parts.append(f"centre crop {fields['crop']}")
    parts += [f"mean {fields['mean']}", f"std {fields['std']}"]
    return ", ".join(parts)
