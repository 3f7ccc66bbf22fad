"""How large networks are: numbers of weights, and multiply-adds for an image."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tspipe.models.loading import count_parameters
from tspipe.models.probe import eval_mode


class Counts(NamedTuple):
    """Numbers of weights and of multiply-adds for one image; None where they are unknown."""

    parameters: int | None = None
    multiply_adds: int | None = None


def count_module(module: nn.Module, image: Tensor) -> Counts:
    """Return the number of a module's parameters, and of its multiply-adds for an input (1, …).

    Multiply-adds are those of convolutions, matrix products and attention, as PyTorch counts them; others are left out.
    """
    with eval_mode(module), FlopCounterMode(display=False) as counter:
        module(image)
    return Counts(count_parameters(module), counter.get_total_flops() // 2)


def count_onnx(path: Path) -> Counts:
    """Return the same of an ONNX file: what its graph stores, and its Conv, Gemm and MatMul; None without `onnx`."""
    try:
        import onnx
    except ImportError:
        return Counts()
    model = onnx.load(path)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes: dict[str, list[int]] = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    quantising = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    scales = {name for node in quantising for name in node.input[1:]}
    stored = [tensor for tensor in graph.initializer if tensor.name not in scales]
    parameters = sum(math.prod(tensor.dims) for tensor in stored if tensor.data_type != onnx.TensorProto.INT64)
    return Counts(parameters, sum(_multiply_adds(node, shapes) for node in graph.node))


def _multiply_adds(node: Any, shapes: dict[str, list[int]]) -> int:
    """Return the outputs of a node times the products that each one sums."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return 0
    first, second, output = (shapes[name] for name in (*node.input[:2], node.output[0]))
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    products = math.prod(second[1:]) if node.op_type == "Conv" else first[0 if transposed else -1]
    return math.prod(output) * products
