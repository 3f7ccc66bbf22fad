"""The LeNet-5 with wide layers of Table 1 of arXiv 2005.00393, which takes it from Wu and Gu (Towards Dropout Training
for Convolutional Neural Networks, arXiv 1512.00242).

The paper states one of its sizes: 2,048 features before the last layer, where a student has the teacher's 64. The
others are this project's choice: LeNet-5's two 5×5 convolutions and max-pools, with 64 and 128 channels instead of 6
and 16. Max-pooling dropout, the subject of Wu and Gu, is an option: `keep=0.5`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tspipe.errors import NetworkError
from tspipe.models.networks._input import check_size
from tspipe.models.networks.lenet5 import lenet


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
    pool = (lambda: nn.MaxPool2d(2)) if keep == 1 else (lambda: MaxPoolDropout(keep))
    return lenet(input_shape, maps, (hidden, num_classes), pool)


class MaxPoolDropout(nn.Module):
    """Max-pool 2×2 regions with stride 2, keeping each activation with a probability p.

    In training, dropped activations are 0 before the maximum is taken. In evaluation, a region returns the expectation
    of that, Σ p·q^(n−i)·a_i over its n activations in ascending order: a_i is the maximum if it is kept and the n − i
    larger ones are dropped, each with probability q = 1 − p.
    """

    def __init__(self, keep: float):
        super().__init__()
        self.keep = keep

    def forward(self, images: Tensor) -> Tensor:
        """Map activations (n, C, H, W) of 0 or more to (n, C, ⌊H/2⌋, ⌊W/2⌋)."""
        height, width = (extent // 2 * 2 for extent in images.shape[2:])
        regions = torch.stack([images[:, :, y:height:2, x:width:2] for y in (0, 1) for x in (0, 1)])
        if self.training:
            return (regions * torch.empty_like(regions).bernoulli_(self.keep)).amax(0)
        exponents = torch.arange(len(regions) - 1, -1, -1, dtype=images.dtype, device=images.device)
        return torch.einsum("i,inchw->nchw", self.keep * (1 - self.keep) ** exponents, regions.sort(0).values)

    def extra_repr(self) -> str:
        """Return the text between the parentheses of `repr`."""
        return f"keep={self.keep}"
