"""The Python file that is written beside an export in the format `safetensors`. It needs torch alone."""

SOURCE = '''"""<name>: an image classifier exported by tspipe. This file needs PyTorch alone.

    network, metadata = load("<name>.safetensors")
    output = network(images)

`metadata` says what `images` and `output` are, and has the class names and the preprocessing.
"""

import json
from math import inf, nan

import torch
from torch import device

TENSORS = <targets>
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32,
          "U8": torch.uint8, "BOOL": torch.bool}


class Network:
    """The network: call it with a batch of images."""

    def __init__(self, tensors):
        self.tensors = tensors

    @torch.no_grad()
    def __call__(self, images):
        return self.forward(*(self.tensors[name] for name in TENSORS), images)[0]

<forward>


def load(path):
    """Return the network in a file, and its metadata."""
    with open(path, "rb") as file:
        return parse(file.read())


def parse(data):
    """Return the network in the bytes of a file, and its metadata."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        content = torch.frombuffer(bytearray(data[start + begin:start + end]), dtype=DTYPES[entry["dtype"]])
        tensors[name] = content.reshape(entry["shape"])
    return Network(tensors), metadata
'''
