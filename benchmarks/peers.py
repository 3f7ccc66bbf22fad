"""Times ways to have a teacher's features in an epoch: python benchmarks/peers.py CACHE FOLDER [STUDENT ...]

All train the same student on the training images of a cache made with --images: plain PyTorch, fused Adam, the loss of
`bare_loop.py`, two workers where there is a DataLoader. Each way runs in a process of its own:

    live   the teacher in the loop, as a plain network        h5py   a Dataset that indexes the cache by h5py
    pt     a Dataset of one .pt file per sample               tar    shards of 1,000 samples, as WebDataset reads them
    ours   `tspipe student`'s batches and steps               torchdistill   its DistillationBox, the teacher live

torchdistill is left out unless it is installed. Prints the seconds of an epoch after the first batch, bytes on disk
(of the pixels alone where the teacher is live), and the resident memory of all processes at the end of the epoch, with
shared pages divided among them (PSS).
"""

import importlib.util
import io
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset, get_worker_info

import bare_loop
from tspipe.cache import open_cache
from tspipe.data.preprocess import Preprocess
from tspipe.errors import RecipeError
from tspipe.models import feature_net
from tspipe.models.probe import probe_images
from tspipe.models.teacher import build_teacher
from tspipe.recipes.load import recipe_for_cache
from tspipe.training.arms import TAUGHT
from tspipe.training.checkpoint import Position
from tspipe.training.config import StudentConfig
from tspipe.training.run_folder import RunFolder, environment
from tspipe.training.trainer import open_trainer
from tspipe.utils.device import pick_device
from tspipe.utils.files import lock
from tspipe.utils.memory import keep_freed_memory

WAYS, BATCH, SHARD = ("live", "torchdistill", "pt", "h5py", "tar", "ours"), 128, 1000
Samples = Iterator[tuple[Tensor, Tensor, Tensor]]  # (n, H, W, C) uint8, (n, d) float16, (n,) int64


class PtFiles(Dataset[Any]):
    """One .pt file per sample."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return torch.load(self.paths[index], weights_only=True)


class H5Rows(Dataset[Any]):
    """Rows of the cache by h5py's indexing; each worker opens the file."""

    def __init__(self, path: str, rows: int):
        self.path, self.rows, self.file = path, rows, None

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Any:
        self.file = self.file or h5py.File(self.path)
        return tuple(self.file[f"train_{name}"][index] for name in ("images", "features", "labels"))


class TarShards(IterableDataset[Any]):
    """Shards in random order, one worker each, and a buffer that shuffles samples."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.iterdir())

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        paths = self.paths[worker.id :: worker.num_workers] if worker else self.paths
        buffer: list[Any] = []
        for path in random.sample(paths, len(paths)):
            with tarfile.open(path) as archive:
                for member in archive:
                    data = np.load(io.BytesIO(archive.extractfile(member).read()))  # type: ignore[union-attr]
                    sample = data["image"], data["features"], data["label"]
                    if len(buffer) < SHARD:
                        buffer.append(sample)
                        continue
                    place = random.randrange(SHARD)
                    yield buffer[place]
                    buffer[place] = sample
        yield from random.sample(buffer, len(buffer))


def store(way: str, cache: str, folder: Path) -> None:
    """Write the samples of a way that does not read the cache."""
    with h5py.File(cache) as file:
        columns = [file[f"train_{name}"][:] for name in ("images", "features", "labels")]
    samples = list(zip(*columns, strict=True))
    if way == "pt":
        for i, (image, features, label) in enumerate(samples):
            torch.save((torch.from_numpy(image), torch.from_numpy(features), int(label)), folder / f"{i:07}.pt")
        return
    for first in range(0, len(samples), SHARD):
        with tarfile.open(folder / f"{first:07}.tar", "w") as archive:
            for i, (image, features, label) in enumerate(samples[first : first + SHARD], first):
                data = io.BytesIO()
                np.savez(data, image=image, features=features, label=label)
                member = tarfile.TarInfo(f"{i:07}.npz")
                member.size = data.tell()
                data.seek(0)
                archive.addfile(member, data)


def samples(way: str, cache: str, folder: Path) -> Samples:
    """Yield an epoch's batches without end."""
    with h5py.File(cache) as file:
        rows = len(file["train_images"])
        held = [torch.from_numpy(file[f"train_{name}"][:]) for name in ("images", "features", "labels")]
    if way == "live":
        while True:
            for order in torch.randperm(rows).split(BATCH):
                yield tuple(column.index_select(0, order) for column in held)  # type: ignore[misc]
    del held
    data = {"pt": PtFiles, "h5py": lambda _: H5Rows(cache, rows), "tar": TarShards}
    loader = DataLoader(data[way](folder), BATCH, shuffle=way != "tar" or None, num_workers=2, persistent_workers=True)
    while True:
        yield from loader


def plain_steps(way: str, cache: str, student_name: str, folder: Path) -> Iterator[object]:
    """Yield after each step of a plain loop."""
    opened = open_cache(cache)
    preprocess = Preprocess.from_dict(opened.manifest["preprocess"])
    student, optimizer = bare_loop.build(student_name, opened.dimensions.width, len(opened.classes), "channels-last")
    teacher = plain_teacher(cache) if way == "live" else None
    for pixels, features, labels in samples(way, cache, folder):
        images = preprocess.normalise(pixels.permute(0, 3, 1, 2))
        if teacher:
            with torch.no_grad():
                features = teacher(images).features
        bare_loop.step(student, optimizer, images, features.float(), labels)
        yield None


def plain_teacher(cache: str) -> nn.Module:
    opened = open_cache(cache)
    recipe, _ = recipe_for_cache(cache, opened.manifest, "cifar10", None, {})
    height, width, channels = opened.train.images.shape[1:]  # type: ignore[union-attr]
    module, name = build_teacher(opened, recipe, (channels, height, width))
    return feature_net.split(module.eval().requires_grad_(False), name, probe_images((channels, height, width)))


class TeacherFeatures(nn.Module):
    """The plain teacher's features alone, as torchdistill compares a module's output."""

    def __init__(self, cache: str):
        super().__init__()
        self.teacher = plain_teacher(cache)

    def forward(self, images: Tensor) -> Tensor:
        return self.teacher(images).features  # type: ignore[no-any-return]


def torchdistill_steps(cache: str, student_name: str) -> Iterator[object]:
    """Yield after each step of torchdistill's single-stage distillation with the same loss and optimiser."""
    from torchdistill.core.distillation import get_distillation_box

    opened = open_cache(cache)
    student, _ = bare_loop.build(student_name, opened.dimensions.width, len(opened.classes), "channels-first")
    images, labels = bare_loop.load_images(cache, "train", "channels-first"), bare_loop.load(cache, "train_labels")
    from_student = {"is_from_teacher": False, "io": "output"}
    terms = {
        "mse": ("MSELoss", "g", {"is_from_teacher": True, "module_path": ".", "io": "output"}),
        "ce": ("CrossEntropyLoss", "head", {"uses_label": True}),
    }
    workers = {"batch_size": BATCH, "num_workers": 2, "persistent_workers": True}
    config = {
        "num_epochs": 1,
        "train_data_loader": {"dataset_id": "train", "sampler": {"class_or_func": RandomSampler}, "kwargs": workers},
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "forward_hook": {"output": ["g", "head"]}},
        "optimizer": {"key": "Adam", "kwargs": {"lr": 1e-3, "fused": True}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    term: {
                        "criterion": {"key": key, "kwargs": {}},
                        "criterion_wrapper": {
                            "key": "SimpleLossWrapper",
                            "kwargs": {"input": {**from_student, "module_path": module}, "target": target},
                        },
                        "weight": 1.0,
                    }
                    for term, (key, module, target) in terms.items()
                }
            },
        },
    }
    data, device = {"train": TensorDataset(images, labels)}, torch.device("cpu")
    box = get_distillation_box(TeacherFeatures(cache), student, data, config, device, None, False, 1)
    for epoch in range(2**20):
        box.pre_epoch_process(epoch=epoch)
        for batch, targets, extra in box.train_data_loader:
            box.post_forward_process(box.forward_process(batch, targets, extra))
            yield None
        box.post_epoch_process()


def our_steps(cache: str, student_name: str) -> Iterator[object]:
    """Yield after each step of `tspipe student`."""
    keep_freed_memory()
    flags = {"student": [student_name], "random_images": 0}
    recipe, _ = recipe_for_cache(cache, open_cache(cache).manifest, "cifar10", [f"batch_size={BATCH}"], flags)
    config, device = StudentConfig(recipe, open_cache(cache), (TAUGHT,)), pick_device("cpu")
    with tempfile.TemporaryDirectory() as folder, lock(Path(folder, "run"), RecipeError):
        run = RunFolder(Path(folder), {}, environment("cpu", torch.get_num_threads()))
        trainer = open_trainer(config, run, device)
        learners = trainer.learners(0)
        for epoch in range(2**20):
            learners[0].start_epoch(epoch)
            yield from trainer.steps(learners, trainer.batches, Position(epoch=epoch))


def one(way: str, cache: str, student: str, folder: Path) -> None:
    """Time an epoch in this process, and print its line."""
    if way in (given := {"ours": our_steps, "torchdistill": torchdistill_steps}):
        steps = given[way](cache, student)
    else:
        steps = plain_steps(way, cache, student, folder)
    with h5py.File(cache) as file:
        rows, pixels = len(file["train_images"]), file["train_images"].nbytes
    next(steps)
    start = time.perf_counter()
    for _ in range(-(-rows // BATCH)):
        next(steps)
    seconds = time.perf_counter() - start
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    sizes = {
        "live": pixels,
        "torchdistill": pixels,
        "h5py": Path(cache).stat().st_size,
        "ours": Path(cache).stat().st_size,
    }
    stored = sizes.get(way) or sum(512 * path.stat().st_blocks for path in folder.iterdir())
    memory = sum(proportional_bytes(process) for process in processes)
    print(f"{student:14}{way:14}{seconds:8.2f} s {stored / 2**20:7.0f} MiB on disk {memory / 2**20:7.0f} MiB resident")


def proportional_bytes(process: int) -> int:
    """Return a process's resident memory, with shared pages divided among those that share them."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def main() -> None:
    cache, folder, *students = sys.argv[1:]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}, n = 1", flush=True)
    with h5py.File(cache) as file:
        print(f"{len(file['train_images']):,} training images")
    ways = [way for way in WAYS if way != "torchdistill" or importlib.util.find_spec(way)]
    folders = {way: Path(folder, f"peers-{way}") for way in ways}
    try:
        for way, path in folders.items():
            path.mkdir(parents=True)
            if way in ("pt", "tar"):
                store(way, cache, path)
        for student in students or ["lenet5", "resnet20"]:
            for way in ways:
                subprocess.run([sys.executable, __file__, "one", way, cache, student, folders[way]], check=True)
    finally:
        for path in folders.values():
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    one(*sys.argv[2:5], Path(sys.argv[5])) if sys.argv[1] == "one" else main()
