"""Whether weights fit a network, and which network they fit instead."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tspipe.errors import NetworkError
from tspipe.models import networks

_COUNTER = "num_batches_tracked"  # absent from many older checkpoints, and unused in eval mode
_SIDES = (32, 28)  # image sizes to try, for networks whose shapes depend on the size
Shapes = dict[str, tuple[int, ...]]


class NetworkSpec(NamedTuple):
    """What determines a network without its weights.

    Attributes:
        name: as for `networks.build`.
        num_classes: c.
        input_shape: (C, H, W).
        options: the network's options. An `input_shape` among them, as a cache's manifest has it, is ignored.
    """

    name: str
    num_classes: int
    input_shape: tuple[int, int, int]
    options: Mapping[str, Any]

    def build(self) -> nn.Module:
        """Build the network with random weights."""
        options = {key: value for key, value in self.options.items() if key != "input_shape"}
        return networks.build(self.name, self.num_classes, self.input_shape, options)

    def count_parameters(self) -> int:
        """Return the number of the network's parameters, without allocating them."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build().parameters())


def load_network(spec: NetworkSpec, tensors: Mapping[str, Tensor], source: str) -> tuple[nn.Module, dict[str, Any]]:
    """Build a network and load its weights; return it with its options and those that the weights' keys imply.

    Args:
        tensors: the weights, under the keys of the network or of a published checkpoint of it.
        source: the name of the weights in an error.

    Raises NetworkError if they do not fit, before memory is allocated for the network.
    """
    tensors, implied = networks.adapt(spec.name, dict(tensors))
    options = {**spec.options, **implied}
    spec = spec._replace(options=options)
    with torch.device("meta"):
        check_fit(spec.build(), tensors, spec.name, source)
    module = spec.build()
    load_into(module, tensors, spec.name, source)
    return module, options


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], network: str, source: str) -> None:
    """Copy weights into a module. Raises NetworkError if they do not fit; see `check_fit`."""
    check_fit(module, tensors, network, source)
    counters = {key: value for key, value in module.state_dict().items() if key.endswith(_COUNTER)}
    module.load_state_dict({**counters, **tensors})


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], network: str, source: str) -> None:
    """Check that weights have a module's keys and shapes. The module may be on the meta device.

    Args:
        tensors: under the network's keys (see `networks.adapt`). Batch norm's `num_batches_tracked` may be absent.
        network: the module's name in an error.
        source: the name of the weights in an error.

    Raises NetworkError, which lists what does not fit, and names the network that the weights fit exactly, if any.
    """
    expected, actual = _shapes(module.state_dict()), _shapes(tensors)
    unexpected = [key for key in actual if key not in expected]
    missing = [key for key in expected if key not in actual and not key.endswith(_COUNTER)]
    reshaped = [key for key in expected if key in actual and actual[key] != expected[key]]
    if not (unexpected or missing or reshaped):
        _check_dtypes(module, tensors, network, source)
        return
    if not (unexpected or missing) and (classes := _class_counts(reshaped, actual, expected)):
        raise NetworkError(
            f"{source} has {classes[0]} classes, the dataset has {classes[1]}. Give weights for these classes, or "
            f"fine-tune them first: tspipe teacher --dataset NAME --weights {source}"
        )
    if not unexpected and _can_be_completed(tensors, module, network):
        raise NetworkError(
            f"{source} holds only a part of {network} ({len(actual)} of {len(expected)} keys), enough to start "
            f"training: tspipe teacher --dataset NAME --weights {source}"
        )
    shapes = [f"{key} {actual[key]}, not {expected[key]}" for key in reshaped]
    problems = [
        _count(unexpected, "is not in the network", "are not in the network"),
        _count(missing, "of the network is not in the weights", "of the network are not in the weights"),
        _count(shapes, "has another shape", "have another shape"),
    ]
    remedy = _suggestion(tensors, network) or "Name the network that they belong to: --teacher NAME"
    raise NetworkError(f"{source} does not fit {network}: {', '.join(filter(None, problems))}. {remedy}")


def _check_dtypes(module: nn.Module, tensors: Mapping[str, Tensor], network: str, source: str) -> None:
    """Raise NetworkError for integer or complex weights. Other floating-point types are converted on loading."""
    state = module.state_dict()
    floats = [key for key in tensors if state[key].is_floating_point()]
    if wrong := [f"{key} {tensors[key].dtype}" for key in floats if not tensors[key].is_floating_point()]:
        problem = _count(wrong, "holds no floating-point numbers", "hold no floating-point numbers")
        raise NetworkError(f"{source} does not fit {network}: {problem}. Save them as float32.")


def _shapes(tensors: Mapping[str, Any]) -> Shapes:
    return {key: tuple(value.shape) for key, value in tensors.items() if isinstance(value, Tensor)}


def _without_counters(shapes: Shapes) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not key.endswith(_COUNTER)}


def _class_counts(reshaped: list[str], actual: Shapes, expected: Shapes) -> tuple[int, int] | None:
    """Return the two numbers of classes, if the shapes differ only in one first dimension, that of the last layers."""
    if any(actual[key][1:] != expected[key][1:] or not actual[key] for key in reshaped):
        return None
    pairs = {(actual[key][0], expected[key][0]) for key in reshaped}
    return pairs.pop() if len(pairs) == 1 else None


def _can_be_completed(tensors: Mapping[str, Tensor], module: nn.Module, network: str) -> bool:
    """Return whether training can start from these weights, which are a part of the network."""
    initial = module.state_dict()
    completed = networks.complete(network, tensors, initial)
    return completed is not None and _without_counters(_shapes(completed)) == _without_counters(_shapes(initial))


def _count(keys: list[str], singular: str, plural: str) -> str:
    if not keys:
        return ""
    listed = ", ".join([*keys[:2], "…"] if len(keys) > 2 else keys)
    return f"{len(keys)} {f'key {singular}' if len(keys) == 1 else f'keys {plural}'} ({listed})"


def _suggestion(tensors: Mapping[str, Tensor], network: str) -> str:
    """Return a sentence that names the network which the weights fit exactly, or an empty string."""
    for name in networks.names():
        state, options = networks.adapt(name, dict(tensors))
        actual = _without_counters(_shapes(state))
        channels = next((shape[1] for shape in actual.values() if len(shape) == 4), 0)
        classes = next((shape[0] for shape in reversed(actual.values()) if len(shape) == 2), 0)
        if not (0 < channels < 2**16 and 0 < classes < 2**24):
            return ""
        for side in _SIDES:
            input_shape = (channels, side, side)
            with torch.device("meta"):
                module = networks.build(name, classes, input_shape, options)
            expected = _without_counters(_shapes(module.state_dict()))
            if expected.keys() != actual.keys():
                break
            if expected == actual:
                return f"It seems to be {name} with {classes} classes{_remedy(name, network, input_shape, options)}"
    return ""


def _remedy(name: str, network: str, input_shape: tuple[int, int, int], options: Mapping[str, Any]) -> str:
    if name != network:
        return f": use --teacher {name}"
    if options:
        return ": use " + " ".join(f"--set teacher.options.{option}={value}" for option, value in options.items())
    return f" for images of {'×'.join(map(str, input_shape))}."
