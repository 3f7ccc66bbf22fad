"""What a network returns: features and logits."""

from typing import NamedTuple

from torch import Tensor


class Output(NamedTuple):
    """Penultimate features (n, d) and logits (n, c) of n images, float32."""

    features: Tensor
    logits: Tensor
