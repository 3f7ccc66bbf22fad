"""Students, exports and the teachers of caches side by side: how good they are, how large and how fast."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tspipe.cache import Cache, open_cache
from tspipe.cache.match import shared_images
from tspipe.cache.read import read_keys
from tspipe.data.preprocess import Preprocess
from tspipe.deploy import latency, memory
from tspipe.deploy.classifier import Classifier
from tspipe.deploy.counts import Counts, count_module, count_onnx
from tspipe.deploy.exported import OnnxExport, load_classifier
from tspipe.deploy.fold import fold
from tspipe.deploy.labelled_images import CPU, LabelledImages, find_cache
from tspipe.deploy.latency import Latency, Run, Subject
from tspipe.deploy.memory import Peaks
from tspipe.deploy.rebuilt import RebuiltExport
from tspipe.deploy.scores import Scores, score
from tspipe.deploy.student import NetworkFiles, Student, find_network_file
from tspipe.errors import CacheMismatch, TspipeError
from tspipe.models import networks
from tspipe.models.inference import channels_last
from tspipe.models.probe import probe_images
from tspipe.models.teacher import load_teacher
from tspipe.models.weights import class_difference
from tspipe.recipes.load import recipe_for_cache
from tspipe.utils.progress import progress, warn
from tspipe.utils.threads import available_cores

_BATCH = 64


@dataclass(frozen=True)
class Evaluation:
    """A line of `tspipe eval`.

    Attributes:
        name: of the student's or the export's file; the teacher's network.
        predicted: the predicted classes (n,) int64 of the test images, and `confidence` (n,), their probabilities.
        counts: the sizes of the network, of a student after folding.
        size: of the file in bytes; of a teacher, of its weights in the cache.
        latency: empty if not measured, and for a teacher that cannot be run.
        memory: peaks in bytes by batch size; empty like `latency`, and where the system does not tell them.
    """

    name: str
    scores: Scores
    predicted: Tensor
    confidence: Tensor
    counts: Counts
    size: int | None
    latency: list[Latency] = field(default_factory=list)
    memory: Peaks = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    """A classifier or a cache's teacher, and how it is run; `subject` is None for a teacher that cannot be built."""

    name: str
    path: Path
    images: LabelledImages
    subject: Subject | None
    counts: Counts
    size: int | None
    probabilities: Tensor | None = None  # (n, c), of a teacher


def evaluate(
    tests: Sequence[LabelledImages],
    classifiers: Sequence[Classifier],
    seconds: float = 0.5,
    network: NetworkFiles = None,
) -> list[Evaluation]:
    """Compare classifiers with each other and with the teachers of caches, which come first, on their test images.

    Args:
        tests: the test images of the caches. The agreement is that with the teacher of the first one.
        classifiers: each is tested on the images of the first cache that has its preprocessing.
        seconds: how long to measure each latency; 0 to measure neither latency nor memory.
        network: the paths of the networks that are users', of classifiers and of teachers.

    Raises CacheMismatch if the caches differ in their test images, or a classifier has other classes or another
    preprocessing than they.
    """
    _check_same(tests)
    entries = [_teacher_entry(test, network, several=len(tests) > 1) for test in tests]
    entries += [_entry(classifier, _images_for(classifier, tests)) for classifier in classifiers]
    probabilities = _probabilities(entries)
    measured = [i for i, entry in enumerate(entries) if entry.subject and seconds]
    latencies = latency.measure([subject for i in measured if (subject := entries[i].subject)], seconds)
    peaks = memory.measure([(entries[i].path, network) for i in measured])
    costs = dict(zip(measured, zip(latencies, peaks, strict=True), strict=True))
    labels, teacher_labels = tests[0].labels, probabilities[0].argmax(1)
    evaluations = []
    for i, (entry, rows) in enumerate(zip(entries, probabilities, strict=True)):
        confidence, predicted = rows.max(1)
        scores = score(rows, labels, teacher_labels)
        cost = costs.get(i, ([], {}))
        evaluations.append(Evaluation(entry.name, scores, predicted, confidence, entry.counts, entry.size, *cost))
    return evaluations


def as_json(evaluation: Evaluation, classes: Sequence[str]) -> dict[str, Any]:
    """Return an evaluation for `json.dumps`, without the predictions."""
    worst = {classes[label]: value for label, value in evaluation.scores.worst_classes}
    return {
        "name": evaluation.name,
        "scores": {**evaluation.scores._asdict(), "worst_classes": worst},
        **evaluation.counts._asdict(),
        "size": evaluation.size,
        "memory": evaluation.memory,
        "latency": [each._asdict() for each in evaluation.latency],
    }


def leak_remarks(classifiers: Sequence[Classifier], tests: Sequence[LabelledImages]) -> list[str]:
    """Return a sentence on each classifier of another cache that was trained on the test images, or may have been."""
    test, ids = tests[0].cache, [each.cache.id for each in tests]
    remarks = []
    for name, cache_id in ((one.name, one.facts.cache) for one in classifiers if one.facts.cache not in ids):
        try:
            shared = int(shared_images(test.test, find_cache(cache_id).train).sum())
        except CacheMismatch:
            remarks.append(
                f"{name} was trained from another cache than {test.name}, {cache_id[:12]}, which is not in cache/. If "
                "its training images are among these test images, its scores are too high."
            )
        else:
            if shared:
                remarks.append(f"{shared:,} of the test images are training images of {name}: its scores are too high.")
    return remarks


def open_subject(path: Path, network: NetworkFiles) -> Subject:
    """Return what `evaluate` measures of a classifier's file, or of a cache."""
    if path.suffix != ".h5":
        return _subject(load_classifier(path, network=network))[0]
    subject, _ = _teacher(open_cache(path), network)
    if subject is None:
        raise CacheMismatch(f"The teacher of {path} cannot be built.")
    return subject


def _check_same(tests: Sequence[LabelledImages]) -> None:
    first = tests[0].cache
    for other in (test.cache for test in tests[1:]):
        same = other.classes == first.classes and np.array_equal(other.test.labels, first.test.labels)
        if not same or read_keys(other.test) != read_keys(first.test):
            raise CacheMismatch(f"{other.name} has other test images than {first.name}. Evaluate them one at a time.")


def _images_for(classifier: Classifier, tests: Sequence[LabelledImages]) -> LabelledImages:
    """Return the images with the classifier's preprocessing."""
    names = " and ".join(test.cache.name for test in tests)
    if classifier.facts.classes != tests[0].cache.classes:
        difference = class_difference(classifier.facts.classes, tests[0].cache.classes)
        raise CacheMismatch(
            f"{classifier.name} has other classes than {names}: {difference}. Evaluate it with its own cache."
        )
    for test in tests:
        if classifier.facts.preprocess.as_dict() == test.cache.manifest["preprocess"]:
            return test
    raise CacheMismatch(
        f"{classifier.name} has another preprocessing than {names}. Name its cache, too: tspipe eval … FILE.h5"
    )


def _entry(classifier: Classifier, images: LabelledImages) -> _Entry:
    subject, counts = _subject(classifier)
    return _Entry(classifier.name, classifier.path, images, subject, counts, classifier.path.stat().st_size)


def _subject(classifier: Classifier) -> tuple[Subject, Counts]:
    facts = classifier.facts
    image = probe_images(facts.input_shape)[:1]
    if isinstance(classifier, OnnxExport):
        path = classifier.path
        return Subject(lambda threads: OnnxExport(path, threads).probabilities, facts.input_shape), count_onnx(path)
    if isinstance(classifier, RebuiltExport):
        image = (255 * image).byte().permute(0, 2, 3, 1) if classifier.uint8 else image
        counts = count_module(channels_last(classifier.module), image)
        return Subject(lambda _: classifier.probabilities, facts.input_shape), counts
    if isinstance(classifier, Student):
        module = channels_last(fold(classifier))
        return Subject(lambda _: _run(module, facts.preprocess), facts.input_shape), count_module(module, image)
    return Subject(lambda _: classifier.probabilities, facts.input_shape), Counts()


def _run(logits: Run, preprocess: Preprocess) -> Run:
    """Return a function from pixels to probabilities, of one from normalised images to logits."""
    return torch.inference_mode()(lambda pixels: logits(preprocess.normalise(pixels)).softmax(1))


def _teacher_entry(test: LabelledImages, network: NetworkFiles, *, several: bool) -> _Entry:
    cache = test.cache
    name = f"teacher {cache.manifest['teacher']['network']}" + (f" ({cache.path.stem})" if several else "")
    subject, counts = _teacher(cache, network)
    probabilities = torch.from_numpy(cache.test.logits.load()).softmax(1)
    return _Entry(name, cache.path, test, subject, counts, cache.dimensions.weights_bytes or None, probabilities)


def _teacher(cache: Cache, network: NetworkFiles) -> tuple[Subject | None, Counts]:
    """Return the cache's teacher; None, and a warning, if it cannot be built."""
    name = cache.manifest["teacher"]["network"]
    file = find_network_file(name, network)
    if networks.is_user_network(name) and not file and "program_sha256" not in cache.manifest["teacher"]:
        warn(f"The teacher of {cache.name} is not measured without its network's file: --network ./{name}.py")
        return None, Counts()
    try:
        recipe, _ = recipe_for_cache(cache.name, cache.manifest, None, None, {"teacher.network": file})
        shape = tuple(cache.manifest["teacher"]["options"]["input_shape"])
        teacher = load_teacher(cache, recipe, shape, CPU)
    except TspipeError as error:  # a cache may lack its teacher, or the teacher its library
        warn(f"The teacher of {cache.name} is not measured: {error}")
        return None, Counts()
    run = _run(lambda images: teacher(images).logits, Preprocess.from_dict(cache.manifest["preprocess"]))
    return Subject(lambda _: run, shape), count_module(teacher, probe_images(shape)[:1])


def _probabilities(entries: Sequence[_Entry]) -> list[Tensor]:
    """Return the probabilities (n, c) of all test images by each entry."""
    parts: list[list[Tensor]] = [[] for _ in entries]
    todo = [(entry, rows) for entry, rows in zip(entries, parts, strict=True) if entry.probabilities is None]
    tests = {id(entry.images): entry.images for entry, _ in todo}
    with progress("evaluating", sum(len(test.labels) for test in tests.values()), "images") as advance:
        for test in tests.values():
            runs = [(e.subject.load(available_cores()), rows) for e, rows in todo if e.images is test and e.subject]
            for pixels, _ in test.batches(_BATCH):
                for run, rows in runs:
                    rows.append(run(pixels))
                advance(len(pixels), "evaluating")
    return [
        torch.cat(rows) if entry.probabilities is None else entry.probabilities
        for entry, rows in zip(entries, parts, strict=True)
    ]
