"""Random images and what the teacher says of them, a batch ahead of the students."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tspipe import random_images
from tspipe.distributed import cores
from tspipe.feature_net import FeatureNet
from tspipe.losses import Output
from tspipe.preprocess import Preprocess
from tspipe.randomness import seed_torch
from tspipe.teaching import draws_at_random, run_teacher
from tspipe.training import Stopwatch


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
        self._ahead = not self._draws and (self._stream is not None or torch.get_num_threads() < cores())

    def batches(self, seed: int, epoch: int, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Output]]:
        """For each of an epoch's batches normalised images (r, C, H, W), and the teacher's features and logits."""
        if not self._ahead:
            for number in numbers:
                yield self.batch(seed, epoch, number)
            return
        with ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(self._batch, seed, epoch, number) for number in numbers[:1]]
            for later in [*numbers[1:], None] if ahead else []:
                images, said, done = ahead.pop().result()
                if later is not None:
                    ahead.append(pool.submit(self._batch, seed, epoch, later))
                self._hand_over(done, images, *said)
                yield images, said

    def batch(self, seed: int, epoch: int, number: int) -> tuple[Tensor, Output]:
        """Those of one batch, now."""
        images, said, done = self._batch(seed, epoch, number)
        self._hand_over(done, images, *said)
        return images, said

    def _batch(self, seed: int, epoch: int, number: int) -> tuple[Tensor, Output, torch.cuda.Event | None]:
        if self._generator == "minstd":
            images = random_images.congruential(seed, epoch * self._of + number, self.count, self.shape)
        else:
            images = random_images.uniform(seed, epoch, number, self.count, self.shape)
        images = self._part(images)
        images = images.contiguous(memory_format=torch.channels_last)  # as the pixels come
        if self._draws:
            seed_torch(seed, "teacher", epoch, number)
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            self.watch.start()
            images = self._preprocess.normalise(images.to(self.device))
            said = run_teacher(self.teacher, images)
            self.watch.stop()
            return images, said, self._stream.record_event() if self._stream else None

    def _hand_over(self, done: torch.cuda.Event | None, *tensors: Tensor) -> None:
        """On a GPU, have the students' stream wait for the teacher's, and keep what it made until they are done."""
        if done:
            students = torch.cuda.current_stream(self.device)
            students.wait_event(done)
            for tensor in tensors:
                tensor.record_stream(students)
