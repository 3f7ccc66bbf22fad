"""Trains a student in plain PyTorch, as the floor of stage two: bare_loop.py CACHE STUDENT BATCH_SIZE EPOCHS

This is the loop of a careful user who has a cache made with --images. Normalised images and targets are in memory; the
loss is the mean squared error of the features plus cross-entropy; Adam is fused; a test follows each epoch. It imports
nothing of tspipe. At its start it times some steps in each memory format, with one thread and with all, and takes the
fastest. The students are lenet5, resnet20 and mobilenet_v2, for images of 3×32×32.

    tspipe bench --cache cache/cifar10.h5 --student lenet5 --floor benchmarks/bare_loop.py    # beside `tspipe student`
"""

import argparse
import itertools
import json
import os
import statistics
import time

import h5py
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEST_BATCH = 1000
FORMATS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last}
TRIAL_STEPS = 20


class Block(nn.Module):
    """The basic block of a CIFAR ResNet; its shortcut pads with channels of zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.zeros = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        if self.zeros:
            half = self.zeros // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.zeros - half))
        return F.relu(self.bn2(self.conv2(out)) + x)


def lenet5() -> tuple[nn.Module, int]:
    """Return the convolutions and the width of their output; the hidden Linears become g(x), as in tspipe."""
    conv = nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
    )
    return nn.Sequential(conv, nn.Flatten(), nn.Linear(400, 120), nn.ReLU()), 120


def resnet20() -> tuple[nn.Module, int]:
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    sizes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    return nn.Sequential(*stem, *itertools.starmap(Block, sizes), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 64


def mobilenet_v2() -> tuple[nn.Module, int]:
    from torchvision.models import mobilenet_v2

    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    network = mobilenet_v2(num_classes=10, inverted_residual_setting=stages)
    network.features[0][0] = nn.Conv2d(3, 32, 3, 1, 1, bias=False)
    network.classifier = nn.Identity()
    return network, 1280


BACKBONES = {"lenet5": lenet5, "resnet20": resnet20, "mobilenet_v2": mobilenet_v2}


class Student(nn.Module):
    """A backbone, g(x) and the classifier."""

    def __init__(self, name: str, width: int, classes: int):
        super().__init__()
        self.backbone, native = BACKBONES[name]()
        self.g, self.head = nn.Linear(native, width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.g(self.backbone(images))
        return features, self.head(features)


def load(cache: str, name: str) -> Tensor:
    with h5py.File(cache) as file:
        return torch.from_numpy(file[name][:])


def load_images(cache: str, split: str, way: str) -> Tensor:
    """Return a split's images, normalised, (N, H, W, C) for channels-last, else (N, C, H, W) float32."""
    with h5py.File(cache) as file:
        manifest = json.loads(bytes(file["manifest"][:]).rstrip(b"\0 \n"))
        mean, std = (torch.tensor(manifest["preprocess"][key]) for key in ("mean", "std"))
        pixels = torch.from_numpy(file[f"{split}_images"][:])
    normalised = pixels.float().sub_(255 * mean).div_(255 * std)
    return normalised if way == "channels-last" else normalised.permute(0, 3, 1, 2).contiguous()


def step(student: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, f: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    features, logits = student(x)
    (F.mse_loss(features, f) + F.cross_entropy(logits, y)).backward()
    optimizer.step()


def build(name: str, width: int, classes: int, way: str) -> tuple[nn.Module, torch.optim.Adam]:
    student = Student(name, width, classes).to(memory_format=FORMATS[way])
    return student, torch.optim.Adam(student.parameters(), lr=1e-3, fused=True)


def fastest(name: str, batch: int, width: int, classes: int) -> tuple[str, int]:
    """Return the memory format and the number of threads with the fastest step, of medians in alternating turns."""
    threads = sorted({1, len(os.sched_getaffinity(0))})
    ways = list(itertools.product(FORMATS, threads))
    x, f, y = torch.rand(batch, 3, 32, 32), torch.rand(batch, width), torch.randint(classes, (batch,))
    made = {way: (*build(name, width, classes, way[0]), x.contiguous(memory_format=FORMATS[way[0]])) for way in ways}
    seconds: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    stop = time.perf_counter() + 8
    for turn in range(TRIAL_STEPS):
        for way, (student, optimizer, images) in made.items():
            torch.set_num_threads(way[1])
            start = time.perf_counter()
            step(student, optimizer, images, f, y)
            seconds[way].append(time.perf_counter() - start)
        if turn > 1 and time.perf_counter() > stop:
            break
    return min(ways, key=lambda way: statistics.median(seconds[way][1:]))


def train(cache: str, name: str, batch: int, epochs: int, way: str) -> float:
    """Train; return the accuracy on the test images."""

    def as_input(images: Tensor) -> Tensor:
        return images.permute(0, 3, 1, 2) if way == "channels-last" else images

    x, f, y = load_images(cache, "train", way), load(cache, "train_features").float(), load(cache, "train_labels")
    test_x, test_y = load_images(cache, "test", way), load(cache, "test_labels")
    student, optimizer = build(name, f.shape[1], int(y.max()) + 1, way)
    for _ in range(epochs):
        student.train()
        for rows in torch.randperm(len(x)).split(batch):
            images, features, labels = (tensor.index_select(0, rows) for tensor in (x, f, y))
            step(student, optimizer, as_input(images), features, labels)
        student.eval()
        with torch.no_grad():
            parts = zip(test_x.split(TEST_BATCH), test_y.split(TEST_BATCH), strict=True)
            correct = sum(int((student(as_input(part))[1].argmax(1) == labels).sum()) for part, labels in parts)
    return correct / len(test_y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("student", choices=BACKBONES)
    parser.add_argument("batch", type=int)
    parser.add_argument("epochs", type=int)
    parser.add_argument("--way", type=lambda text: text.split(","), help="channels-first,1 (default: the fastest)")
    arguments = parser.parse_args()
    width, classes = (len(load(arguments.cache, name)[0]) for name in ("test_features", "test_logits"))
    way, threads = arguments.way or fastest(arguments.student, arguments.batch, width, classes)
    torch.set_num_threads(int(threads))
    accuracy = train(arguments.cache, arguments.student, arguments.batch, arguments.epochs, way)
    print(f"{arguments.student}, {way}, {threads} threads: {accuracy:.4f}")


if __name__ == "__main__":
    main()
