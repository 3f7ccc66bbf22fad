"""Whether weights fit a network, and which network they fit instead."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tspipe.errors import NetworkError
from tspipe.models import networks

_COUNTER = "num_batches_tracked"  # absent from many older checkpoints, and unused in eval mode
_MOST_KEYS = 5_000  # a search among the networks for more would take seconds
_WRAPPERS = re.compile(r"((module|_orig_mod|model|net|network)\.)*")
_SIDES = (32, 28)  # image sizes to try, for networks whose shapes depend on the size
Shapes = dict[str, tuple[int, ...]]


def count_parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


class NetworkSpec(NamedTuple):
    """What determines a network without its weights: the arguments of `networks.build`."""

    name: str
    num_classes: int
    input_shape: tuple[int, int, int]  # (C, H, W)
    options: Mapping[str, Any]  # an `input_shape` among them, as a cache's manifest has it, is ignored

    def build(self) -> nn.Module:
        """Build the network with random weights."""
        options = {key: value for key, value in self.options.items() if key != "input_shape"}
        return networks.build(self.name, self.num_classes, self.input_shape, options)

    def build_on_meta(self) -> nn.Module:
        """Build the network without memory for its weights."""
        try:
            with torch.device("meta"), _NoNormalWeights():
                return self.build()
        except (NetworkError, RuntimeError):  # RegNet computes its widths with tensors
            with _WeightsOnMeta():
                return self.build()

    def count_parameters(self) -> int:
        """Return the number of the network's parameters."""
        return count_parameters(self.build_on_meta())


class _NoNormalWeights(TorchFunctionMode):
    """Leaves out weights from a normal distribution: on the meta device they import PyTorch's compiler, a second."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if function is Tensor.normal_ else function(*args, **(kwargs or {}))


class _WeightsOnMeta(TorchFunctionMode):
    """Creates on the meta device what layers create their weights with, and other tensors on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_meta = {"device": "meta"} if function in (torch.empty, torch.zeros, torch.ones) else {}
        return function(*args, **{**(kwargs or {}), **on_meta})


def adapt(
    spec: NetworkSpec, tensors: Mapping[str, Tensor], sha256: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights under the network's keys, and the network's options with those that the weights imply.

    Prefixes of wrappers (DataParallel, torch.compile, Lightning) are replaced by those that the network's keys have.
    `sha256` of the weights' file tells published weights, whose options are not in their keys.
    """
    if prefix := _wrappers(tensors):
        own_prefix = _wrappers(spec.build_on_meta().state_dict())
        tensors = {own_prefix + key.removeprefix(prefix): value for key, value in tensors.items()}
    state, implied = networks.adapt(spec.name, dict(tensors))
    return state, {**networks.published_options(spec.name, sha256), **spec.options, **implied}


def _wrappers(state: Mapping[str, Any]) -> str:
    """Return the prefixes of wrappers that all keys begin with, as `module._orig_mod.`."""
    prefixes = {key[: match.end()] for key in state if (match := _WRAPPERS.match(key))}
    shortest = min(prefixes, key=len, default="")
    return shortest if all(prefix.startswith(shortest) for prefix in prefixes) else ""


def load_network(
    spec: NetworkSpec, tensors: Mapping[str, Tensor], source: str, sha256: str = ""
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a network and load its weights; return it with its options, see `adapt`.

    Args:
        tensors: the weights, under the keys of the network or of a published checkpoint of it.
        source: the name of the weights in an error.
        sha256: of the file that they are from.

    Raises NetworkError if they do not fit, before memory is allocated for the network.
    """
    tensors, options = adapt(spec, tensors, sha256)
    spec = spec._replace(options=options)
    check_fit(spec.build_on_meta(), tensors, spec.name, source)
    module = spec.build()
    load_into(module, tensors, spec.name, source)
    return module, options


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], network: str, source: str) -> None:
    """Copy weights into a module. Raises NetworkError if they do not fit; see `check_fit`."""
    check_fit(module, tensors, network, source)
    state = module.state_dict()  # it has the counters, and the versions of layers as metadata
    state.update(tensors)
    module.load_state_dict(state)


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], network: str, source: str) -> None:
    """Check that weights have a module's keys and shapes. The module may be on the meta device.

    Args:
        tensors: under the network's keys (see `networks.adapt`). Batch norm's `num_batches_tracked` may be absent.
        network: the module's name in an error.
        source: the name of the weights in an error.

    Raises NetworkError, which lists what does not fit, and names the network that the weights fit exactly, if any.
    """
    state = module.state_dict()
    expected, actual = _shapes(state), _shapes(tensors)
    unexpected, missing, reshaped = _differences(expected, actual)
    if not (unexpected or missing or reshaped):
        floats = [key for key in tensors if state[key].is_floating_point()]  # of any precision; converted on loading
        if wrong := [f"{key} {tensors[key].dtype}" for key in floats if not tensors[key].is_floating_point()]:
            problem = _count(wrong, "without floating-point numbers")
            raise NetworkError(f"{source} does not fit {network}: {problem}. Save them as float32.")
        return
    fine_tune = f"tspipe teacher --dataset NAME --weights {source}"
    # Shapes that differ only in one first dimension, that of the last layers, are those of other classes.
    same_rest = all(actual[key][1:] == expected[key][1:] for key in reshaped)
    counts = {(*actual[key][:1], *expected[key][:1]) for key in reshaped}
    if not (unexpected or missing) and same_rest and len(counts) == 1 and len(pair := counts.pop()) == 2:
        raise NetworkError(
            f"{source} has {pair[0]} classes, the dataset has {pair[1]}. Give weights for these classes, or "
            f"fine-tune them first: {fine_tune}"
        )
    completed = networks.complete(network, tensors, state) if not unexpected else None
    if completed and _without_counters(_shapes(completed)) == _without_counters(expected):
        raise NetworkError(
            f"{source} holds only a part of {network} ({len(actual)} of {len(expected)} keys), enough to start "
            f"training: {fine_tune}"
        )
    remedy = _suggestion(tensors, network)
    if not remedy and (sets := _weight_sets(tensors, expected)):
        remedy = (
            f"It seems to hold the weights of {network} under {' and under '.join(sets)}. Name those to load: --set "
            f"teacher.weights_key={sets[0]}"
        )
    remedy = remedy or "Name the network that they belong to: --teacher NAME"
    raise NetworkError(f"{source} does not fit {network}: {misfit(module, tensors)}. {remedy}")


def misfit(module: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Return in words how weights differ from a module's in keys and shapes; empty if they do not."""
    expected, actual = _shapes(module.state_dict()), _shapes(tensors)
    unexpected, missing, reshaped = _differences(expected, actual)
    shapes = [f"{key} {actual[key]}, not {expected[key]}" for key in reshaped]
    problems = [
        _count(unexpected, "not in the network"),
        _count(missing, "missing"),
        _count(shapes, "of another shape"),
    ]
    return ", ".join(filter(None, problems))


def _differences(expected: Shapes, actual: Shapes) -> tuple[list[str], list[str], list[str]]:
    """Return the keys that are unexpected, missing, and of another shape."""
    unexpected = [key for key in actual if key not in expected]
    missing = [key for key in expected if key not in actual and not key.endswith(_COUNTER)]
    return unexpected, missing, [key for key in expected if key in actual and actual[key] != expected[key]]


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def _without_counters(shapes: Shapes) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not key.endswith(_COUNTER)}


def _count(keys: list[str], problem: str) -> str:
    listed = ", ".join([*keys[:2], "…"] if len(keys) > 2 else keys)
    return f"{len(keys)} key{'s' * (len(keys) > 1)} {problem} ({listed})" if keys else ""


def _weight_sets(tensors: Mapping[str, Tensor], expected: Shapes) -> list[str]:
    """Return the beginnings of keys, as `encoder_q` and `encoder_k`, that most of a network's keys follow."""
    counts = Counter(key.partition(".")[0] for key in tensors if key.partition(".")[2] in expected)
    return [beginning for beginning, count in counts.items() if 2 * count > len(expected)]


def _suggestion(tensors: Mapping[str, Tensor], network: str) -> str:
    """Return a sentence that names the network which the weights fit exactly, or an empty string."""
    for name in networks.names() if len(tensors) <= _MOST_KEYS else ():
        state, options = networks.adapt(name, dict(tensors))
        actual = _without_counters(_shapes(state))
        channels = next((shape[1] for shape in actual.values() if len(shape) == 4), 0)
        classes = next((shape[0] for shape in reversed(actual.values()) if len(shape) == 2), 0)
        if not (0 < channels < 2**16 and 0 < classes < 2**24):
            return ""
        for side in _SIDES:
            with torch.device("meta"):
                module = networks.build(name, classes, (channels, side, side), options)
            expected = _without_counters(_shapes(module.state_dict()))
            if expected.keys() != actual.keys():
                break
            if expected == actual:
                settings = " ".join(f"--set teacher.options.{option}={value}" for option, value in options.items())
                remedy = f": use {settings}" if settings else f" for images of {channels}×{side}×{side}."
                remedy = remedy if name == network else f": use --teacher {name}"
                return f"It seems to be {name} with {classes} classes{remedy}"
    return ""
