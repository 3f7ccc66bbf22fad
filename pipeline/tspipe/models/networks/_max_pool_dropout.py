"""Max-pooling dropout (Wu and Gu, Towards Dropout Training for Convolutional Neural Networks, arXiv 1512.00242)."""

import torch
from torch import Tensor, nn


def max_pool_dropout(images: Tensor, keep: float, training: bool) -> Tensor:
    """2×2 max-pooling of stride 2 in which every activation is kept with a probability only.

    In training, dropped activations are 0 before the maximum is taken. At test a region gives the expectation of that,
    Σ p·q^(n−i)·a_i over its n activations in ascending order: a_i is the maximum where it is kept and the n − i larger
    ones are not.

    Args:
        images: (n, C, H, W) activations of 0 or more; an odd last row or column is cut off, as by `max_pool2d`.
        keep: p; q is 1 − p.
        training: whether activations are dropped, by torch's own generator.
    """
    height, width = (extent // 2 * 2 for extent in images.shape[2:])
    regions = torch.stack([images[:, :, y:height:2, x:width:2] for y in (0, 1) for x in (0, 1)])
    if training:
        return (regions * torch.empty_like(regions).bernoulli_(keep)).amax(0)
    size = len(regions)
    chances = keep * (1 - keep) ** torch.arange(size - 1, -1, -1, dtype=images.dtype, device=images.device)
    return torch.einsum("i,inchw->nchw", chances, regions.sort(0).values)


class MaxPoolDropout(nn.Module):
    """`max_pool_dropout` as a layer, (n, C, H, W) to (n, C, ⌊H/2⌋, ⌊W/2⌋)."""

    def __init__(self, keep: float):
        super().__init__()
        self.keep = keep

    def forward(self, images: Tensor) -> Tensor:
        """Pool, dropping activations in training mode."""
        return max_pool_dropout(images, self.keep, self.training)

    def extra_repr(self) -> str:
        """What is printed of it."""
        return f"keep={self.keep}"
