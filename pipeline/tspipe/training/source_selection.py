"""Selects and opens the source of a run's random images: the live teacher or the random pool of the cache."""

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from tspipe.cache import Cache
from tspipe.data.random_images import Kind, make, pool
from tspipe.data.random_images.minstd import period_warning
from tspipe.errors import CacheMismatch
from tspipe.models.feature_net import FeatureNet
from tspipe.models.teacher import check_teacher, lacks_teacher, load_teacher
from tspipe.recipes.schema import Recipe
from tspipe.training.batches import shuffled_batches
from tspipe.training.config import StudentConfig
from tspipe.training.live_teacher import LiveTeacher
from tspipe.training.partition import Partition
from tspipe.training.random_pool import RandomPool
from tspipe.training.random_source import LiveSpec, RandomSource, RandomSpec
from tspipe.training.run_data import RunData
from tspipe.utils.progress import warn


def without_live_teacher(recipe: Recipe, cache: Cache) -> tuple[Recipe, str]:
    """Return a recipe that needs no live teacher if the cache's cannot be built, and a sentence that says what changed.

    Random images then come from the cache's random pool or, if it has none, are left out.
    """
    if not recipe.random_images or recipe.random_source == "pool" or not lacks_teacher(cache, recipe):
        return recipe, ""
    network = cache.manifest["teacher"]["network"]
    changes: dict[str, object] = {"random_images": 0}
    consequence = "students train without random images"
    if cache.random is not None and len(cache.random) >= recipe.random_images:
        changes = {"random_source": "pool", **pool.facts(cache.manifest)}
        consequence = "random images come from the pool in the file"
    remedy = f"needs the file of its network (--teacher ./{network}.py)" if cache.has_teacher else "is not in the file"
    return recipe.model_copy(update=changes), f"The teacher of {cache.name} {remedy}, so {consequence}."


def open_live_teacher(config: StudentConfig, data: RunData) -> FeatureNet:
    """Load the cache's teacher, and compare it with the rows it wrote."""
    recipe, cache = config.recipe, config.cache
    teacher = load_teacher(cache, recipe, data.train.shape, data.train.device)
    (pixels,) = data.train.batches([torch.arange(min(8, len(data.train)))])
    check_teacher(teacher, cache, data.preprocess.normalise(pixels))
    teacher.precision = getattr(torch, recipe.live_precision)
    return teacher


def open_random_source(
    config: StudentConfig, data: RunData, partition: Partition, open_teacher: Callable[[], FeatureNet]
) -> RandomSource:
    """Open the cache's random pool, or its teacher."""
    recipe, cache, shape, device = config.recipe, config.cache, data.train.shape, data.train.device
    batches_per_epoch = len(shuffled_batches(0, 0, data.train_count, recipe.batch_size))
    spec = RandomSpec(recipe.random_images, shape, batches_per_epoch, data.preprocess, device, partition.local_rows)
    if recipe.random_source == "pool":
        _check_pool(cache, recipe)
        return RandomPool(cache, spec, data.photos(torch.arange(len(data.train)), len(cache.classes)))
    images = recipe.random_images * batches_per_epoch * recipe.epochs
    warning = period_warning(recipe.random_generator, images, "A seed", shape)
    if warning and partition.is_writer:
        warn(warning)
    rounds = recipe.random_rounds if recipe.random_balanced else None
    live = LiveSpec(functools.cache(partial(_kind, config, data)), len(cache.classes), recipe.random_generator, rounds)
    return LiveTeacher(open_teacher(), spec, live)


def _check_pool(cache: Cache, recipe: Recipe) -> None:
    """Raise CacheMismatch if the recipe asks for other random images than those of the cache's pool."""
    for setting, stored in pool.facts(cache.manifest).items():
        if (requested := getattr(recipe, setting)) != stored:
            raise CacheMismatch(
                f"The random pool of {cache.path.name} was made with {setting} = {stored}, not {requested}. Leave the "
                "setting out, or have the teacher label random images live: --set random_source=live"
            )


def _kind(config: StudentConfig, data: RunData, seed: int) -> Kind:
    """Return the kind of a seed's random images; mixtures are made from the images that the seed trains on."""
    recipe, rows = config.recipe, data.validation_split(seed)[0]
    photos = replace(data.photos(rows, len(config.cache.classes)), shift=recipe.views.shift, flip=recipe.views.flip)
    return make(recipe.random_kind, data.train.shape, photos)
