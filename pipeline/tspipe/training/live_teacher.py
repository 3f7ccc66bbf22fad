"""Random images and what the teacher says of them, a batch ahead of the students."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from tspipe.data import random_images
from tspipe.data.preprocess import Preprocess
from tspipe.models.feature_net import FeatureNet
from tspipe.models.output import Output
from tspipe.models.teacher import draws_at_random, run_teacher
from tspipe.utils.device import sent
from tspipe.utils.rng import seed_torch
from tspipe.utils.threads import ahead, cores
from tspipe.utils.timing import Stopwatch

_Labelled = tuple[Tensor, Output, torch.cuda.Event | None]  # images, what was said of them, when that is done
_DRAWING = 4  # threads at most that draw ahead of a GPU: one alone takes 8 ms for 178 images of CIFAR's size


class LiveTeacher:
    """Draws `count` random images a batch and lets the teacher label them while the students learn from the last ones.

    On a GPU it does so in a stream of its own. It goes ahead on a CPU where PyTorch's threads leave a core to it: for
    the same cores both would be slower than one after the other. A teacher that draws random numbers too is seeded for
    each batch, and never goes ahead: the students' dropout draws from the same generator.

    Where several processes split a batch, `part` is what this one takes of it. `generator` is what draws the images. Of
    MINSTD's one stream each batch takes what those before it have left, so it has to know how many an epoch has: `of`.

    Attributes:
        watch: how long the teacher took; beside the students, not in addition.
    """

    def __init__(
        self,
        teacher: FeatureNet,
        preprocess: Preprocess,
        count: int,
        shape: tuple[int, int, int],
        device: torch.device,
        part: Callable[[Tensor], Tensor] = lambda images: images,
        generator: random_images.Generator = "mt19937",
        of: int = 0,
    ):
        self._generator, self._of = generator, of
        self.count, self.shape, self.device, self.watch = count, shape, device, Stopwatch(device)
        self.teacher, self._preprocess, self._part = teacher, preprocess, part
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        probe = preprocess.normalise(random_images.uniform(0, 0, 0, 1, shape).to(device))
        self._draws = draws_at_random(teacher, probe)
        spare = cores() if self._stream else cores() - torch.get_num_threads()
        self._threads = 0 if self._draws else min(_DRAWING, spare)  # that draw ahead

    def batches(self, seed: int, epoch: int, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Output]]:
        """For each of an epoch's batches normalised images (r, C, H, W), and the teacher's features and logits."""
        if self._threads <= 0:
            for number in numbers:
                yield self.batch(seed, epoch, number)
            return
        drawn = ahead(partial(self._draw, seed, epoch), numbers, self._threads)
        yield from map(self._handed_over, ahead(self._label, drawn))

    def batch(self, seed: int, epoch: int, number: int) -> tuple[Tensor, Output]:
        """Those of one batch, now."""
        images = self._draw(seed, epoch, number)
        if self._draws:
            seed_torch(seed, "teacher", epoch, number)
        return self._handed_over(self._label(images))

    def _draw(self, seed: int, epoch: int, number: int) -> Tensor:
        if self._generator == "minstd":
            images = random_images.congruential(seed, epoch * self._of + number, self.count, self.shape)
        else:
            images = random_images.uniform(seed, epoch, number, self.count, self.shape)
        return self._part(images).contiguous(memory_format=torch.channels_last)  # as the pixels come

    def _label(self, images: Tensor) -> _Labelled:
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            self.watch.start()
            images = self._preprocess.normalise(sent(images, self.device))
            said = run_teacher(self.teacher, images)
            self.watch.stop()
            return images, said, self._stream.record_event() if self._stream else None

    def _handed_over(self, labelled: _Labelled) -> tuple[Tensor, Output]:
        """On a GPU, have the students' stream wait for the teacher's, and keep what it made until they are done."""
        images, said, done = labelled
        if done:
            students = torch.cuda.current_stream(self.device)
            students.wait_event(done)
            for tensor in (images, *said):
                tensor.record_stream(students)
        return images, said
