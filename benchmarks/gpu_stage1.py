"""Stage one on a GPU: images per second beside the bare teacher, and what other precisions and layouts change."""

import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import gpu_measure
import stage_one
from gpu_session import Session
from tspipe.cache import Cache
from tspipe.extraction.extract import ExtractConfig, extract
from tspipe.models import feature_net, networks, weights
from tspipe.models.feature_net import FeatureNet
from tspipe.models.inference import freeze
from tspipe.models.probe import probe_images
from tspipe.recipes import load
from tspipe.utils.device import use_full_precision

TEACHERS = {"resnet56": 32, "resnet50": 224}


def run(session: Session) -> None:
    """Measure ResNet-56 on images of 32² and ResNet-50 on 224², both untrained."""
    for network, side in TEACHERS.items():
        if session.tiny:
            side = 32
        cache, folder = make_cache(session, network, side)
        for source, times in stage_one.measure(str(cache.path), str(folder), 2 if session.tiny else 10).items():
            ratios = [floor / ours for floor, ours in zip(times.floor, times.ours, strict=True)]
            session.record(
                "stage1",
                f"{network}, {side}², {source.removeprefix(', ') or 'arrays'}",
                images_per_second=1 / statistics.median(times.ours),
                floor=1 / statistics.median(times.floor),
                ratio=statistics.median(ratios),
                n=len(ratios),
                longest_part=times.longest_part,
            )
        variants(session, network, side)


def make_cache(session: Session, network: str, side: int) -> tuple[Cache, Path]:
    """Return a cache of generated images and an untrained network, and the images' folder."""
    small = side < 64
    count = 160 if session.tiny else 20_480 if small else 4_096
    size, suffix = ((side, side), "png") if small else ((500, 375), "jpg")
    folder = gpu_measure.make_images(session.work / f"images-{side}", size, count, count // 10, suffix)
    file = session.work / f"{network}-untrained.safetensors"
    torch.manual_seed(0)
    weights.save(file, networks.build(network, gpu_measure.CLASSES, (3, side, side), {}), {})
    settings = [f"dataset=folder:{folder}", f"teacher.network={network}", f"compute.device={session.device.type}"]
    settings += ["compute.block_rows=32", "compute.batch_size=16"] if session.tiny else []
    if not small:
        settings += [f"preprocess.resize=[{side * 8 // 7},{side * 8 // 7}]", f"preprocess.crop={side}"]
    recipe = load.load("folder", settings)
    cache = extract(ExtractConfig(recipe, weights.read(file), session.work / f"{network}-{side}.h5"))
    assert cache is not None
    return cache, folder


def variants(session: Session, network: str, side: int) -> None:
    """Time the bare teacher in other ways, and compare its features with those of stage one, max|Δ| / max|feature|."""
    shape, device = (3, side, side), session.device
    torch.manual_seed(0)
    module = networks.build(network, gpu_measure.CLASSES, shape, {}).eval()
    frozen = freeze(copy.deepcopy(module), network, shape, device)
    plain = feature_net.split(module, network, probe_images(shape)).to(device).requires_grad_(False)
    use_full_precision()
    largest = 4 if session.tiny else 1024 if side < 64 else 256
    images = torch.rand(largest, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    images = images.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def features(teacher: nn.Module, batch: Tensor) -> Tensor:
        output: Tensor = teacher(batch).features
        return output

    expected = features(frozen, images[:64])

    def measure(way: str, teacher: FeatureNet, batch: Tensor, graph: bool = False) -> None:
        work: Callable[[], object] = lambda: features(teacher, batch)  # noqa: E731
        each = gpu_measure.seconds(gpu_measure.graphed(work, device) if graph else work, device, 0.5)
        error = (features(teacher, batch[:64]) - expected[: len(batch)]).abs().max() / expected.abs().max()
        name = f"{network}, {side}², {way}, batches of {len(batch)}"
        session.record("stage1", name, images_per_second=len(batch) / each, feature_error=float(error))

    for size in sorted({min(64, largest), largest}):
        batch = images[:size]
        measure("as in stage one", frozen, batch)
        measure("in a CUDA graph", frozen, batch, graph=True)
        measure("batch norms kept, channels first", plain, batch.contiguous())
        measure("batch norms folded, channels first", to_channels_first(frozen), batch.contiguous())
        frozen.precision = torch.bfloat16
        measure("bfloat16", frozen, batch)
        measure("bfloat16 in a CUDA graph", frozen, batch, graph=True)
        frozen.precision = torch.float32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        measure("TF32", frozen, batch)
        use_full_precision()
    kernels = gpu_measure.top_kernels(lambda: features(frozen, images), device, 3)
    session.record("stage1", f"{network}, {side}², kernels", **kernels)


def to_channels_first(network: FeatureNet) -> FeatureNet:
    """Return a copy whose convolutions run channels-first."""
    copied = copy.deepcopy(network)
    for parameter in copied.parameters():
        parameter.data = parameter.data.contiguous()
    return copied
