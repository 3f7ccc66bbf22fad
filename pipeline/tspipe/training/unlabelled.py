"""Images without labels that taught students see beside those of each batch, with the teacher's cached targets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tspipe.cache.layout import NO_LABEL
from tspipe.data.image_loader import ImageLoader
from tspipe.data.local import open_unlabelled
from tspipe.data.preprocess import Preprocess
from tspipe.losses import Target
from tspipe.training.config import StudentConfig
from tspipe.training.targets import TargetLoader, teacher_labels
from tspipe.utils.memory import memory_limit
from tspipe.utils.rng import stream


@dataclass(frozen=True)
class UnlabelledImages:
    """The images without labels of a cache, in batches.

    Attributes:
        count: images per batch, over all processes.
    """

    images: ImageLoader
    targets: TargetLoader
    count: int

    def batches(
        self, seed: int, epoch: int, numbers: range, local_rows: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Tensor, Target]]:
        """Yield normalised images (u, C, H, W) and their targets for each of these batches of an epoch.

        Each epoch has its own order, which repeats if the epoch takes more images than there are.
        """
        shuffled = stream(seed, "unlabelled order", epoch).permutation(len(self.images))
        order = torch.from_numpy(np.resize(shuffled, numbers.stop * self.count)).split(self.count)
        rows = [local_rows(order[number]) for number in numbers]
        return zip(self.images.normalised(rows), self.targets.batches(rows), strict=True)


def open_unlabelled_images(
    config: StudentConfig, needs: frozenset[str], device: torch.device
) -> UnlabelledImages | None:
    """Open the images without labels that a run adds to its batches; None if it adds none.

    They have no label or, with `labels=teacher`, the teacher's. Raises CacheMismatch as `open_unlabelled`.
    """
    recipe, cache = config.recipe, config.cache
    if not recipe.unlabelled_images:
        return None
    images = open_unlabelled(cache, config.inputs.unlabelled, trust=config.inputs.trust)
    stored = cache.split("unlabelled")
    preprocess = Preprocess.from_dict(cache.manifest["preprocess"])
    remaining = preprocess if stored.images is None else replace(preprocess, resize=None, crop=None)
    memory = (recipe.memory or memory_limit(device)) // 6
    loader = ImageLoader(images, remaining, "unlabelled", memory, device)
    columns = {"features": stored.features, "logits": stored.logits}
    labels = teacher_labels(stored.logits) if recipe.labels == "teacher" else torch.full((len(stored),), NO_LABEL)
    return UnlabelledImages(loader, TargetLoader(columns, labels, needs, memory, device), recipe.unlabelled_images)
