"""Times stage one beside the bare teacher on decoded arrays."""

import itertools
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tspipe.cache.layout import DTYPE_NAMES
from tspipe.cache.manifest import as_plan
from tspipe.data.datasets import Dataset, Images
from tspipe.data.image_loader import open_images, read
from tspipe.data.preprocess import Preprocess
from tspipe.errors import CacheMismatch, DatasetError
from tspipe.experiments.baselines import as_way
from tspipe.experiments.turns import Timer, Way
from tspipe.extraction import extract
from tspipe.models.feature_net import FeatureNet
from tspipe.models.teacher import load_teacher
from tspipe.models.weights import Weights
from tspipe.recipes.schema import Compute, Features
from tspipe.training.run_data import open_local_dataset
from tspipe.training.trainer import Trainer
from tspipe.utils.progress import stderr_console

_BLOCKS = 4  # decoded blocks that are computed again and again


def measure(trainer: Trainer, timer: Timer) -> dict[str, tuple[list[float], list[float]]]:
    """Return the seconds per image of the floor and of stage one, from arrays and, if there are any, from files.

    Stage one computes, checks and writes its blocks. From files it decodes all of them in turn, because a few would
    stay in the processor's cache; its floor decodes one image at a time.
    """
    config = trainer.config
    # A teacher of its own, in float32 as in stage one, whatever the live teacher uses.
    teacher = load_teacher(config.cache, config.recipe, trainer.batches.data.train.shape, trainer.device)
    dataset, preprocess = open_images(config.cache, lambda: open_local_dataset(config))
    sizes = config.cache.dimensions
    blocks = [sizes.block("train", number) for number in range(sizes.blocks("train"))]
    decoded = [_decode(block, dataset.train, preprocess) for block in blocks[:_BLOCKS]]
    arrays = _job(
        trainer, teacher, _in_memory(dataset, torch.cat(decoded)), replace(preprocess, resize=None, crop=None)
    )
    batch_size = arrays.config.recipe.compute.batch_size

    @torch.inference_mode()
    def bare(block: Tensor) -> None:
        for batch in block.split(batch_size):
            teacher(preprocess.normalise(batch.to(trainer.device).permute(0, 3, 1, 2)))

    with arrays.writer() as writer:

        def write_blocks(job: extract.Job, count: int) -> Way:
            numbers = itertools.cycle(range(count))
            return lambda repeat: extract.write_rows(
                writer, job, {"train": list(itertools.islice(numbers, repeat)), "test": []}, lambda count, what: None
            )

        ways = {
            "ours": write_blocks(arrays, len(decoded)),
            "floor": as_way(bare(block) for block in itertools.cycle(decoded)),
        }
        if files := _files(trainer, dataset):
            steps = trainer.batches.data.preprocess
            one_by_one = (_decode(block, files, steps) for block in itertools.cycle(blocks))
            job = _job(trainer, teacher, replace(dataset, train=files), steps)
            ways |= {"ours, files": write_blocks(job, len(blocks)), "floor, files": as_way(map(bare, one_by_one))}
        times = timer.turns(ways)
    per_image = {way: [seconds / len(blocks[0]) for seconds in turns] for way, turns in times.items()}
    sources = [source for source in ("", ", files") if f"ours{source}" in ways]
    return {source: (per_image[f"floor{source}"], per_image[f"ours{source}"]) for source in sources}


def _decode(rows: range, images: Images, preprocess: Preprocess) -> Tensor:
    return torch.from_numpy(np.stack([read(images, preprocess, row)[1] for row in rows]))


def _in_memory(dataset: Dataset, pixels: Tensor) -> Dataset:
    """Return the dataset with its first training images as an array."""
    array, train, count = pixels.numpy(), dataset.train, len(pixels)
    images = Images(train.labels[:count], train.keys[:count], train.classes, array.__getitem__, array)
    return replace(dataset, train=images)


def _files(trainer: Trainer, dataset: Dataset) -> Images | None:
    """Return the training images as files; None if the dataset is an array or not on this machine."""
    try:
        images = (open_local_dataset(trainer.config) if trainer.config.cache.has_images else dataset).train
    except (DatasetError, CacheMismatch) as problem:
        stderr_console.print(f"Stage one is not timed from files. {problem}", markup=False)
        return None
    return images if images.array is None else None


def _job(trainer: Trainer, teacher: FeatureNet, dataset: Dataset, preprocess: Preprocess) -> extract.Job:
    """Return the job that made the cache, for training images without views, writing into the run folder."""
    manifest, dimensions = trainer.config.cache.manifest, trainer.config.cache.dimensions
    compute = Compute(batch_size=manifest["compute"]["batch_size"], block_rows=manifest["block_rows"])
    features = Features(dtype=DTYPE_NAMES[manifest["features"]["dtype"]])
    update = {"preprocess": preprocess, "compute": compute, "features": features}
    recipe = trainer.config.recipe.model_copy(update=update)
    config = extract.ExtractConfig(recipe, Weights({}, {}, "", ""), trainer.folder.path / "bench.h5")
    dimensions = replace(dimensions, weights_bytes=0, random_rows=None, views=None)
    plan = {**as_plan(manifest), "random": None, "views": None}
    return extract.Job(config, dataset, teacher, b"", plan, dimensions)
