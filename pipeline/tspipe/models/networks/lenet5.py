"""LeNet-5 in today's form (LeCun, Bottou, Bengio and Haffner, Gradient-Based Learning Applied to Document
Recognition, 1998, section II.B).

It has two 5×5 convolutions and three fully connected layers of the paper's sizes. It differs from the paper as is
common today: the activation is ReLU (paper: a scaled tanh), subsampling is a max-pool without weights (a trained
average), every map of the second convolution sees all six maps of the first (a table of connections, Table I), and
the output is a Linear (radial basis functions).
"""

from collections import OrderedDict

from torch import nn

from tspipe.models.networks._size import check_size, lenet_side


def build(num_classes: int, input_shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """Return a network from (n, C, H, W) float32 to logits (n, num_classes), for any C and any H, W of 16 or more.

    It has 62,006 parameters for (3, 32, 32) and 10 classes. Raises NetworkError for smaller images.
    """
    check_size("lenet5", input_shape, 16)
    channels, height, width = input_shape
    features = nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    classifier = nn.Sequential(
        nn.Linear(16 * lenet_side(height) * lenet_side(width), 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))
