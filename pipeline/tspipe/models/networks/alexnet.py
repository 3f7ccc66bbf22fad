"""AlexNet for small images (after Krizhevsky, Sutskever and Hinton, ImageNet Classification with Deep Convolutional
Neural Networks, 2012, section 3).

This is the common adaptation to 32×32: five convolutions, three max-pools, two hidden layers of 4096. It differs from
the paper:

- the first convolution is 3×3 with stride 2 (paper: 11×11, stride 4), the second 3×3 (5×5);
- it has 64-192-384-256-256 channels, as Krizhevsky's later one-GPU network (arXiv 1404.5997), not 96-256-384-384-256;
- it is not split over two GPUs (section 3.2), so every convolution sees all channels of the previous one;
- it has no local response normalisation (3.3);
- max-pools are 2×2 with stride 2 and do not overlap (3.4: 3×3, stride 2);
- the classifier's input is 2×2 (6×6), by average pooling where the image is not 32×32;
- dropout of 0.5 comes before each hidden layer, as in torchvision (4.2: after it, on its output);
- initial weights are PyTorch's (section 5: normal with a standard deviation of 0.01, and some biases of 1).
"""

from collections import OrderedDict

from torch import nn

from tspipe.models.networks._input import check_size


def build(num_classes: int, input_shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """Return a network from (n, C, H, W) float32 to logits (n, num_classes), for any C and any H, W of 15 or more.

    It has 23,272,266 parameters for 3 channels and 10 classes. Raises NetworkError for smaller images.
    """
    check_size("alexnet", input_shape, 15)
    features = nn.Sequential(
        nn.Conv2d(input_shape[0], 64, 3, stride=2, padding=1),
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
