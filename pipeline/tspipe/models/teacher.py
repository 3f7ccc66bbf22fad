"""The teacher of a cache: built from the weights in the file, checked against its rows."""

import torch
from torch import Tensor, nn

from tspipe.cache import Cache
from tspipe.errors import CacheMismatch, NetworkError
from tspipe.models import feature_net, networks, weights
from tspipe.models.feature_net import FeatureNet
from tspipe.models.output import Output
from tspipe.recipes.schema import Recipe
from tspipe.utils import plugins

ROUNDING = 0.01  # of the largest feature: float16 rounds by 0.0005, another processor by less
_MOST_BYTES = 16  # of a weight: as float64, and again for what is no parameter


def load_teacher(
    cache: Cache, recipe: Recipe, input_shape: tuple[int, int, int], device: torch.device, data: bytes | None = None
) -> FeatureNet:
    """The teacher of a cache, made for inference, from the weights the file carries or from `data`, the same bytes.

    Raises NetworkError when they do not fit the network, CacheMismatch when the network does not fit the rows.
    """
    module, name = build_teacher(cache, recipe, input_shape, data)
    network = feature_net.freeze(module, name, input_shape, device)
    if network.width != cache.dimensions.width:
        raise CacheMismatch(
            f"{cache.path.name}: its teacher gives {network.width} features, its rows have {cache.dimensions.width}."
        )
    return network


def build_teacher(
    cache: Cache, recipe: Recipe, input_shape: tuple[int, int, int], data: bytes | None = None
) -> tuple[nn.Module, str]:
    """The plain network of a cache's teacher with its weights, on the CPU, and its name; raises as `load_teacher`."""
    name, options = teacher_network(cache, recipe), cache.manifest["teacher"]["options"]
    check_input_shape(cache, input_shape)
    source = f"the teacher's weights in {cache.path.name}"
    count = feature_net.count_parameters(name, len(cache.classes), input_shape, options)
    if cache.dimensions.weights_bytes > _MOST_BYTES * count + 2**20:  # before they are read: a file may have holes
        raise NetworkError(
            f"{source} take {cache.dimensions.weights_bytes:,} bytes, more than the {count:,} weights of {name} need."
        )
    tensors = weights.parse(data or cache.teacher_weights(), source)
    module, _ = feature_net.load_teacher(name, len(cache.classes), input_shape, options, tensors, source)
    return module, name


def check_input_shape(cache: Cache, input_shape: tuple[int, int, int]) -> None:
    """Raise CacheMismatch unless the cache's teacher takes images of this shape (C, H, W)."""
    stated = cache.manifest["teacher"]["options"].get("input_shape")
    if stated != list(input_shape):
        raise CacheMismatch(
            f"{cache.path.name}: its teacher takes images of {stated}, its dataset's are of {list(input_shape)}."
        )


def teacher_network(cache: Cache, recipe: Recipe) -> str:
    """The network of the cache's teacher: tspipe's own or torchvision's; a user's file only if the recipe names it."""
    name: str = cache.manifest["teacher"]["network"]
    own = recipe.teacher.network
    if plugins.is_file(own) and networks.recorded_name(own) == name:
        return own
    if name not in networks.names() and not name.startswith("torchvision:"):
        raise NetworkError(
            f"The teacher of {cache.path.name} is {name!r}, which is not one of tspipe's networks. "
            f"Name its file: --set teacher.network=./{name}.py"
        )
    return name


def run_teacher(teacher: FeatureNet, images: Tensor) -> Output:
    """What the teacher says of normalised images (n, C, H, W), for students to learn from."""
    with torch.inference_mode():
        said = teacher(images)
    return Output(*(part.clone() for part in said))  # autograd may keep the copies, not what was made in this mode


def check_teacher(teacher: FeatureNet, cache: Cache, images: Tensor) -> None:
    """Compare the live teacher with the rows it is said to have written, on the training split's first images.

    A teacher that draws at random each time it runs cannot be compared so, and is not. Raises CacheMismatch when the
    features of more than half of the images differ by more than rounding does: where a network chooses, as NTS-Net
    chooses parts, rounding may once make it choose otherwise, but another network differs everywhere.
    """
    live = run_teacher(teacher, images).features.cpu()
    views = cache.dimensions.views_of("train")  # of each image the first is the plain one
    cached = torch.from_numpy(cache.train.features[: len(images) * views : views]).float()
    apart = (live - cached).abs().amax(1) / cached.abs().max().clamp(min=1e-12)
    apart = apart.nan_to_num(torch.inf)
    if apart.median() > ROUNDING and not draws_at_random(teacher, images):
        raise CacheMismatch(
            f"{cache.path.name}: the teacher built here gives other features than the file holds, by up to "
            f"{float(apart.max()):.0%} of the largest. The code of its network has changed, or is not the one named."
        )


def draws_at_random(teacher: FeatureNet, images: Tensor) -> bool:
    """Whether the teacher gives other features each time it runs, as NTS-Net's `always_dropout` makes it."""
    first, second = (run_teacher(teacher, images).features for _ in range(2))
    return bool((first - second).abs().max() > ROUNDING * first.abs().max())


def count_teacher_parameters(cache: Cache, recipe: Recipe, input_shape: tuple[int, int, int]) -> int | None:
    """How many weights the cache's teacher has; None of one that cannot be built here."""
    options = cache.manifest["teacher"]["options"]
    try:
        return feature_net.count_parameters(teacher_network(cache, recipe), len(cache.classes), input_shape, options)
    except NetworkError:
        return None
