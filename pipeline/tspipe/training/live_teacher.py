"""Random images labelled live by the teacher, one batch ahead of the students."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tspipe.data.random_images import minstd
from tspipe.data.random_images.balanced import choose
from tspipe.models.feature_net import FeatureNet
from tspipe.models.output import Output
from tspipe.models.teacher import draws_at_random, run_teacher
from tspipe.training.random_source import LiveSpec, RandomBatch, RandomLabels, RandomSource, RandomSpec, draw
from tspipe.utils.device import to_device
from tspipe.utils.rng import seed_torch, stream
from tspipe.utils.threads import available_cores, prefetch_map

_Images = tuple[Tensor, Tensor]  # images and the labels that they have of their own, see `RandomBatch`
Drawn = tuple[_Images, Iterator[_Images]]  # the images of a batch, and further candidates for it
_Labelled = tuple[RandomBatch, torch.cuda.Event | None]  # a batch, and when the teacher's output is complete
_MAX_THREADS = 4  # threads that draw images for a GPU: one alone takes 8 ms for 178 images of CIFAR's size
_PURPOSE = "random images"


class LiveTeacher(RandomSource):
    """Draws random images and has the teacher label them while the students train on the previous batch.

    On a GPU the teacher runs in its own stream. On a CPU it runs ahead only where PyTorch's threads leave a core free;
    otherwise both would be slower than one after the other. A teacher that draws random numbers itself (dropout that is
    always on) is seeded for each batch and never runs ahead, because the students' dropout uses the same generator.
    """

    def __init__(self, teacher: FeatureNet, spec: RandomSpec, live: LiveSpec):
        super().__init__(spec)
        self.teacher, self.live = teacher, live
        self._stream = torch.cuda.Stream(spec.device) if spec.device.type == "cuda" else None
        probe = torch.from_numpy(stream(0, "probe").random((1, *spec.shape), dtype=np.float32)).to(spec.device)
        self._stochastic = draws_at_random(teacher, spec.preprocess.normalise(probe))
        free_cores = available_cores() if self._stream else available_cores() - torch.get_num_threads()
        self._threads = 0 if self._stochastic else min(_MAX_THREADS, free_cores)

    def batches(self, seed: int, epoch: int, numbers: Sequence[int]) -> Iterator[RandomBatch]:
        if self._threads <= 0:
            for number in numbers:
                yield self.batch(seed, epoch, number)
            return
        drawn = prefetch_map(partial(self._draw, seed, epoch), numbers, self._threads)
        yield from map(self._wait_for_teacher, prefetch_map(self._label, drawn))

    def batch(self, seed: int, epoch: int, number: int) -> RandomBatch:
        """Return one batch, computed now."""
        images = self._draw(seed, epoch, number)
        if self._stochastic:
            seed_torch(seed, "teacher", epoch, number)
        return self._wait_for_teacher(self._label(images))

    def first_labels(self, count: int) -> RandomLabels:
        labels = list[RandomLabels]()
        while sum(len(part.labels) for part in labels) < count:
            batch = self.batch(0, 0, len(labels))
            labels.append(self._balanced if self.live.rounds else RandomLabels(batch.output.logits.argmax(1)))
        if self.live.rounds:
            return RandomLabels(*map(torch.cat, zip(*labels, strict=True)))
        return RandomLabels(torch.cat([part.labels for part in labels])[:count])

    def _draw(self, seed: int, epoch: int, number: int) -> Drawn:
        """Draw a batch; images that are to be balanced have further rounds of candidates, drawn when they are used."""
        rounds = self._rounds(seed, epoch, number)
        return next(rounds), rounds

    def _rounds(self, seed: int, epoch: int, number: int) -> Iterator[_Images]:
        spec, kind, generator = self.spec, self.live.kind(seed), stream(seed, _PURPOSE, epoch, number)
        while True:
            if self.live.generator == "minstd":
                size = spec.count * kind.draws
                step = epoch * spec.batches_per_epoch + number
                numbers = minstd.numbers(seed, _PURPOSE, step * size, size).reshape(spec.count, kind.draws)
            else:
                numbers = kind.numbers(generator, spec.count)
            if not self.live.rounds:  # balancing needs the candidates of all processes
                numbers = spec.local_rows(torch.from_numpy(numbers)).numpy()
            yield draw(kind, numbers)

    def _label(self, drawn: Drawn) -> _Labelled:
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            self.stopwatch.start()
            first, rounds = drawn
            batch = self._balance(first, rounds) if self.live.rounds else self._run_teacher(*first)
            self.stopwatch.stop()
            return batch, self._stream.record_event() if self._stream else None

    def _run_teacher(self, images: Tensor, labels: Tensor) -> RandomBatch:
        images, labels = to_device(images, self.spec.device), to_device(labels, self.spec.device)
        images = self.spec.preprocess.normalise(images)
        return RandomBatch(images, run_teacher(self.teacher, images), labels)

    def _balance(self, first: _Images, rounds: Iterator[_Images]) -> RandomBatch:
        """Run the teacher on rounds of candidates; return this process's part of those whose labels spread evenly."""
        assert self.live.rounds
        labelled: list[RandomBatch] = []

        def label(number: int) -> NDArray[np.int64]:
            labelled.append(self._run_teacher(*(next(rounds) if number else first)))
            labels: NDArray[np.int64] = labelled[-1].output.logits.argmax(1).cpu().numpy()
            return labels

        chosen, candidates = map(torch.from_numpy, choose(label, len(first[0]), self.live.classes, self.live.rounds))
        self._balanced = RandomLabels(candidates[chosen], candidates)  # of the last batch
        rows = self.spec.local_rows(chosen).to(self.spec.device)
        images, outputs, labels = zip(*labelled, strict=True)
        output = Output(*(torch.cat(parts)[rows] for parts in zip(*outputs, strict=True)))
        chosen_images = torch.cat(images)[rows].contiguous(memory_format=torch.channels_last)
        return RandomBatch(chosen_images, output, torch.cat(labels)[rows])

    def _wait_for_teacher(self, labelled: _Labelled) -> RandomBatch:
        """On a GPU, make the students' stream wait for the teacher's, and keep its tensors until they are used."""
        batch, complete = labelled
        if complete:
            students = torch.cuda.current_stream(self.spec.device)
            students.wait_event(complete)
            for tensor in (batch.images, *batch.output, batch.labels):
                tensor.record_stream(students)
        return batch
