"""ExecuTorch programs (`.pte`) for phones, lowered to XNNPACK, and how they run on this machine.

A program takes one image at a time: the memory that a phone reserves for it is that of its largest batch.
"""

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from tspipe.deploy.quantise import Array

METADATA = "metadata"  # a method of the program that returns its metadata as JSON


def write(program: ExportedProgram, metadata: Mapping[str, str], calibration: Iterable[Array] | None) -> bytes:
    """Return the program in ExecuTorch's format.

    Args:
        program: it takes a batch of one image.
        calibration: batches of images, whose activations give the scales of an int8 program; None for float32.
    """
    exir: Any = importlib.import_module("executorch.exir")
    partition: Any = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    lowered = exir.to_edge_transform_and_lower(
        program if calibration is None else _quantise(program, calibration),
        partitioner=[partition.XnnpackPartitioner()],
        constant_methods={METADATA: json.dumps(dict(metadata))},
    )
    return bytes(lowered.to_executorch().buffer)


def _quantise(program: ExportedProgram, calibration: Iterable[Array]) -> ExportedProgram:
    """Return the program with weights int8, per channel, and activations int8, as XNNPACK computes them."""
    pt2e: Any = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    xnnpack: Any = importlib.import_module("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    prepared = pt2e.prepare_pt2e(program.module(), xnnpack.XNNPACKQuantizer().set_global(config))
    with torch.no_grad():
        for batch in calibration:
            for image in _images(batch):
                prepared(image)
    return torch.export.export(pt2e.convert_pt2e(prepared), (image,), strict=False)


def load(data: bytes) -> tuple[Callable[[Array], Array], dict[str, str]]:
    """Return a function that runs a program on a batch, image by image, and the program's metadata."""
    runtime: Any = importlib.import_module("executorch.runtime")
    program = runtime.Runtime.get().load_program(data)
    forward = program.load_method("forward")

    def run(images: Array) -> Array:
        # Each output is a view of memory that the next image overwrites.
        return torch.cat([forward.execute([image])[0].clone() for image in _images(images)]).numpy()

    return run, json.loads(program.load_method(METADATA).execute([])[0])


def _images(batch: Array) -> Iterator[Tensor]:
    """Yield each image of a batch, as a batch of one, with the strides of a contiguous tensor.

    Those of a grey image may be those of channels last, too, which ExecuTorch would take it for.
    """
    for image in torch.from_numpy(batch).split(1):
        yield image.clone(memory_format=torch.contiguous_format)
