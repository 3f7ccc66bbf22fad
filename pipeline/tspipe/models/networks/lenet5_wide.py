"""The LeNet-5 with wide layers of Table 1 of arXiv 2005.00393, which takes it from Wu and Gu (arXiv 1512.00242).

The paper states one of its sizes: 2,048 features before the last layer, where a student has the teacher's 64. The
others are this project's choice: LeNet-5's two 5×5 convolutions and max-pools, with 64 and 128 channels instead of 6
and 16. Max-pooling dropout, the subject of Wu and Gu, is an option: `keep=0.5`.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from tspipe.errors import NetworkError
from tspipe.models.networks._max_pool_dropout import MaxPoolDropout
from tspipe.models.networks._size import check_size, lenet_side


def build(
    num_classes: int,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    maps: Sequence[int] = (64, 128),
    hidden: int = 2048,
    keep: float = 1.0,
) -> nn.Module:
    """Return a network from (n, C, H, W) float32 to logits (n, num_classes), for any C and any H, W of 16 or more.

    It has 6,785,930 parameters for (3, 32, 32) and 10 classes.

    Args:
        maps: the channels of the two convolutions.
        hidden: the number of features before the last layer.
        keep: the probability that max-pooling keeps an activation; 1 drops none.

    Raises NetworkError for smaller images, and for a `keep` that is not above 0 and at most 1.
    """
    check_size("lenet5_wide", input_shape, 16)
    if not 0 < keep <= 1:
        raise NetworkError(
            f"lenet5_wide cannot keep an activation with probability {keep}: it must be above 0 and at most 1."
        )
    channels, height, width = input_shape
    first, second = maps
    features = nn.Sequential(
        nn.Conv2d(channels, first, 5),
        nn.ReLU(),
        _pool(keep),
        nn.Conv2d(first, second, 5),
        nn.ReLU(),
        _pool(keep),
    )
    flat = second * lenet_side(height) * lenet_side(width)
    classifier = nn.Sequential(nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))


def _pool(keep: float) -> nn.Module:
    return nn.MaxPool2d(2) if keep == 1 else MaxPoolDropout(keep)
