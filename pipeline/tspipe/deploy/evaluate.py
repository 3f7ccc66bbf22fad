"""Students and exports side by side with their teacher: how good they are, how large and how fast."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tspipe.cache import Cache
from tspipe.deploy import latency
from tspipe.deploy.classifier import Classifier
from tspipe.deploy.fold import count_parameters, fold
from tspipe.deploy.labelled_images import CPU, LabelledImages
from tspipe.deploy.latency import Latency
from tspipe.deploy.scores import Scores, score
from tspipe.deploy.student import Student
from tspipe.errors import CacheMismatch, TspipeError
from tspipe.models.teacher import load_teacher
from tspipe.recipes.load import recipe_for_cache
from tspipe.utils.progress import progress

BATCH_SIZES = (1, 32)
_BATCH = 64
Run = Callable[[Tensor], Tensor]  # images (n, C, H, W) uint8 to probabilities (n, c)


@dataclass(frozen=True)
class Evaluation:
    """A line of `tspipe eval`.

    Attributes:
        name: of the student's or the export's file; the teacher's network.
        parameters: number of weights, of a student after folding; None if unknown, as an export's.
        size: of the file in bytes; of a teacher, of its weights in the cache.
        latency: by batch size; empty for a teacher that cannot be run.
    """

    name: str
    scores: Scores
    parameters: int | None
    size: int | None
    latency: dict[int, Latency]


def evaluate(classifiers: Sequence[Classifier], test: LabelledImages, seconds: float = 1.0) -> list[Evaluation]:
    """Compare classifiers with the teacher of a cache, which comes first, on the test images of the cache.

    Students are folded first, as an export is. Latency is measured for about `seconds` for each batch size. Raises
    CacheMismatch for a classifier of other classes or another preprocessing than the cache's.
    """
    for classifier in classifiers:
        _check(classifier, test.cache)
    teacher_logits = torch.from_numpy(test.cache.test.logits.load())
    teacher_labels = teacher_logits.argmax(1)
    prepared = [_prepare(classifier) for classifier in classifiers]
    runs = [run for run, _ in prepared]
    probabilities = [teacher_logits.softmax(1), *_probabilities(runs, test)]
    teacher_run, teacher_parameters = _teacher(test)
    timed = [teacher_run, *runs] if teacher_run else runs
    shape = test.images.shape
    measured = [latency.measure(timed, shape, batch_size, seconds) for batch_size in BATCH_SIZES]
    latencies = [dict(zip(BATCH_SIZES, each, strict=True)) for each in zip(*measured, strict=True)]
    latencies = latencies if teacher_run else [{}, *latencies]
    manifest = test.cache.manifest
    names = [f"teacher {manifest['teacher']['network']}", *(classifier.name for classifier in classifiers)]
    parameters = [teacher_parameters, *(count for _, count in prepared)]
    sizes = [test.cache.dimensions.weights_bytes or None, *(one.path.stat().st_size for one in classifiers)]
    scores = [score(each, test.labels, teacher_labels) for each in probabilities]
    return [Evaluation(*fields) for fields in zip(names, scores, parameters, sizes, latencies, strict=True)]


def _check(classifier: Classifier, cache: Cache) -> None:
    if classifier.facts.classes != cache.classes:
        raise CacheMismatch(f"{classifier.name} has other classes than {cache.name}.")
    if classifier.facts.preprocess.as_dict() != cache.manifest["preprocess"]:
        raise CacheMismatch(f"{classifier.name} has another preprocessing than {cache.name}.")


def _prepare(classifier: Classifier) -> tuple[Run, int | None]:
    """Return a function from pixels to probabilities, and the number of weights that it uses, if known."""
    if not isinstance(classifier, Student):
        return classifier.probabilities, None
    module, preprocess = fold(classifier), classifier.preprocess
    run = torch.inference_mode()(lambda pixels: module(preprocess.normalise(pixels)).softmax(1))
    return run, count_parameters(module)


def _probabilities(runs: Sequence[Run], test: LabelledImages) -> list[Tensor]:
    """Return the probabilities (n, c) of all test images by each function."""
    parts: list[list[Tensor]] = [[] for _ in runs]
    with progress("evaluating", len(test.labels), "images") as advance:
        for pixels, _ in test.batches(_BATCH):
            for run, rows in zip(runs, parts, strict=True):
                rows.append(run(pixels))
            advance(len(pixels), "evaluating")
    return [torch.cat(rows) for rows in parts]


def _teacher(test: LabelledImages) -> tuple[Run | None, int | None]:
    """Return the cache's teacher, to measure its latency, and its number of weights; None if it cannot be built."""
    cache = test.cache
    try:
        recipe, _ = recipe_for_cache(cache.name, cache.manifest, None, None, {})
        network = load_teacher(cache, recipe, test.images.shape, CPU)
    except TspipeError:  # a cache may lack its teacher, and a user's network needs its file
        return None, None
    run = torch.inference_mode()(lambda pixels: network(test.preprocess.normalise(pixels)).logits.softmax(1))
    return run, count_parameters(network)
