"""The smallest images that a network takes."""

from tspipe.errors import NetworkError


def check_size(name: str, input_shape: tuple[int, int, int], smallest: int) -> None:
    """Raise NetworkError for images (C, H, W) of fewer than `smallest` pixels a side."""
    _, height, width = input_shape
    if min(height, width) < smallest:
        raise NetworkError(
            f"{name} takes images of {smallest}×{smallest} pixels or more, these have {height}×{width}. Enlarge them: "
            "--set preprocess.resize=[32,32]"
        )


def lenet_side(side: int) -> int:
    """Return the side of LeNet-5's last maps: two 5×5 convolutions without padding, a 2×2 max-pool after each."""
    return ((side - 4) // 2 - 4) // 2
