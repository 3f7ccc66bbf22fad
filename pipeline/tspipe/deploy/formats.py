"""File formats of exported students: how each is written, and run by its own runtime."""

import contextlib
import importlib
import io
import json
import logging
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export import ExportedProgram

from tspipe.deploy.standalone import SOURCE
from tspipe.errors import NetworkError

Array = NDArray[Any]
Run = Callable[[Array], Array]  # a batch of images to logits or probabilities (n, c)
INPUT = "images"
EXTRA_FILE = "tspipe.json"  # the metadata in a .pt2 archive


class Files(NamedTuple):
    """The bytes of an export, and the source of the Python file that runs it, where one is written beside it."""

    data: bytes
    source: str = ""


class Format(NamedTuple):
    """A file format.

    Attributes:
        suffix: of the file's name.
        packages: what `pip install 'tspipe[export]'` adds for it.
        write: returns the files of a program, with this metadata.
        load: returns a function that runs the files by the format's own runtime.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Mapping[str, str]], Files]
    load: Callable[[Files], Run]


def check_installed(name: str) -> None:
    """Raise NetworkError unless the packages of a format are installed."""
    for package in FORMATS[name].packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise NetworkError(f"The format {name} needs {package}: pip install 'tspipe[export]'") from error


def _write_onnx(program: ExportedProgram, metadata: Mapping[str, str]) -> Files:
    batch = ({0: torch.export.Dim("batch")},)
    try:
        with quiet():
            exported: Any = torch.onnx.export(
                program,
                input_names=[INPUT],
                output_names=[metadata["output"]],
                dynamic_shapes=batch,
                dynamo=True,
                verbose=False,
            )
            model = exported.model_proto
    except Exception as error:  # the exporter raises many types of errors
        operation = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
        reason = f"ONNX has no {operation[1]}" if operation else str(error).splitlines()[0]
        raise NetworkError(
            f"The network cannot be exported to ONNX: {reason}. "
            "Two other formats work: --format torch, --format safetensors"
        ) from error
    for part in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        del part.metadata_props[:]  # notes of the exporter on its own work, larger than a small network
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return Files(model.SerializeToString())


def _load_onnx(files: Files) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(files.data, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images})[0]


def _write_torch(program: ExportedProgram, metadata: Mapping[str, str]) -> Files:
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer, extra_files={EXTRA_FILE: json.dumps(dict(metadata))})
    return Files(buffer.getvalue())


def _load_torch(files: Files) -> Run:
    module = torch.export.load(io.BytesIO(files.data)).module()
    return lambda images: _numpy(module(torch.from_numpy(images)))


def _write_safetensors(program: ExportedProgram, metadata: Mapping[str, str]) -> Files:
    targets = [str(spec.target) for spec in program.graph_signature.input_specs if spec.target is not None]
    tensors: dict[str, Tensor] = {**program.state_dict, **program.constants}
    copies = {target: tensors[target].detach().contiguous().clone() for target in targets}
    fields = {
        "name": metadata["name"],
        "targets": repr(targets),
        "forward": textwrap.indent(program.graph_module.code.strip(), "    "),
    }
    source = SOURCE
    for field, text in fields.items():
        source = source.replace(f"<{field}>", text)
    return Files(safetensors.torch.save(copies, dict(metadata)), source)


def _load_safetensors(files: Files) -> Run:
    names: dict[str, Any] = {}
    exec(compile(files.source, "<export>", "exec"), names)
    network = names["parse"](files.data)[0]
    return lambda images: _numpy(network(torch.from_numpy(images)))


def _numpy(output: Tensor) -> Array:
    return output.detach().numpy()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence PyTorch's exporters, which log and warn about their own internals."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx),
    "torch": Format(".pt2", (), _write_torch, _load_torch),
    "safetensors": Format(".safetensors", (), _write_safetensors, _load_safetensors),
}
