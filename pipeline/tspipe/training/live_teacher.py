"""Random images labelled live by the teacher, one batch ahead of the students."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from tspipe.data import random_images
from tspipe.models.feature_net import FeatureNet
from tspipe.models.output import Output
from tspipe.models.teacher import draws_at_random, run_teacher
from tspipe.training.random_source import RandomSource, RandomSpec
from tspipe.utils.device import to_device
from tspipe.utils.rng import seed_torch
from tspipe.utils.threads import available_cores, prefetch_map

_Labelled = tuple[Tensor, Output, torch.cuda.Event | None]  # images, the teacher's output, when it is complete
_MAX_THREADS = 4  # threads that draw images for a GPU: one alone takes 8 ms for 178 images of CIFAR's size


class LiveTeacher(RandomSource):
    """Draws random images and has the teacher label them while the students train on the previous batch.

    On a GPU the teacher runs in its own stream. On a CPU it runs ahead only where PyTorch's threads leave a core free;
    otherwise both would be slower than one after the other. A teacher that draws random numbers itself (dropout that is
    always on) is seeded for each batch and never runs ahead, because the students' dropout uses the same generator.
    """

    def __init__(self, teacher: FeatureNet, spec: RandomSpec, generator: random_images.Generator = "mt19937"):
        super().__init__(spec)
        self.teacher, self.generator = teacher, generator
        self._stream = torch.cuda.Stream(spec.device) if spec.device.type == "cuda" else None
        probe = spec.preprocess.normalise(
            torch.from_numpy(random_images.uniform(0, 0, 0, 1, spec.shape)).to(spec.device)
        )
        self._stochastic = draws_at_random(teacher, spec.preprocess.normalise(probe))
        free_cores = available_cores() if self._stream else available_cores() - torch.get_num_threads()
        self._threads = 0 if self._stochastic else min(_MAX_THREADS, free_cores)

    def batches(self, seed: int, epoch: int, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Output]]:
        if self._threads <= 0:
            for number in numbers:
                yield self.batch(seed, epoch, number)
            return
        drawn = prefetch_map(partial(self._draw, seed, epoch), numbers, self._threads)
        yield from map(self._wait_for_teacher, prefetch_map(self._label, drawn))

    def batch(self, seed: int, epoch: int, number: int) -> tuple[Tensor, Output]:
        """Return one batch, computed now."""
        images = self._draw(seed, epoch, number)
        if self._stochastic:
            seed_torch(seed, "teacher", epoch, number)
        return self._wait_for_teacher(self._label(images))

    def first_labels(self, count: int) -> Tensor:
        labels: list[Tensor] = []
        while sum(map(len, labels)) < count:
            labels.append(self.batch(0, 0, len(labels))[1].logits.argmax(1))
        return torch.cat(labels)[:count]

    def _draw(self, seed: int, epoch: int, number: int) -> Tensor:
        spec = self.spec
        if self.generator == "minstd":
            step = epoch * spec.batches_per_epoch + number
            images = random_images.congruential(seed, step, spec.count, spec.shape)
        else:
            images = random_images.uniform(seed, epoch, number, spec.count, spec.shape)
        rows = spec.local_rows(torch.from_numpy(images))
        return rows.contiguous(memory_format=torch.channels_last)  # as the image loader yields them

    def _label(self, images: Tensor) -> _Labelled:
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            self.stopwatch.start()
            images = self.spec.preprocess.normalise(to_device(images, self.spec.device))
            output = run_teacher(self.teacher, images)
            self.stopwatch.stop()
            return images, output, self._stream.record_event() if self._stream else None

    def _wait_for_teacher(self, labelled: _Labelled) -> tuple[Tensor, Output]:
        """On a GPU, make the students' stream wait for the teacher's, and keep its tensors until they are used."""
        images, output, complete = labelled
        if complete:
            students = torch.cuda.current_stream(self.spec.device)
            students.wait_event(complete)
            for tensor in (images, *output):
                tensor.record_stream(students)
        return images, output
