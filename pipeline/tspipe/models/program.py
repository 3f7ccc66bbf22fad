"""A teacher's computation as data: operations of PyTorch's ATen library as JSON, run without the Python of its network.

`torch.export` records the operations. Its own file format is not used: in a `.pt2` file, shapes are expressions that
SymPy evaluates as Python when the file is loaded, and older ones hold pickles. Here a program names operations from the
list below, and nothing else; a program from a stranger is first run on the meta device, which bounds its memory.
"""

import json
import math
import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, fx, nn

from tspipe.errors import NetworkError
from tspipe.models import feature_net
from tspipe.models.probe import eval_mode, probe_images

_MAX_NODES = 20_000
_MAX_BYTES_PER_IMAGE = 2**29  # of one operation's output
_LARGEST_INTEGER = 2**63 - 1

# Operations without side effects, whose kernels check their arguments. Views are copied where a layout demands it.
_OPERATIONS = """
_native_batch_norm_legit_no_training.default _softmax.default _to_copy.default _unsafe_view.default abs.default
adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_max_pool2d.default add.Scalar add.Tensor
alias.default amax.default arange.default arange.start_step argmax.default avg_pool1d.default avg_pool2d.default
baddbmm.default batch_norm.default bmm.default cat.default celu.default chunk.default clamp.default
clamp_min.default clone.default constant_pad_nd.default contiguous.default conv1d.default conv2d.default
conv2d.padding conv3d.default convolution.default cos.default cumsum.default detach.default div.Scalar div.Tensor
dropout.default einsum.default elu.default eq.Scalar eq.Tensor erf.default exp.default expand.default eye.default
fill.Scalar fill.Tensor flatten.using_ints flip.default floor.default full.default full_like.default gather.default
gelu.default glu.default group_norm.default gt.Scalar hardsigmoid.default hardswish.default hardtanh.default
index.Tensor index_select.default instance_norm.default layer_norm.default leaky_relu.default
lift_fresh_copy.default linalg_vector_norm.default linear.default log.default log1p.default log_sigmoid.default
log_softmax.int logical_and.default logical_not.default logical_or.default lt.Scalar masked_fill.Scalar
matmul.default max.dim max_pool2d.default maximum.default mean.default mean.dim min.dim minimum.default mish.default
mm.default movedim.int mul.Scalar mul.Tensor narrow.default ne.Scalar ne.Tensor neg.default new_zeros.default
ones.default pad.default permute.default pixel_shuffle.default pixel_unshuffle.default pow.Tensor_Scalar
pow.Tensor_Tensor prelu.default reciprocal.default relu.default relu6.default repeat.default reshape.default
rms_norm.default roll.default rsqrt.default rsub.Scalar scalar_tensor.default scaled_dot_product_attention.default
select.int selu.default sigmoid.default sign.default silu.default sin.default slice.Tensor slice_scatter.default
softmax.int softplus.default split.Tensor split_with_sizes.default split_with_sizes_copy.default sqrt.default
squeeze.default squeeze.dim squeeze.dims stack.default std.correction sub.Scalar sub.Tensor sum.default
sum.dim_IntList sym_size.int tanh.default to.dtype transpose.int tril.default triu.default unbind.int unflatten.int
unfold.default unsqueeze.default upsample_bilinear2d.vec upsample_nearest2d.vec var.correction view.default
where.self zeros.default zeros_like.default
"""
_ALLOWED = frozenset(_OPERATIONS.split())
_REPLACED = {"view.default": "reshape.default", "_unsafe_view.default": "reshape.default"}  # for any memory layout
_INTEGERS = {"add": operator.add, "floordiv": operator.floordiv, "mul": operator.mul, "sub": operator.sub}
_TYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype | torch.memory_format)}


def export(module: nn.Module, name: str, input_shape: tuple[int, int, int]) -> bytes:
    """Return the program of a classifier in eval mode, up to its features; its weights are referred to by key.

    The program takes any number of images (n, C, H, W). The module is modified: see `feature_net.split`.

    Raises NetworkError if the network cannot be exported, or uses an operation that programs do not have.
    """
    probe = probe_images(input_shape).repeat(2, 1, 1, 1)
    keys = set(module.state_dict())
    head, _ = feature_net.last_linear(module, name, probe)
    backbone = feature_net.split(module, name, probe).backbone.eval()
    try:
        with eval_mode(backbone):
            exported = torch.export.export(backbone, (probe,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            exported = exported.run_decompositions({})  # without operations in place
    except Exception as error:  # of any type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NetworkError(f"{name} cannot be stored as a program: {reason} Leave out --portable-teacher.") from error
    targets = {spec.arg.name: spec.target for spec in exported.graph_signature.input_specs if spec.target}
    kinds = dict.fromkeys(exported.graph_signature.inputs_to_parameters, "parameter")
    values = {**exported.constants, **exported.state_dict}
    constants = {key: values[key].detach().clone() for key in targets.values() if key not in keys}
    nodes: list[Any] = []
    numbers: dict[fx.Node, int] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            key = targets.get(node.name)
            kind = "constant" if key in constants else kinds.get(node.name, "buffer")
            nodes.append(["input"] if key is None else [kind, key])
        elif node.op == "call_function":
            nodes.append([_operation(node.target, name), _encode(node.args, numbers), _encode(node.kwargs, numbers)])
        else:
            (result,) = cast(tuple[fx.Node], node.args[0])
            nodes.append(["output", numbers[result]])
        numbers[node] = len(nodes) - 1
    text = json.dumps({"head": head, "nodes": nodes}, separators=(",", ":"), allow_nan=False)
    return save_tensors(constants, {"program": text})


def _operation(target: Any, name: str) -> str:
    if isinstance(target, torch._ops.OpOverload):
        operation = str(target).removeprefix("aten.")
        if operation in _ALLOWED:
            return operation
    elif target is operator.getitem or target in _INTEGERS.values():
        return str(target.__name__)
    raise NetworkError(f"{name} uses the operation {target}, which programs do not have. Leave out --portable-teacher.")


def _encode(value: Any, numbers: Mapping[fx.Node, int]) -> Any:
    """Return an argument as JSON: what is neither a number, a string, None nor a list is an object with one key."""
    if isinstance(value, fx.Node):
        return {"node": numbers[value]}
    if isinstance(value, list | tuple):
        return [_encode(item, numbers) for item in value]
    if isinstance(value, dict):  # a device is that of the images
        return {key: _encode(item, numbers) for key, item in value.items() if not isinstance(item, torch.device)}
    if isinstance(value, torch.dtype | torch.memory_format):
        return {"type": str(value)}
    if isinstance(value, torch.layout):
        return {"layout": None}
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


class Program(nn.Module):
    """Runs the nodes of a program on normalised images (n, C, H, W); returns features (n, d)."""

    def __init__(self, nodes: list[Any], sources: Mapping[str, Mapping[str, Tensor]]):
        super().__init__()
        if len(nodes) > _MAX_NODES:
            raise NetworkError(f"it has {len(nodes):,} operations; at most {_MAX_NODES:,} are run.")
        self.nodes, last_use, self.checked = nodes, dict[int, int](), set[int]()
        for number, node in enumerate(nodes):
            if node[0] in sources:
                tensor = sources[node[0]][node[1]]
                if node[0] == "parameter":
                    self.register_parameter(f"tensor_{number}", nn.Parameter(tensor, requires_grad=False))
                else:
                    self.register_buffer(f"tensor_{number}", tensor)
            last_use |= dict.fromkeys(_references(node), number)
        self.unused_after = [[i for i, last in last_use.items() if last == n] for n in range(len(nodes))]

    def forward(self, images: Tensor) -> Tensor:
        """Map images to features; on the meta device, check the memory that each operation needs.

        Every number of images is checked before the first run with it, because sizes may grow with any power of it.
        """
        if not isinstance(images, Tensor):
            raise TypeError("A program is run, not traced.")
        if not images.is_meta and len(images) not in self.checked:
            self(torch.empty_like(images, device="meta"))
            self.checked.add(len(images))
        values = dict[int, Any]()
        for number, node in enumerate(self.nodes):
            match node:
                case ["input"]:
                    values[number] = images
                case ["parameter" | "buffer" | "constant", str()]:
                    tensor = getattr(self, f"tensor_{number}")
                    values[number] = torch.empty_like(tensor, device="meta") if images.is_meta else tensor
                case ["output", result]:
                    return cast(Tensor, values[result])
                case [str() as operation, list() as arguments, dict() as options]:
                    arguments, options = (_decode(part, values) for part in (arguments, options))
                    values[number] = _call(operation, arguments, options, images.device)
                    if images.is_meta:
                        _check_memory(values[number], len(images))
            for unused in self.unused_after[number]:
                del values[unused]
        raise NetworkError("it has no output.")


def _references(value: Any) -> list[int]:
    """Return the numbers of the nodes that a node's arguments refer to."""
    if isinstance(value, dict):
        return [value["node"]] if "node" in value else _references(list(value.values()))
    return [number for item in value for number in _references(item)] if isinstance(value, list) else []


def _decode(value: Any, values: Mapping[int, Any]) -> Any:
    """Return an argument from its JSON; the options of an operation are a dict of arguments."""
    if isinstance(value, list):
        return [_decode(item, values) for item in value]
    match value:
        case {"node": number}:
            return values[number]
        case {"type": name}:
            return _TYPES[name]
        case {"float": text}:
            return float(text)
        case {"layout": _}:
            return torch.strided
        case dict():
            return {name: _decode(item, values) for name, item in value.items()}
    return value


def _call(operation: str, arguments: list[Any], options: dict[str, Any], device: torch.device) -> Any:
    if operation in _ALLOWED:
        name, _, overload = _REPLACED.get(operation, operation).partition(".")
        function = getattr(getattr(torch.ops.aten, name), overload)
        creates = any(argument.name == "device" for argument in function._schema.arguments)
        return function(*arguments, **options, **({"device": device} if creates else {}))
    match operation, arguments:
        case "getitem", [list() | tuple() as outputs, int() as index]:
            return outputs[index]
        case _, [int() as first, int() as second] if operation in _INTEGERS:
            result: int = _INTEGERS[operation](first, second)
            if abs(result) <= _LARGEST_INTEGER:
                return result
    raise NetworkError(f"it has the operation {operation!r}, which programs do not have.")


def _check_memory(output: Any, images: int) -> None:
    for tensor in output if isinstance(output, list | tuple) else [output]:
        if isinstance(tensor, Tensor) and tensor.nbytes > images * _MAX_BYTES_PER_IMAGE:
            raise NetworkError(f"an operation needs {tensor.nbytes:,} bytes for {images} images.")


def load(data: bytes, tensors: Mapping[str, Tensor], input_shape: tuple[int, int, int], source: str) -> nn.Sequential:
    """Return a classifier: the program, then the last Linear. It is checked, and is not trained.

    Args:
        data: what `export` returned, from a stranger.
        tensors: the network's weights by key.
        source: the name of the program in an error.

    Raises NetworkError if it is damaged, has other operations, or needs other weights.
    """
    try:
        constants = load_tensors(data)
        length = int.from_bytes(data[:8], "little")
        fields = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["program"])
        nodes, head = fields["nodes"], f"{fields['head']}.".lstrip(".")
        weight, bias = tensors[f"{head}weight"], tensors.get(f"{head}bias")
        program = Program(nodes, {"parameter": tensors, "buffer": tensors, "constant": constants})
        if program(torch.empty(2, *input_shape, device="meta")).shape != (2, weight.shape[1]):
            raise NetworkError("it does not return the features of its last layer.")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        linear.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})}, assign=True)
    except NetworkError as problem:
        raise NetworkError(f"{source} is refused: {problem}") from problem
    except Exception as problem:  # a damaged or hostile program can raise anything
        raise NetworkError(f"{source} is damaged, or needs a newer tspipe.") from problem
    return nn.Sequential(program, linear).eval().requires_grad_(False)
