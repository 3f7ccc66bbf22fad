"""Scores every kind of random images with the teacher of a cache, before any student is trained."""

import numpy as np

from tspipe.cache import Cache
from tspipe.data.image_loader import open_images
from tspipe.data.random_images import KINDS, Photos, make
from tspipe.data.random_images.score import Score, score
from tspipe.extraction import forward
from tspipe.extraction.pool_blocks import reader
from tspipe.extraction.verify import VerifyConfig, open_teacher
from tspipe.utils.device import pick_device, use_full_precision
from tspipe.utils.progress import progress
from tspipe.utils.rng import stream

IMAGES = 1024  # of each kind


def stored_scores(cache: Cache) -> dict[str, Score]:
    """Return the scores of the training images and of the random pool, from what the file holds."""
    views, count = cache.dimensions.views_of("train"), len(cache.train)
    rows = np.sort(stream(0, "scored images").permutation(count)[:IMAGES]) * views
    scores = {"training images": score(cache.train.logits.take(rows))} if count > 1 else {}
    if cache.random is not None and len(cache.random) > 1:
        scores["random pool"] = score(cache.random.logits[:IMAGES])
    return scores


def score_kinds(cache: Cache, config: VerifyConfig) -> dict[str, Score]:
    """Run the teacher on some images of each kind, and return the scores by name; those of the file come first."""
    use_full_precision()
    dataset, preprocess = open_images(cache, lambda: config.dataset(cache))
    teacher = open_teacher(cache, config, dataset, preprocess, pick_device(config.recipe.device))
    shape: tuple[int, int, int] = tuple(cache.manifest["teacher"]["options"]["input_shape"])
    views, size = config.recipe.views, cache.manifest["compute"]["batch_size"]
    photos = Photos(len(dataset.train), reader(dataset.train, preprocess), views.shift, views.flip)
    scores = stored_scores(cache)
    with progress("random images", len(KINDS) * IMAGES, "images") as advance:
        for name in KINDS:
            kind, generator, logits = make(name, shape, photos), stream(0, "scored images"), []
            for start in range(0, IMAGES, size):
                count = min(size, IMAGES - start)
                pixels = kind.images(kind.numbers(generator, count)).transpose(0, 2, 3, 1)
                logits.append(forward.run_teacher_on_blocks(teacher, preprocess, size, pixels, name, start)[1])
                advance(count, name)
            scores[name] = score(np.concatenate(logits))
    return scores
