"""File formats of exported students: how each is written, and run by its own runtime."""

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor
from torch.export import ExportedProgram

from tspipe.deploy import executorch
from tspipe.deploy.quantise import Array, quantise
from tspipe.deploy.standalone import SOURCE
from tspipe.errors import NetworkError

Calibration = Iterable[Array] | None  # batches of images
Run = Callable[[Array], Array]  # a batch of images to logits or probabilities (n, c)
INPUT = "images"
EXTRA_FILE = "tspipe.json"  # the metadata in a .pt2 archive


class Files(NamedTuple):
    """The bytes of an export, and the source of the Python file that runs it, where one is written beside it."""

    data: bytes
    source: str = ""


# Returns the files of a program with this metadata, quantised to int8 if there are images to calibrate with.
Write = Callable[[ExportedProgram, Mapping[str, str], Calibration], Files]


class Format(NamedTuple):
    """A file format.

    Attributes:
        suffix: of the file's name.
        write: see `Write`.
        load: returns a function that runs the files by the format's own runtime.
        modules: what it imports besides PyTorch.
        extra: what of tspipe installs them.
        int8: whether it can be quantised.
        single: whether it takes one image at a time, and not batches of any size.
    """

    suffix: str
    write: Write
    load: Callable[[Files], Run]
    modules: tuple[str, ...] = ()
    extra: str = ""
    int8: bool = False
    single: bool = False


def check_installed(name: str) -> None:
    """Raise NetworkError unless the packages of a format are installed and load."""
    format_ = FORMATS[name]
    for module in format_.modules:
        package, remedy = module.partition(".")[0], f"pip install 'tspipe[{format_.extra}]'"
        try:
            with quiet():
                importlib.import_module(module)
        except ImportError as error:
            if importlib.util.find_spec(package) is None:
                raise NetworkError(f"The format {name} needs {package}: {remedy}") from error
            raise NetworkError(
                f"{package} is installed and cannot be loaded: {error}. A release of it may need another release of "
                f"PyTorch than {torch.__version__}; install them together: pip install --upgrade torch "
                f"'tspipe[{format_.extra}]'"
            ) from error


def _write_onnx(program: ExportedProgram, metadata: Mapping[str, str], calibration: Calibration) -> Files:
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
        raise NetworkError(refusal("onnx", reason)) from error
    for part in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        del part.metadata_props[:]  # notes of the exporter on its own work, larger than a small network
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    data = model.SerializeToString()
    if calibration is not None:
        with quiet():
            data = quantise(data, calibration, INPUT)
    return Files(data)


def _load_onnx(files: Files) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(files.data, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images})[0]


def _write_torch(program: ExportedProgram, metadata: Mapping[str, str], calibration: Calibration) -> Files:
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer, extra_files={EXTRA_FILE: json.dumps(dict(metadata))})
    return Files(buffer.getvalue())


def _load_torch(files: Files) -> Run:
    module = torch.export.load(io.BytesIO(files.data)).module()
    return lambda images: _numpy(module(torch.from_numpy(images)))


def _write_safetensors(program: ExportedProgram, metadata: Mapping[str, str], calibration: Calibration) -> Files:
    if any(True for _ in program.graph_module.children()):  # regions without autocast, as timm's, become plain calls
        program = program.run_decompositions({})
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
    constants = json.dumps([target for target in targets if target in program.constants])
    return Files(safetensors.torch.save(copies, {**metadata, "constants": constants}), source)


def _load_safetensors(files: Files) -> Run:
    names: dict[str, Any] = {}
    exec(compile(files.source, "<export>", "exec"), names)
    network = names["parse"](files.data)[0]
    return lambda images: _numpy(network(torch.from_numpy(images)))


def _write_executorch(program: ExportedProgram, metadata: Mapping[str, str], calibration: Calibration) -> Files:
    try:
        with quiet():
            return Files(executorch.write(program, metadata, calibration))
    except Exception as error:  # lowering raises many types of errors
        operations = ", ".join(sorted(set(re.findall(r"aten::\w+(?:\.\w+)?", str(error)))))
        reason = f"ExecuTorch has no {operations}" if operations else str(error).partition("\n")[0]
        raise NetworkError(refusal("executorch", reason)) from error


def _load_executorch(files: Files) -> Run:
    with quiet():
        return executorch.load(files.data)[0]


def refusal(format_: str, reason: str) -> str:
    """Return why a network cannot be exported to a format, and the formats that store PyTorch's own operations."""
    others = " or ".join(f"--format {name}" for name, one in FORMATS.items() if name != format_ and not one.modules)
    return f"The network cannot be exported to {format_}: {reason.rstrip('.')}. Choose {others}"


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
    "onnx": Format(
        ".onnx", _write_onnx, _load_onnx, modules=("onnx", "onnxscript", "onnxruntime"), extra="export", int8=True
    ),
    "torch": Format(".pt2", _write_torch, _load_torch),
    "executorch": Format(
        ".pte",
        _write_executorch,
        _load_executorch,
        modules=("executorch.exir", "executorch.runtime"),
        extra="executorch",
        int8=True,
        single=True,
    ),
    "safetensors": Format(".safetensors", _write_safetensors, _load_safetensors),
}
