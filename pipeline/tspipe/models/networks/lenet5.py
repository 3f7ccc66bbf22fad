"""LeNet-5 in today's form (LeCun, Bottou, Bengio and Haffner, Gradient-Based Learning Applied to Document
Recognition, 1998, section II.B).

It has two 5×5 convolutions and three fully connected layers of the paper's sizes. It differs from the paper as is
common today: the activation is ReLU (paper: a scaled tanh), subsampling is a max-pool without weights (a trained
average), every map of the second convolution sees all six maps of the first (a table of connections, Table I), and
the output is a Linear (radial basis functions).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from tspipe.models.networks._input import check_size


def build(num_classes: int, input_shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """Return a network from (n, C, H, W) float32 to logits (n, num_classes), for any C and any H, W of 16 or more.

    It has 62,006 parameters for (3, 32, 32) and 10 classes. Raises NetworkError for smaller images.
    """
    check_size("lenet5", input_shape, 16)
    return lenet(input_shape, (6, 16), (120, 84, num_classes), lambda: nn.MaxPool2d(2))


def lenet(
    input_shape: tuple[int, int, int], maps: Sequence[int], widths: Sequence[int], pool: Callable[[], nn.Module]
) -> nn.Sequential:
    """Return two 5×5 convolutions with `maps` channels, each before a 2×2 pool, and Linears with `widths` outputs."""
    channels, *sides = input_shape
    first, second = maps
    features = nn.Sequential(
        nn.Conv2d(channels, first, 5), nn.ReLU(), pool(), nn.Conv2d(first, second, 5), nn.ReLU(), pool()
    )
    height, width = (((side - 4) // 2 - 4) // 2 for side in sides)
    classifier = nn.Sequential(nn.Linear(second * height * width, widths[0]))
    for inputs, outputs in pairwise(widths):
        classifier.extend([nn.ReLU(), nn.Linear(inputs, outputs)])
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))
