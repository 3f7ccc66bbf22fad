"""Exports as classifiers, and the choice between them and students."""

from pathlib import Path

import torch
from torch import Tensor

from tspipe.deploy import executorch
from tspipe.deploy.classifier import Classifier
from tspipe.deploy.facts import ExportFacts, check_unchanged, parse
from tspipe.deploy.formats import INPUT, Run, check_installed, quiet
from tspipe.deploy.rebuilt import RebuiltExport, is_export
from tspipe.deploy.student import NetworkFiles, find_students, load_student
from tspipe.errors import NetworkError
from tspipe.utils.progress import warn
from tspipe.utils.reading import read_file


class _RuntimeExport:
    """An export that its own runtime runs: `_run` takes a batch as the file does and returns its output."""

    facts: ExportFacts
    _run: Run

    def __init__(self, path: Path, format_: str):
        check_installed(format_)
        if not path.is_file():
            raise NetworkError(f"There is no file {path}.")
        self.path, self.name = path, path.name

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Return the probabilities (n, c) of images (n, C, H, W) uint8 after resize and crop."""
        uint8 = self.facts.output == "probabilities"
        images = pixels.permute(0, 2, 3, 1) if uint8 else self.facts.preprocess.normalise(pixels)
        output = torch.from_numpy(self._run(images.contiguous().numpy()))
        return output if uint8 else output.softmax(1)


class OnnxExport(_RuntimeExport):
    """A file that `tspipe export` wrote, run by onnxruntime on the CPU. It holds a graph and no code.

    Raises NetworkError if it is missing, damaged or not an export of tspipe's, or if onnxruntime is missing.
    """

    def __init__(self, path: Path, threads: int = 0):
        super().__init__(path, "onnx")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 0: all
        try:
            data = read_file(path)
            session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has many types of errors, without a common base
            raise NetworkError(f"{path} is damaged, or not an ONNX file.") from error
        self.facts = parse(ExportFacts, session.get_modelmeta().custom_metadata_map, str(path))
        check_unchanged(self.facts, data, path)
        self._run = lambda images: session.run(None, {INPUT: images})[0]


class ExecutorchExport(_RuntimeExport):
    """A `.pte` program that `tspipe export` wrote, run image by image by ExecuTorch. It holds a graph and no code.

    Raises NetworkError if it is missing, damaged or not an export of tspipe's, or if ExecuTorch is missing.
    """

    def __init__(self, path: Path):
        super().__init__(path, "executorch")
        self._data = read_file(path)  # ExecuTorch reads it as long as the program runs, and does not copy it
        try:
            with quiet():
                self._run, metadata = executorch.load(self._data)
        except Exception as error:  # ExecuTorch has many types of errors, without a common base
            raise NetworkError(f"{path} is damaged, or not an export of tspipe's to ExecuTorch.") from error
        self.facts = parse(ExportFacts, metadata, str(path))
        check_unchanged(self.facts, self._data, path)


def load_classifier(
    path: Path, student: str | None = None, network: NetworkFiles = None, *, last: bool = False
) -> Classifier:
    """Return the export in a file, else the student, as `load_student`; of a run folder, say which one it is.

    Args:
        network: see `load_student`. `.onnx` and `.pte` files need none.
    """
    if path.suffix == ".onnx":
        return OnnxExport(path)
    if path.suffix == ".pte":
        return ExecutorchExport(path)
    if path.suffix == ".pt2" or (path.suffix == ".safetensors" and is_export(path)):
        return RebuiltExport(path, network)
    if not path.is_dir():
        return load_student(path, network=network)
    files = find_students(path, student, last=last)
    loaded = load_student(files[0], network=network)
    which = f", the best of {len(files)} students in {path} (choose: --student NAME)" if len(files) > 1 else ""
    warn(f"{loaded.name}{which}: {loaded.facts.describe_epoch()}" + (" (--last: the last epoch)" if not last else ""))
    return loaded
