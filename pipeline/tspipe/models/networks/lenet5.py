"""LeNet-5 in today's form (LeCun, Bottou, Bengio and Haffner, Gradient-Based Learning Applied to Document
Recognition, 1998, section II.B).

Two 5×5 convolutions and three fully connected layers of the paper's sizes. As is usual today, the activation is
ReLU where the paper has a scaled tanh, subsampling is a max-pool without weights where it has a trained average,
every map of the second convolution sees all six of the first where it has a table of connections (Table I), and
the output is a Linear where it has radial basis functions.
"""

from collections import OrderedDict

from torch import nn

from tspipe.errors import NetworkError


def build(num_classes: int, input_shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """(n, C, H, W) float32 to logits (n, num_classes), for any C and any H, W of 16 or more.

    For (3, 32, 32) and 10 classes it has 62,006 parameters. Raises NetworkError for smaller images.
    """
    channels, height, width = input_shape
    if min(height, width) < 16:
        raise NetworkError(
            f"lenet5 takes images of 16×16 pixels or more, these have {height}×{width}. Enlarge them: "
            "--set preprocess.resize=[32,32]"
        )
    features = nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    classifier = nn.Sequential(
        nn.Linear(16 * _pooled(height) * _pooled(width), 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))


def _pooled(size: int) -> int:
    """What two rounds of a valid 5×5 convolution and a max-pool of 2 leave of a side."""
    return ((size - 4) // 2 - 4) // 2
