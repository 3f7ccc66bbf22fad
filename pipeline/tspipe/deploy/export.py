"""Export of a student to a file that runs without tspipe; the file is run before it gets its name."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tspipe.data.preprocess import Preprocess
from tspipe.deploy.facts import NO_CHECKSUM, insert_checksum
from tspipe.deploy.fold import fold
from tspipe.deploy.folder_images import FolderImages
from tspipe.deploy.formats import FORMATS, Files, Run, check_installed, quiet, refusal
from tspipe.deploy.labelled_images import LabelledImages
from tspipe.deploy.latency import random_pixels
from tspipe.deploy.quantise import Array
from tspipe.deploy.student import Student
from tspipe.errors import NetworkError
from tspipe.models.loading import count_parameters
from tspipe.models.probe import probe_images
from tspipe.utils.files import new_file, writing
from tspipe.utils.progress import progress

_TOLERANCE = 1e-3  # max|Δ| / max|output|
_AGREEMENT = 0.9  # of an int8 export's predictions with the student's
_BATCH = 64
_CALIBRATION_IMAGES = 256
_RANDOM_IMAGES = 16
Images = LabelledImages | FolderImages


class WithPreprocessing(nn.Module):
    """A network with normalisation before it and softmax after it.

    Maps images (n, H, W, C) uint8, resized and cropped, to probabilities (n, c).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, preprocess: Preprocess):
        super().__init__()
        self.network = network
        mean, std = (torch.tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", mean / std)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, H, W, C) uint8 to probabilities (n, c)."""
        pixels = images.permute(0, 3, 1, 2).contiguous().to(torch.float32)
        return self.network(pixels * self.scale - self.shift).softmax(1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ExportConfig:
    """What to write.

    Attributes:
        format: one of `FORMATS`.
        out: the file.
        uint8: put normalisation and softmax into the file: images (n, H, W, C) uint8 in, probabilities out. Otherwise
            normalised images (n, C, H, W) float32 in, logits out.
        int8: quantise weights and activations to 8 bits (`onnx` and `executorch`).
    """

    format: str
    out: Path
    uint8: bool = False
    int8: bool = False

    @property
    def output(self) -> str:
        """The name of the file's output."""
        return "probabilities" if self.uint8 else "logits"


@dataclass(frozen=True)
class Comparison:
    """An export compared with its student on the same images.

    Attributes:
        images: how many.
        real: whether they are images, and not random pixels.
        difference: max|Δ| of the output, logits or probabilities.
        relative: the same, by the largest |output|.
        agreement: the fraction of images for which the export predicts the same class.
        accuracy: the export's on the test split; None without labels.
        student_accuracy: the student's on the same images.
    """

    images: int
    real: bool
    difference: float
    relative: float
    agreement: float
    accuracy: float | None
    student_accuracy: float | None


@dataclass(frozen=True)
class Export:
    """A file that was exported, its size in bytes, its number of weights, and how it compares with the student."""

    path: Path
    size: int
    parameters: int
    comparison: Comparison


def export(student: Student, config: ExportConfig, test: Images | None) -> Export:
    """Export a student, folded, to a file that takes batches of any size.

    Args:
        test: the images to compare the file with the student on; None for random pixels. int8 needs real ones, and
            takes its scales from images of the training split or of the folder.

    Raises NetworkError if a package is missing, the network cannot be exported, or the file computes something else
    than the student: its output differs by more than 1e-3, max|Δ| / max|output| or, for int8, it predicts another class
    for more than a tenth of the images. Then nothing is written.
    """
    format_ = FORMATS[config.format]
    if config.int8 and not format_.int8:
        others = " or ".join(f"--format {name}" for name, one in FORMATS.items() if one.int8)
        raise NetworkError(f"The format {config.format} cannot be quantised to int8. Choose {others}")
    if config.int8 and test is None:
        raise NetworkError("int8 takes its scales from images. Name some: --cache FILE, or --images FOLDER")
    check_installed(config.format)
    module = fold(student)
    parameters = count_parameters(module)
    if config.uint8:
        module = WithPreprocessing(module, student.preprocess).eval()
    example = _inputs(student, (probe_images(student.facts.input_shape) * 255).to(torch.uint8), config.uint8)
    program = _trace(module, example, student.name, single=format_.single)
    calibration = _calibration(student, test, config.uint8) if config.int8 and test else None
    files = format_.write(program, _metadata(student, config), calibration)
    files = files._replace(data=insert_checksum(files.data))
    comparison = _compare(_runnable(config.format, files), student, test, config.uint8)
    if not (comparison.agreement >= _AGREEMENT if config.int8 else comparison.relative <= _TOLERANCE):
        raise NetworkError(
            f"The {config.format} file of {student.name} computes other {config.output} than the student, by up to "
            f"{comparison.relative:.2g} of the largest, and predicts the same class for {comparison.agreement:.1%} of "
            "the images, so it is not written."
        )
    _write(config.out, files)
    return Export(config.out, len(files.data), parameters, comparison)


def _runnable(format_: str, files: Files) -> Run:
    """Return a function that runs the files. Raises NetworkError if their runtime does not take them."""
    run: Run | None = None

    def run_or_refuse(images: Array) -> Array:
        nonlocal run
        try:
            run = run or FORMATS[format_].load(files)
            return run(images)
        except Exception as error:  # every runtime has its own exceptions
            raise NetworkError(refusal(format_, f"its runtime fails: {str(error).partition(chr(10))[0]}")) from error

    return run_or_refuse


def _trace(module: nn.Module, example: Tensor, name: str, *, single: bool) -> torch.export.ExportedProgram:
    """Return the program of a module, for batches of any size or of a single image."""
    batch = None if single else ({0: torch.export.Dim("batch")},)
    # The strides of grey images may be those of channels last, too, which ExecuTorch would take them for.
    example = (example[:1] if single else example).clone(memory_format=torch.contiguous_format)
    try:
        with quiet():
            program = torch.export.export(module, (example,), dynamic_shapes=batch, strict=False)
    except Exception as error:  # tracing runs the network's code, which can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if reason.startswith("Constraints violated"):
            reason = "its operations depend on the number of images in a batch, as those of a loop over the images do"
        call = str(error).partition("The following call raised this error:\n")[2].splitlines()[:2]
        location = f" ({call[1].strip()} in {call[0].strip().partition(', ')[2]})" if len(call) == 2 else ""
        raise NetworkError(
            f"{name} cannot be exported: {reason.rstrip('.')}{location}. Its safetensors file works with tspipe: "
            "tspipe.load_student(FILE)"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    program.example_inputs = None
    return program


def _metadata(student: Student, config: ExportConfig) -> dict[str, str]:
    fields = {
        "classes",
        "options",
        "preprocess",
        "input_shape",
        *(["native_width"] if student.facts.native_width else []),
    }
    facts = student.facts.model_dump(mode="json", include=fields)
    batch = "1" if FORMATS[config.format].single else "n"
    return {
        **{name: json.dumps(value, sort_keys=True) for name, value in facts.items()},
        "arm": student.facts.arm,
        "labels": student.facts.labels,
        "cache": student.facts.cache,
        "dataset": student.facts.dataset,
        "dataset_license": student.facts.dataset_license,
        "teacher": student.facts.teacher,
        "network": student.facts.network,
        "name": student.name,
        "input": f"({batch}, H, W, C) uint8, resized and cropped"
        if config.uint8
        else f"({batch}, C, H, W) float32, preprocessed",
        "output": config.output,
        **({} if config.format == "torch" else {"checksum": NO_CHECKSUM}),  # a .pt2 archive has checksums of its own
        "epoch": f"{student.facts.epoch} of {student.facts.epochs}, selected: {student.facts.selected}",
        # Quantisation changes the accuracy, which is measured only when the file is complete.
        "student_test_accuracy" if config.int8 else "test_accuracy": repr(student.facts.test_accuracy),
    }


def _calibration(student: Student, images: Images, uint8: bool) -> Iterator[Array]:
    """Yield batches of training images as the exported file takes them."""
    for pixels in images.training_sample(_CALIBRATION_IMAGES).split(_BATCH):
        yield _inputs(student, pixels, uint8).numpy()


def _inputs(student: Student, pixels: Tensor, uint8: bool) -> Tensor:
    """Return what the exported file takes for images (n, C, H, W) uint8."""
    return pixels.permute(0, 2, 3, 1).contiguous() if uint8 else student.preprocess.normalise(pixels).contiguous()


def _compare(run: Run, student: Student, test: Images | None, uint8: bool) -> Comparison:
    """Run the export and the student on all test images, or on random pixels, in batches of different sizes."""
    difference = largest = 0.0
    count, same, correct, student_correct = 0, 0, 0, 0
    labelled = test is not None and test.labels is not None
    total = len(test.images) if test else _RANDOM_IMAGES + 1
    with progress("checking the export", total, "images") as advance, torch.inference_mode():
        for pixels, labels in test.batches(_BATCH) if test else _random(student.facts.input_shape):
            expected = student(student.preprocess.normalise(pixels))
            expected = (expected.softmax(1) if uint8 else expected).numpy()
            output = run(_inputs(student, pixels, uint8).numpy())
            if output.shape != expected.shape:
                raise NetworkError(f"The export returns {output.shape}, and the student {expected.shape}.")
            difference = float(np.maximum(difference, np.abs(output - expected).max()))  # a NaN stays
            largest = max(largest, float(np.abs(expected).max()))
            count += len(pixels)
            same += int((output.argmax(1) == expected.argmax(1)).sum())
            if labels is not None:
                correct += int((output.argmax(1) == labels.numpy()).sum())
                student_correct += int((expected.argmax(1) == labels.numpy()).sum())
            advance(len(pixels), "checking the export")
    accuracies = (correct / count, student_correct / count) if labelled else (None, None)
    return Comparison(count, test is not None, difference, difference / max(largest, 1e-12), same / count, *accuracies)


def _random(input_shape: tuple[int, int, int]) -> Iterator[tuple[Tensor, None]]:
    """Yield batches of random pixels, one of a single image."""
    for pixels in random_pixels(input_shape, _RANDOM_IMAGES + 1).split(_RANDOM_IMAGES):
        yield pixels, None


def _write(out: Path, files: Files) -> None:
    """Write an export; neither of two files appears under its name before both are complete."""
    with writing(out), contextlib.ExitStack() as complete:
        out.parent.mkdir(parents=True, exist_ok=True)
        if files.source:
            complete.enter_context(new_file(out.with_suffix(".py"))).write(files.source.encode())
        complete.enter_context(new_file(out)).write(files.data)
