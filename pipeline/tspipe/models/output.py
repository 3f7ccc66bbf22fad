"""What a network gives: features and logits."""

from typing import NamedTuple

from torch import Tensor


class Output(NamedTuple):
    """What a network gives for n images: penultimate features (n, d) and logits (n, c), float32."""

    features: Tensor
    logits: Tensor
