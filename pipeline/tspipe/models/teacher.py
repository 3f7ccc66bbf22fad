"""The teacher of a cache: built from the weights in the file, and compared with the file's rows."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tspipe.cache import Cache
from tspipe.errors import CacheMismatch, NetworkError
from tspipe.models import chance, networks, program, weights
from tspipe.models.feature_net import FeatureNet
from tspipe.models.inference import freeze
from tspipe.models.loading import NetworkSpec, load_network
from tspipe.models.output import Output
from tspipe.recipes.schema import Recipe
from tspipe.utils import plugins

ROUNDING = 0.01  # of the largest feature; float16 rounds by 0.0005, another processor by less
_MAX_BYTES_PER_PARAMETER = 16  # float64, and as much again for buffers


def load_teacher(
    cache: Cache, recipe: Recipe, input_shape: tuple[int, int, int], device: torch.device, data: bytes | None = None
) -> FeatureNet:
    """Return the teacher of a cache, frozen for inference.

    Args:
        input_shape: (C, H, W).
        data: the bytes of the file's weights, if the caller has read them already.

    Raises NetworkError if the weights do not fit the network, CacheMismatch if the network does not fit the rows.
    """
    with _naming_versions(cache):
        module, name = build_teacher(cache, recipe, input_shape, data)
        network = freeze(module, name, input_shape, device)
        if network.width != cache.dimensions.width:
            raise CacheMismatch(
                f"{cache.path.name}: its teacher has {network.width} features, its rows have {cache.dimensions.width}."
            )
    return network


@contextlib.contextmanager
def _naming_versions(cache: Cache) -> Iterator[None]:
    """Add to an error which version of a library made the cache, if another one is installed."""
    try:
        yield
    except (CacheMismatch, NetworkError) as problem:
        teacher = cache.manifest["teacher"]
        made, installed = teacher.get("library"), networks.library(teacher["network"])
        if made is None or made == installed:
            raise
        package, version = made.split()
        raise type(problem)(
            f"{problem} The cache was made with {made}; {installed or f'no {package}'} is installed: pip install "
            f"{package}=={version}"
        ) from problem


def build_teacher(
    cache: Cache, recipe: Recipe, input_shape: tuple[int, int, int], data: bytes | None = None
) -> tuple[nn.Module, str]:
    """Return the network of a cache's teacher with its weights, on the CPU, and its name; see `load_teacher`."""
    check_input_shape(cache, input_shape)
    source = f"the teacher's weights in {cache.path.name}"
    if runs_program(cache, recipe) and (stored := cache.teacher_program()):
        tensors, name = weights.parse(data or cache.teacher_weights(), source), cache.manifest["teacher"]["network"]
        return program.load(stored, tensors, input_shape, f"The teacher's program in {cache.path.name}"), name
    spec = teacher_spec(cache, recipe, input_shape)
    count, size = spec.count_parameters(), cache.dimensions.weights_bytes
    # Checked before the weights are read: a sparse file may claim any size.
    if size > _MAX_BYTES_PER_PARAMETER * count + 2**20:
        raise NetworkError(f"{source} take {size:,} bytes, more than the {count:,} weights of {spec.name} need.")
    tensors = weights.parse(data or cache.teacher_weights(), source)
    return load_network(spec, tensors, source)[0], spec.name


def runs_program(cache: Cache, recipe: Recipe) -> bool:
    """Return whether the teacher is built from the program in the file: no code of its network is named."""
    name = cache.manifest["teacher"]["network"]
    installed = not networks.is_user_network(name) and not name.startswith("hub:")
    given = plugins.is_file(recipe.teacher.network)
    return not installed and not given and "program_sha256" in cache.manifest["teacher"]


def lacks_teacher(cache: Cache, recipe: Recipe) -> bool:
    """Return whether a cache's teacher cannot be built: it is not in the file, or its network's file is not given."""
    try:
        return not cache.has_teacher or not (runs_program(cache, recipe) or teacher_spec(cache, recipe, (1, 1, 1)))
    except NetworkError:
        return True


def check_input_shape(cache: Cache, input_shape: tuple[int, int, int]) -> None:
    """Raise CacheMismatch unless the cache's teacher takes images of this shape (C, H, W)."""
    recorded = cache.manifest["teacher"]["options"].get("input_shape")
    if recorded != list(input_shape):
        raise CacheMismatch(
            f"{cache.path.name}: its teacher takes images of {recorded}, its dataset has images of {list(input_shape)}."
        )


def teacher_spec(cache: Cache, recipe: Recipe, input_shape: tuple[int, int, int]) -> NetworkSpec:
    """Return the network of the cache's teacher for images of this shape (C, H, W).

    It is tspipe's, torchvision's or timm's, or a user's file that the recipe names. A file that only the cache names is
    never imported: the cache may come from anyone.
    """
    name, requested = cache.manifest["teacher"]["network"], recipe.teacher.network
    if plugins.is_file(requested) and networks.recorded_name(requested) == name:
        name = requested
    elif networks.is_user_network(name):
        raise NetworkError(
            f"The teacher of {cache.path.name} is {name!r}, which is not one of tspipe's networks. "
            f"Name its file: --teacher ./{name}.py (of tspipe verify: --set teacher.network=./{name}.py)"
        )
    return NetworkSpec(name, len(cache.classes), input_shape, cache.manifest["teacher"]["options"])


def run_teacher(teacher: FeatureNet, images: Tensor) -> Output:
    """Return the teacher's features and logits for normalised images (n, C, H, W), as targets for students."""
    with torch.inference_mode():
        output = teacher(images)
    return Output(*(part.clone() for part in output))  # autograd may save copies, but not inference tensors


def check_teacher(teacher: FeatureNet, cache: Cache, images: Tensor) -> None:
    """Compare the teacher's features for the first images of the training split with the cache's rows.

    Raises CacheMismatch if they differ by more than rounding for more than half of the images. A few may differ:
    where a network makes a discrete choice, as NTS-Net selects parts, rounding can change it. Another network differs
    on all images. A teacher that samples at random is not compared.
    """
    live = run_teacher(teacher, images).features.cpu()
    views = cache.dimensions.views_of("train")  # the first view of each image is the plain one
    cached = torch.from_numpy(cache.train.features[: len(images) * views : views]).float()
    difference = (live - cached).abs().amax(1) / cached.abs().max().clamp(min=1e-12)
    difference = difference.nan_to_num(torch.inf)
    if difference.median() > ROUNDING and not draws_at_random(teacher, images):
        with _naming_versions(cache):
            raise CacheMismatch(
                f"{cache.path.name}: the teacher built from this file computes other features than its rows hold, by "
                f"up to {float(difference.max()):.0%} of the largest. The code of its network has changed, or is "
                "another."
            )


def draws_at_random(teacher: FeatureNet, images: Tensor) -> bool:
    """Return whether the teacher's features differ from run to run, as with NTS-Net's `always_dropout`."""
    first, second = (run_teacher(teacher, images).features for _ in range(2))
    return bool((first - second).abs().max() > ROUNDING * first.abs().max())


def accuracy_warning(cache: Cache) -> str | None:
    """Return a warning if the teacher classifies the test images of a cache no better than by guessing."""
    labels = cache.test.labels
    if not chance.is_suspicious(cache.manifest["teacher"]["correct"]["test"] / len(labels), labels):
        return None
    problem = chance.remark(cache.test.logits.load().argmax(1), labels)
    return problem and (
        f"The teacher {problem}. Students would learn nothing from it. Likely reasons: its classes are others than the "
        "dataset's or in another order, or its preprocessing is not the one that it was trained with."
    )


def count_teacher_parameters(cache: Cache, recipe: Recipe, input_shape: tuple[int, int, int]) -> int | None:
    """Return the number of the teacher's parameters, or None if its network cannot be built."""
    try:
        return teacher_spec(cache, recipe, input_shape).count_parameters()
    except NetworkError:
        return None
