"""The plainest code for the work of stage two, as a floor for its times. Each item of an iterator is one repetition."""

import itertools
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from tspipe.experiments.turns import Way
from tspipe.losses import Target
from tspipe.models.feature_net import FeatureNet
from tspipe.training.batches import Batch
from tspipe.training.learner import Learner


def as_way(items: Iterator[object]) -> Way:
    """Return a way that takes the next items and drops them."""
    return lambda count: deque(itertools.islice(items, count), maxlen=0)


def bare_steps(learner: Learner, batches: Iterator[tuple[Tensor, Target]]) -> Iterator[object]:
    """Yield after each bare training step; compiled if the learner is."""
    for images, target in batches:
        learner.optimizer.zero_grad(set_to_none=True)
        _, terms = learner.model(images, target, None)
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        learner.optimizer.step()
        yield loss


def labelled(teacher: FeatureNet, batches: Iterator[tuple[Tensor, Target]]) -> Iterator[tuple[Tensor, Target]]:
    """Yield the batches with targets that the teacher computes now, as a loop without a cache does."""
    for images, target in batches:
        with torch.no_grad():
            features, logits = teacher(images.contiguous())
        yield images, Target(features, logits, target.labels)


def joined(batch: Batch) -> tuple[Tensor, Target]:
    """Return real and random images as one batch, so that joining them is not part of a floor."""
    assert batch.random is not None
    random, target, _ = batch.random
    return torch.cat([batch.images, random]), Target(*map(torch.cat, zip(batch.target, target, strict=True)))
