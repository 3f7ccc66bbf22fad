"""timm's image classifiers, with the preprocessing and the weights that timm's own configuration names for them."""

import difflib
import importlib
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from tspipe.errors import NetworkError
from tspipe.utils import plugins

PREFIX = "timm:"
_SIZE_OPTIONS = {"img_size", "dynamic_img_size", "strict_img_size"}  # those that build a network for another size
_COUNTS = re.compile("depth|layers|blocks")
_MOST_LAYERS = 256  # a forged file may ask for any number, and even without memory each takes milliseconds to build
# What an option in a cache or a student's file must not reach: downloads and paths.
_FIXED: dict[str, Any] = {
    "pretrained": False,
    "pretrained_cfg": None,
    "pretrained_cfg_overlay": None,
    "checkpoint_path": None,
    "cache_dir": None,
}


def build(name: str, num_classes: int, input_shape: tuple[int, int, int], options: Mapping[str, Any]) -> Any:
    """Return timm's network with random weights. Raises NetworkError for images (C, H, W) that it does not take."""
    timm, config = _timm(name), _config(name)
    size, (height, width) = list(input_shape[1:]), config.input_size[1:]
    if config.fixed_input_size and size != [height, width] and not _SIZE_OPTIONS & options.keys():
        raise NetworkError(
            f"{name} takes images of {height}×{width}, these are {size[0]}×{size[1]}. Resize them ({resize(name)} in "
            "stage one), or build it for their size with its option img_size (--set "
            f"teacher.options.img_size={size[0]})."
        )
    deep = [option for option in options if _COUNTS.search(option) and _largest(options[option]) > _MOST_LAYERS]
    if deep:
        raise NetworkError(f"{name} cannot be built with {deep[0]}={options[deep[0]]!r}: at most {_MOST_LAYERS}.")
    try:
        return timm.create_model(name.removeprefix(PREFIX), num_classes=num_classes, **_FIXED, **options)
    except Exception as error:  # the type for a wrong option differs from network to network
        if not options:
            raise
        raise NetworkError(plugins.refused_options(name, options, error)) from error


def resize(name: str) -> str:
    """Return the settings that give images the size that timm evaluates the network with."""
    height, width = _config(name).input_size[1:]
    return f"--set preprocess.resize=[{height},{width}] --set preprocess.crop=none"


def preprocess(name: str) -> dict[str, Any]:
    """Return the fields of the preprocessing that timm evaluates the network with; images are resized to a fixed size.

    timm resizes the shorter side instead, and keeps the aspect ratio.
    """
    config = _config(name)
    height, width = config.input_size[1:]
    crop_pct = min(config.crop_pct or 1, 1) if height == width else 1
    resize = [int(height / crop_pct), int(width / crop_pct)]
    return {
        "mean": list(config.mean),
        "std": list(config.std),
        "resize": resize,
        "crop": height if resize[0] > height else None,
        "interpolation": config.interpolation,
    }


def version() -> str | None:
    """Return the version of timm, or None if it is not installed."""
    try:
        return metadata.version("timm")
    except metadata.PackageNotFoundError:
        return None


def pretrained(name: str) -> str | None:
    """Return where timm's weights of the network are: a repository of the Hugging Face hub, a URL, or None."""
    config = _config(name)
    return config.hf_hub_id or config.url or None


def _config(name: str) -> Any:
    """Return timm's configuration of a network's weights; a name may end in their tag, as `resnet18.a1_in1k`."""
    timm, model = _timm(name), name.removeprefix(PREFIX)
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, known := timm.list_models(), n=5, cutoff=0)
        sentence = plugins.unknown("timm network", model, near).removesuffix(".")
        raise NetworkError(f"{sentence}, and {len(known) - len(near)} more.")
    try:
        return timm.get_pretrained_cfg(model)
    except RuntimeError:
        tags = timm.list_models(model.partition(".")[0], pretrained=True)
        raise NetworkError(plugins.unknown("timm network", model, tags)) from None


def _largest(value: Any) -> float:
    numbers = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int | float)]
    return max(numbers, default=0)


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as problem:
        raise NetworkError(f"{name} needs timm: pip install 'tspipe[timm]'") from problem
