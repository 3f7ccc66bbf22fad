"""The LeNet-5 with wide layers of Table 1 of arXiv 2005.00393, which takes it from Wu and Gu (arXiv 1512.00242).

Of its sizes the table's paper gives one, the 2,048 features before the last layer, for which a student has the
teacher's 64. The others are our reading: LeNet-5's two 5×5 convolutions and max-pools, with 64 and 128 maps for 6 and
16. Max-pooling dropout, which is Wu and Gu's subject, is an option: `keep=0.5`.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from tspipe.errors import NetworkError
from tspipe.models.networks._max_pool_dropout import MaxPoolDropout


def build(
    num_classes: int,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    maps: Sequence[int] = (64, 128),
    hidden: int = 2048,
    keep: float = 1.0,
) -> nn.Module:
    """(n, C, H, W) float32 to logits (n, num_classes), for any C and any H, W of 16 or more.

    For (3, 32, 32) and 10 classes it has 6,785,930 parameters.

    Args:
        maps: of the two convolutions.
        hidden: features before the last layer.
        keep: the probability with which max-pooling keeps an activation; 1 drops none.

    Raises NetworkError for smaller images, and for a `keep` that is no probability above 0.
    """
    channels, height, width = input_shape
    if min(height, width) < 16:
        raise NetworkError(
            f"lenet5_wide takes images of 16×16 pixels or more, these have {height}×{width}. Enlarge them: "
            "--set preprocess.resize=[32,32]"
        )
    if not 0 < keep <= 1:
        raise NetworkError(
            f"lenet5_wide cannot keep an activation with probability {keep}: it is above 0, and 1 at most."
        )
    first, second = maps
    features = nn.Sequential(
        nn.Conv2d(channels, first, 5),
        nn.ReLU(),
        _pool(keep),
        nn.Conv2d(first, second, 5),
        nn.ReLU(),
        _pool(keep),
    )
    rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
    classifier = nn.Sequential(nn.Linear(second * rows * columns, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))


def _pool(keep: float) -> nn.Module:
    return nn.MaxPool2d(2) if keep == 1 else MaxPoolDropout(keep)
