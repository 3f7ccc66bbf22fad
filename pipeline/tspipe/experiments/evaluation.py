"""What `tspipe eval` shows: tables, and one HTML page with a Pareto plot, confusions and the worst mistakes."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from tspipe.cache.read import read_keys
from tspipe.deploy.evaluate import Evaluation
from tspipe.deploy.labelled_images import LabelledImages
from tspipe.experiments import figures, html
from tspipe.experiments.pareto import Point, pareto
from tspipe.experiments.tables import Table
from tspipe.training.run_folder import environment
from tspipe.utils.console import format_bytes, format_count, pluralize
from tspipe.utils.files import write_whole, writing
from tspipe.utils.threads import available_cores

_MOST_CLASSES = 20  # of a confusion matrix
_MISTAKES, _PAIRS, _THUMBNAIL = 12, 20, 96  # images and pairs of classes of a model; pixels


class Mistake(NamedTuple):
    """A wrong prediction: the image's key, its class, the predicted one, its probability, and the image as a URI."""

    key: str
    label: str
    predicted: str
    confidence: float
    uri: Markup


class Section(NamedTuple):
    """What the page shows of a model below the tables.

    Attributes:
        confusion: for each class, the fractions of its images that are predicted as each; empty for over 20 classes.
        pairs: a class, another that is predicted, and the number of images; the most frequent first.
    """

    name: str
    confusion: list[list[float]]
    pairs: list[tuple[str, str, int]]
    mistakes: list[Mistake]


def quality(evaluations: Sequence[Evaluation]) -> Table:
    """Return the scores in percent, and the sizes."""
    headings = ["", "top-1", "top-5", "F1", "ECE", "agree", "weights", "MACs", "size"]
    rows = []
    for one in evaluations:
        scores = one.scores
        fractions = scores.top1, scores.top5, scores.macro_f1, scores.calibration_error, scores.agreement
        texts = ["" if value is None else f"{100 * value:.1f}" for value in fractions]
        counts = ["" if count is None else format_count(count) for count in one.counts]
        rows.append([one.name, *texts, *counts, _bytes(one.size)])
    return Table("Quality and size", headings, rows, names=1)


def speed(evaluations: Sequence[Evaluation]) -> Table:
    """Return the latencies in milliseconds and the memory, a row per batch size; no rows if nothing was measured."""
    threads = sorted({each.threads for one in evaluations for each in one.latency})
    headings = [heading for count in threads for heading in (pluralize(count, "thread"), "95 %")]
    rows = []
    for one in evaluations:
        for size in sorted({each.batch_size for each in one.latency}):
            of_size = sorted((each for each in one.latency if each.batch_size == size), key=lambda each: each.threads)
            times = [_milliseconds(value) for each in of_size for value in (each.median, each.p95)]
            rows.append([one.name, str(size), *times, _bytes(one.memory.get(size))])
    return Table("Milliseconds and memory", ["", "images", *headings, "memory"], rows, names=1)


def tables(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Return the tables that have rows."""
    return [table for table in (quality(evaluations), speed(evaluations)) if table.rows]


def notes(evaluations: Sequence[Evaluation], test: LabelledImages, remarks: Sequence[str] = ()) -> list[str]:
    """Return the worst classes of each model, and sentences on what the tables show."""
    classes = test.cache.classes
    worst = [
        f"Worst classes of {one.name}: "
        + ", ".join(f"{classes[i]} {value:.0%}" for i, value in one.scores.worst_classes)
        for one in evaluations
    ]
    sentences = (
        f"{len(test.labels):,} test images of {test.cache.name}. In percent: top-1 and top-5 accuracy, macro F1, "
        "expected calibration error (ECE), agreement with the first teacher. Weights and multiply-adds of one image "
        "(MACs): after folding."
    )
    if any(one.latency for one in evaluations):
        machine = environment("cpu", available_cores())
        sentences += (
            " Milliseconds from pixels to probabilities: the median and the 95th percentile. Memory: the peak of a new "
            "process, beyond Python and the libraries. Measured on "
            f"{machine['processor']}, {machine['cores']} cores, with torch {machine['torch']}."
        )
    return [*worst, *remarks, sentences]


def write(
    path: Path, evaluations: Sequence[Evaluation], tests: Sequence[LabelledImages], remarks: Sequence[str] = ()
) -> None:
    """Write the page. Raises ReportError without matplotlib."""
    points, axis = _points(evaluations)
    dataset = tests[0].cache.manifest["dataset"]["name"]
    drawing = figures.render("pareto", lambda figure: pareto(figure, points, axis, dataset))
    page = html.render(
        "evaluation.html.jinja",
        dataset=dataset,
        tables=tables(evaluations),
        notes=notes(evaluations, tests[0], remarks),
        classes=tests[0].cache.classes,
        svg=html.svg(drawing, 1),
        caption=drawing.caption,
        sections=[_section(one, tests[0]) for one in evaluations],
    )
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode())


def _milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _bytes(count: int | None) -> str:
    return "" if count is None else format_bytes(count).replace("bytes", "B")


def _points(evaluations: Sequence[Evaluation]) -> tuple[list[Point], str]:
    """Return the points of the plot: by latency if it was measured, else by multiply-adds; and its axis."""
    if any(one.latency for one in evaluations):
        axis = "milliseconds for one image, one thread"
        xs: list[float | None] = [one.latency[0].median if one.latency else None for one in evaluations]
    else:
        axis = "multiply-adds for one image"
        xs = [one.counts.multiply_adds for one in evaluations]
    pairs = zip(evaluations, xs, strict=True)
    return [Point(one.name, x, one.scores.top1) for one, x in pairs if x], axis


def _section(one: Evaluation, test: LabelledImages) -> Section:
    labels, classes = test.labels, test.cache.classes
    counts = torch.bincount(labels * len(classes) + one.predicted, minlength=len(classes) ** 2)
    counts = counts.view(len(classes), len(classes))
    fractions = counts / counts.sum(1, keepdim=True).clamp(min=1)
    wrong = counts.clone().fill_diagonal_(0).flatten()
    most = wrong.topk(min(_PAIRS, len(wrong)))
    pairs = [
        (classes[i // len(classes)], classes[i % len(classes)], count)
        for i, count in zip(most.indices.tolist(), most.values.tolist(), strict=True)
        if count
    ]
    return Section(one.name, fractions.tolist() if len(classes) <= _MOST_CLASSES else [], pairs, _mistakes(one, test))


def _mistakes(one: Evaluation, test: LabelledImages) -> list[Mistake]:
    """Return the wrong predictions of the highest probability."""
    wrong = (one.predicted != test.labels).nonzero()[:, 0]
    rows = wrong[one.confidence[wrong].argsort(descending=True, stable=True)[:_MISTAKES]]
    if not len(rows):
        return []
    keys, classes = read_keys(test.cache.test), test.cache.classes
    (pixels,) = test.images.batches([rows])
    return [
        Mistake(keys[row], classes[label], classes[predicted], confidence, _uri(image))
        for row, label, predicted, confidence, image in zip(
            rows.tolist(),
            test.labels[rows].tolist(),
            one.predicted[rows].tolist(),
            one.confidence[rows].tolist(),
            pixels,
            strict=True,
        )
    ]


def _uri(pixels: Tensor) -> Markup:
    """Return an image (C, H, W) uint8 as the data: URI of a JPEG of at most 96 pixels."""
    array = pixels.permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling=0)
    # Text in a page is shortened; Markup is not.
    return Markup(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}")
