"""AlexNet for small images (after Krizhevsky, Sutskever and Hinton, ImageNet Classification with Deep Convolutional
Neural Networks, 2012, section 3).

The usual adaptation to 32×32: five convolutions, three max-pools, two hidden layers of 4096. It differs from the paper:

- the first convolution is 3×3 with stride 2 (paper: 11×11, stride 4), the second 3×3 (5×5);
- 64-192-384-256-256 maps, those of Krizhevsky's later one-GPU form (arXiv 1404.5997), not 96-256-384-384-256;
- no split over two GPUs (section 3.2), so every convolution sees all maps of the one before;
- no local response normalisation (3.3);
- max-pools are 2×2 with stride 2 and do not overlap (3.4: 3×3, stride 2);
- the map before the classifier is 2×2 (6×6), by average pooling where the image is not 32×32;
- dropout of 0.5 comes before each hidden layer, as in torchvision (4.2: after it, on its output);
- initial weights are PyTorch's (section 5: normal with deviation 0.01, and some biases 1).
"""

from collections import OrderedDict

from torch import nn

from tspipe.errors import NetworkError


def build(num_classes: int, input_shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """(n, C, H, W) float32 to logits (n, num_classes), for any C and any H, W of 15 or more.

    For 3 channels and 10 classes it has 23,272,266 parameters. Raises NetworkError for smaller images.
    """
    channels, height, width = input_shape
    if min(height, width) < 15:
        raise NetworkError(
            f"alexnet takes images of 15×15 pixels or more, these have {height}×{width}. Enlarge them: "
            "--set preprocess.resize=[32,32]"
        )
    features = nn.Sequential(
        nn.Conv2d(channels, 64, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 192, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )
    classifier = nn.Sequential(
        nn.Dropout(0.5),
        nn.Linear(256 * 2 * 2, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Linear(4096, num_classes),
    )
    return nn.Sequential(
        OrderedDict(features=features, avgpool=nn.AdaptiveAvgPool2d(2), flatten=nn.Flatten(), classifier=classifier)
    )
