"""The plainest code for what stage two does, to be timed beside it: step by step, as its next item is taken."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from tspipe.losses import Target
from tspipe.models.feature_net import FeatureNet
from tspipe.training.batches import Batch
from tspipe.training.learner import Learner

T = TypeVar("T")
Way = Callable[[int], object]  # does so many of what it is the way to do


def endless(items: Callable[[], Iterable[T]]) -> Iterator[T]:
    """The items again and again, made anew each time."""
    while True:
        yield from items()


def taken(items: Iterator[object]) -> Way:
    """The way to do what is done when the next item is taken; the items are dropped."""
    return lambda count: deque(itertools.islice(items, count), maxlen=0)


def bare_steps(learner: Learner, batches: Iterator[tuple[Tensor, Target]]) -> Iterator[object]:
    """Bare training steps, each when the next item is taken; compiled where the learner is."""
    for images, target in batches:
        learner.optimizer.zero_grad(set_to_none=True)
        _, terms = learner.trained(images, target, None)
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        learner.optimizer.step()
        yield loss


def bare_tests(learner: Learner, batches: Iterator[Tensor]) -> Iterator[object]:
    """Bare test forwards, each when the next item is taken."""
    for images in batches:
        with torch.no_grad():
            output = learner.network(images)
        yield output


def labelled(teacher: FeatureNet, batches: Iterator[tuple[Tensor, Target]]) -> Iterator[tuple[Tensor, Target]]:
    """What one would write without a cache: the teacher labels every batch."""
    for images, target in batches:
        with torch.no_grad():
            features, logits = teacher(images.contiguous())
        yield images, Target(features, logits, target.labels)


def joined(batch: Batch) -> tuple[Tensor, Target]:
    """Real and random images as one batch, so that joining them is no part of a floor."""
    assert batch.random is not None
    random, target = batch.random
    return torch.cat([batch.images, random]), Target(*map(torch.cat, zip(batch.target, target, strict=True)))
