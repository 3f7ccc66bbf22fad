"""Max-pooling dropout (Wu and Gu, Towards Dropout Training for Convolutional Neural Networks, arXiv 1512.00242)."""

import torch
from torch import Tensor, nn


def max_pool_dropout(images: Tensor, keep: float, training: bool) -> Tensor:
    """Max-pool 2×2 regions with stride 2, keeping each activation with a probability.

    In training, dropped activations are 0 before the maximum is taken. In evaluation, a region returns the expectation
    of that, Σ p·q^(n−i)·a_i over its n activations in ascending order: a_i is the maximum if it is kept and the n − i
    larger ones are dropped.

    Args:
        images: activations (n, C, H, W) of 0 or more; an odd last row or column is ignored, as by `max_pool2d`.
        keep: p; q is 1 − p.
        training: whether to drop activations, with torch's generator.
    """
    height, width = (extent // 2 * 2 for extent in images.shape[2:])
    regions = torch.stack([images[:, :, y:height:2, x:width:2] for y in (0, 1) for x in (0, 1)])
    if training:
        return (regions * torch.empty_like(regions).bernoulli_(keep)).amax(0)
    exponents = torch.arange(len(regions) - 1, -1, -1, dtype=images.dtype, device=images.device)
    return torch.einsum("i,inchw->nchw", keep * (1 - keep) ** exponents, regions.sort(0).values)


class MaxPoolDropout(nn.Module):
    """`max_pool_dropout` as a layer, (n, C, H, W) to (n, C, ⌊H/2⌋, ⌊W/2⌋)."""

    def __init__(self, keep: float):
        super().__init__()
        self.keep = keep

    def forward(self, images: Tensor) -> Tensor:
        """Pool; drop activations in training mode."""
        return max_pool_dropout(images, self.keep, self.training)

    def extra_repr(self) -> str:
        """Return the text between the parentheses of `repr`."""
        return f"keep={self.keep}"
