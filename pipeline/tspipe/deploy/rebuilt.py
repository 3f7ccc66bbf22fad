"""An export in the format `torch` or `safetensors` as a classifier: tspipe's network with the tensors of the file.

The program in a `.pt2` archive and the Python file beside a `.safetensors` file are never run: loading the first can
run code of the file's author, and the second is such code.
"""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from tspipe.deploy.export import WithPreprocessing
from tspipe.deploy.facts import ExportFacts, check_unchanged, parse
from tspipe.deploy.fold import fold_network
from tspipe.deploy.formats import EXTRA_FILE
from tspipe.deploy.student import NetworkFiles, build
from tspipe.errors import NetworkError
from tspipe.models import weights
from tspipe.models.probe import eval_mode
from tspipe.utils.reading import read_file

_DTYPES = {5: torch.int64, 6: torch.float16, 7: torch.float32, 8: torch.float64, 12: torch.bool}  # torch's ScalarType
Content = tuple[dict[str, Tensor], dict[str, str]]  # tensors and metadata


class RebuiltExport:
    """An export whose network is built by tspipe, with the tensors of the file, in eval mode on the CPU.

    Args:
        path: a file `.pt2` or `.safetensors` that `tspipe export` wrote.
        network: the path of the network's file, if it is a user's (`./mine.py`).

    Raises NetworkError if the file is missing, damaged or not an export of tspipe's, or if its tensors are not those of
    the network that it names, as with an export by another version of tspipe.
    """

    def __init__(self, path: Path, network: NetworkFiles = None):
        if not path.is_file():
            raise NetworkError(f"There is no file {path}.")
        tensors, metadata = read_archive(path) if path.suffix == ".pt2" else weights.read(path)[:2]
        self.facts = parse(ExportFacts, metadata, str(path))
        if path.suffix != ".pt2":  # an archive has checksums of its own
            check_unchanged(self.facts, read_file(path), path)
        self.path, self.name = path, path.name
        self.uint8 = self.facts.output == "probabilities"
        self.module = _rebuild(self.facts, tensors, network, path)

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Return the probabilities (n, c) of images (n, C, H, W) uint8 after resize and crop."""
        with eval_mode(self.module):
            if self.uint8:
                return self.module(pixels.permute(0, 2, 3, 1))  # type: ignore[no-any-return]
            return self.module(self.facts.preprocess.normalise(pixels)).softmax(1)  # type: ignore[no-any-return]


def _rebuild(facts: ExportFacts, tensors: Mapping[str, Tensor], network: NetworkFiles, path: Path) -> nn.Module:
    """Build the network, fold it as `tspipe export` does, and load the tensors."""
    tensors = {key: tensor for key, tensor in tensors.items() if key not in facts.constants}
    built = build(facts, sum(tensor.numel() for tensor in tensors.values()), len(facts.classes), network, path)
    module = fold_network(built, facts.input_shape, str(path))
    if facts.output == "probabilities":
        module = WithPreprocessing(module, facts.preprocess).eval()
    expected = {key: (value.shape, value.dtype) for key, value in module.state_dict().items()}
    if {key: (value.shape, value.dtype) for key, value in tensors.items()} != expected:
        raise NetworkError(
            f"{path} cannot be used: its tensors are not those of {facts.network} as this tspipe exports it. "
            "Its program is not run, because it may be anyone's. Use an .onnx export of the student."
        )
    module.load_state_dict(tensors)
    return module


class _Size(BaseModel):
    as_int: Annotated[int, Field(ge=0, lt=2**40)]


class _TensorMeta(BaseModel):
    dtype: Literal[5, 6, 7, 8, 12]
    sizes: list[_Size]
    strides: list[_Size]
    storage_offset: _Size


class _Payload(BaseModel):
    path_name: Annotated[str, Field(pattern=r"^weight_\d+$")]
    use_pickle: Literal[False]
    tensor_meta: _TensorMeta


class _Payloads(BaseModel):
    config: dict[str, _Payload]


def read_archive(path: Path) -> Content:
    """Return the tensors and the metadata of a `.pt2` archive, of which nothing is unpickled."""
    try:
        with zipfile.ZipFile(io.BytesIO(read_file(path))) as archive:
            folder = archive.namelist()[0].partition("/")[0]
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which PyTorch's archives are not")
            metadata = TypeAdapter(dict[str, str]).validate_json(archive.read(f"{folder}/extra/{EXTRA_FILE}"))
            payloads = _Payloads.model_validate_json(
                archive.read(f"{folder}/data/weights/model_weights_config.json")
            ).config
            tensors = {
                name: _tensor(payload.tensor_meta, archive.read(f"{folder}/data/weights/{payload.path_name}"))
                for name, payload in payloads.items()
            }
    except ValidationError as error:
        reason = f"its index of tensors, {'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
    except (IndexError, KeyError, NotImplementedError, OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error.args[0] if error.args else error)
    else:
        return tensors, metadata
    raise NetworkError(
        f"{path} is damaged, not an export of tspipe's, or of a version of PyTorch whose archives tspipe cannot read: "
        f"{reason}. Use an .onnx export of the student."
    )


def _tensor(meta: _TensorMeta, data: bytes) -> Tensor:
    """Return the tensor in these bytes. Raises ValueError or RuntimeError if they are too few."""
    values = torch.frombuffer(bytearray(data), dtype=_DTYPES[meta.dtype])
    sizes, strides = ([number.as_int for number in numbers] for numbers in (meta.sizes, meta.strides))
    return values.as_strided(sizes, strides, meta.storage_offset.as_int)


def is_export(path: Path) -> bool:
    """Return whether a safetensors file is an export rather than a student, by its metadata."""
    return path.is_file() and "output" in weights.read_metadata(path)
