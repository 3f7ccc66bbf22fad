"""Times stage one beside the bare teacher on decoded images: python benchmarks/stage_one.py CACHE [DATA [SECONDS]]

Computes the rows of a cache's training images again, with the checksums and the writing, and prints the time per image
beside that of the teacher alone. The images come from memory, decoded, and from their files, if they are on this
machine in DATA. Decoding the files alone, in all threads, is timed too: the slower of the two is the floor that
overlapping them can reach, their sum the floor where both need the same cores.
"""

import itertools
import statistics
import sys
import tempfile
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tspipe.cache import Cache, open_cache
from tspipe.cache.layout import DTYPE_NAMES
from tspipe.cache.manifest import as_plan
from tspipe.data.datasets import Dataset, Images
from tspipe.data.image_loader import open_images, read
from tspipe.data.preprocess import Preprocess
from tspipe.errors import CacheMismatch, DatasetError
from tspipe.experiments.baselines import as_way
from tspipe.experiments.turns import Timer, Way
from tspipe.extraction import extract
from tspipe.extraction.blocks import decode_blocks
from tspipe.models.feature_net import FeatureNet
from tspipe.models.teacher import load_teacher
from tspipe.models.weights import Weights
from tspipe.recipes.load import recipe_for_cache
from tspipe.recipes.schema import Compute, Features, Recipe
from tspipe.training.config import LocalInputs, StudentConfig
from tspipe.training.run_data import open_local_dataset
from tspipe.utils.device import pick_device, use_full_precision
from tspipe.utils.memory import keep_freed_memory

BLOCKS = 4  # decoded blocks that are computed again and again


def main(path: str, data: str | None = None, seconds: float = 60) -> None:
    times, longest = measure(path, data, seconds)
    report("stage one / bare", times["ours"], times["teacher"])
    if "ours, files" in times:
        alone = list(zip(times["decoding"], times["teacher"], strict=True))
        report("decoding / teacher", *map(list, zip(*alone, strict=True)))
        report("stage one, files / slower of the two", times["ours, files"], [max(pair) for pair in alone])
        report("stage one, files / both in turn", times["ours, files"], [sum(pair) for pair in alone])
    print(", ".join(f"{source} is {part}-bound" for source, part in longest.items()))


def report(what: str, ours: list[float], floor: list[float]) -> None:
    """Print the medians of seconds per image, and the median and quartiles of the ratios of turns."""
    ratios = [a / b for a, b in zip(ours, floor, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = " beside ".join(f"{statistics.median(times) * 1e3:.3g} ms" for times in (ours, floor))
    print(f"{what}: {medians}, ratio {middle:.3g} ({low:.3g} to {high:.3g}), n {len(ratios)}")


def measure(path: str, data: str | None, seconds: float) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the seconds per image in each turn, by what was done, and the part of stage one that takes longest."""
    cache = open_cache(path)
    recipe, default_folder = recipe_for_cache(path, cache.manifest, None, None, {})
    config = StudentConfig(recipe, cache, inputs=LocalInputs(Path(data) if data else default_folder))
    device = pick_device(recipe.device)
    use_full_precision()
    keep_freed_memory()
    dataset, remaining = open_images(cache, lambda: open_local_dataset(config))
    sizes = cache.dimensions
    blocks = [sizes.block("train", number) for number in range(sizes.blocks("train"))]
    decoded = [decode_rows(block, dataset.train, remaining) for block in blocks[:BLOCKS]]
    _, height, width, channels = decoded[0].shape
    teacher = load_teacher(cache, recipe, (channels, height, width), device)
    batch_size = cache.manifest["compute"]["batch_size"]

    @torch.inference_mode()
    def bare(block: Tensor) -> None:
        for batch in block.split(batch_size):
            teacher(remaining.normalise(batch.to(device).permute(0, 3, 1, 2)))

    longest = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.h5"
        arrays = in_memory(dataset, torch.cat(decoded))
        job = stage_one_job(cache, recipe, teacher, arrays, replace(remaining, resize=None, crop=None), out)
        with job.writer() as writer:

            def write_blocks(source: str, job: extract.Job, count: int) -> Way:
                def note(_: float, progress: str) -> None:
                    longest[source] = progress.removeprefix("train, ").removesuffix("-bound")

                numbers = itertools.cycle(range(count))
                return lambda repeat: extract.write_rows(
                    writer, job, {"train": list(itertools.islice(numbers, repeat)), "test": []}, note
                )

            on_device = [block.to(device) for block in decoded]
            ways = {
                "ours": write_blocks("stage one", job, len(decoded)),
                "teacher": as_way(bare(block) for block in itertools.cycle(on_device)),
            }
            if files := open_files(config, dataset):  # all of them in turn: a few would stay in the processor's cache
                steps = Preprocess.from_dict(cache.manifest["preprocess"])
                job = stage_one_job(cache, recipe, teacher, replace(dataset, train=files), steps, out)
                ranges = itertools.cycle(blocks)
                ways["ours, files"] = write_blocks("from files", job, len(blocks))
                ways["decoding"] = lambda repeat: deque(
                    decode_blocks(files, steps, list(itertools.islice(ranges, repeat))), maxlen=0
                )
            times = Timer(device, seconds / len(ways)).turns(ways)
    return {way: [seconds / len(blocks[0]) for seconds in turns] for way, turns in times.items()}, longest


def decode_rows(rows: range, images: Images, preprocess: Preprocess) -> Tensor:
    return torch.from_numpy(np.stack([read(images, preprocess, row)[1] for row in rows]))


def in_memory(dataset: Dataset, pixels: Tensor) -> Dataset:
    """The dataset with its first training images as an array."""
    array, train, count = pixels.numpy(), dataset.train, len(pixels)
    images = Images(train.labels[:count], train.keys[:count], train.classes, array.__getitem__, array)
    return replace(dataset, train=images)


def open_files(config: StudentConfig, dataset: Dataset) -> Images | None:
    """The training images as files; None if the dataset is an array or not on this machine."""
    try:
        images = (open_local_dataset(config) if config.cache.has_images else dataset).train
    except (DatasetError, CacheMismatch) as problem:
        print(f"Stage one is not timed from files. {problem}", file=sys.stderr)
        return None
    return images if images.array is None else None


def stage_one_job(
    cache: Cache, recipe: Recipe, teacher: FeatureNet, dataset: Dataset, preprocess: Preprocess, out: Path
) -> extract.Job:
    """The job that made the cache, for training images without views, writing into another file."""
    manifest = cache.manifest
    compute = Compute(batch_size=manifest["compute"]["batch_size"], block_rows=manifest["block_rows"])
    features = Features(dtype=DTYPE_NAMES[manifest["features"]["dtype"]])
    recipe = recipe.model_copy(update={"preprocess": preprocess, "compute": compute, "features": features})
    config = extract.ExtractConfig(recipe, Weights({}, {}, "", ""), out)
    dimensions = replace(cache.dimensions, weights_bytes=0, random_rows=None, views=None)
    plan = {**as_plan(manifest), "random": None, "views": None}
    return extract.Job(config, dataset, teacher, b"", b"", plan, dimensions)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(float, sys.argv[3:]))
