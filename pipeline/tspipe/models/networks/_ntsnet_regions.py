"""NTS-Net's regions: where the anchors lie, which of them are kept, and their pixels."""

import torch
from torch import Tensor

PUBLISHED_SIDE = 448  # of the images that the sizes below are for
_CUBE_ROOTS = (2 ** (1 / 3), 2 ** (2 / 3))
_LEVELS = (  # stride, size, scales
    (32, 48, _CUBE_ROOTS),
    (64, 96, _CUBE_ROOTS),
    (128, 192, (1.0, *_CUBE_ROOTS)),
)
_RATIOS = (0.667, 1.0, 1.5)
_SAME_PLACE = 0.25  # IoU


def per_position() -> list[int]:
    """How many anchors each position of each level's map has: scales times ratios."""
    return [len(scales) * len(_RATIOS) for _, _, scales in _LEVELS]


def anchor_boxes(side: int) -> Tensor:
    """The anchors (a, 4) int64 in an image of side S with a margin of S // 2 on each side: y0, x0, y1, x1.

    Their order is level, scale, ratio, y, x. Sizes are in proportion to S, strides are those of the network, so a
    level has ceil(S / stride)² positions; only where a stride exceeds S is it S, with one position in the middle.
    Ends are exclusive and within the margin: for sides other than 448 the last anchors can reach beyond it.
    """
    levels = []
    for stride, size, scales in _LEVELS:
        step = min(stride, side)
        centres = step / 2 + step * torch.arange(-(-side // stride), dtype=torch.float64)
        axes = torch.tensor(scales, dtype=torch.float64), torch.tensor(_RATIOS, dtype=torch.float64), centres, centres
        scale, ratio, y, x = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
        half = size * side / PUBLISHED_SIDE * scale / 2
        half_height, half_width = half / ratio.sqrt(), half * ratio.sqrt()
        levels.append(torch.stack([y - half_height, x - half_width, y + half_height, x + half_width], dim=1))
    margin = side // 2
    return (torch.cat(levels) + margin).long().clamp(max=side + 2 * margin)


def same_place(boxes: Tensor) -> Tensor:
    """Which pairs of boxes (a, 4) have an IoU of 0.25 or more: (a, a) bool."""
    y0, x0, y1, x1 = boxes.unbind(1)
    height = torch.minimum(y1, y1[:, None]) - torch.maximum(y0, y0[:, None])
    width = torch.minimum(x1, x1[:, None]) - torch.maximum(x0, x0[:, None])
    both = height.clamp(min=0) * width.clamp(min=0)
    area = (y1 - y0) * (x1 - x0)
    return both / (area + area[:, None] - both) >= _SAME_PLACE


def suppress(scores: Tensor, overlaps: Tensor, count: int) -> Tensor:
    """Non-maximum suppression: the indices (n, count) int64 of the boxes kept, the best first.

    Each round takes the box of the highest score, of equal ones the first, and puts aside those in its place. When
    none is left, as with few boxes only, the best of those put aside are taken, without further suppression.

    Args:
        scores: (n, a).
        overlaps: (a, a) bool, which boxes are in the same place; `count` is at most a.
    """
    taken = torch.zeros_like(scores, dtype=torch.bool)
    aside = taken.clone()
    kept = []
    for _ in range(count):
        closed = torch.where(aside.all(1, keepdim=True), taken, aside)
        best = scores.masked_fill(closed, -torch.inf).argmax(1, keepdim=True)
        taken = taken.scatter(1, best, True)
        aside = aside | taken | overlaps[best[:, 0]]
        kept.append(best)
    return torch.cat(kept, dim=1)


def crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Boxes' pixels, resized bilinearly with the corners aligned, in one gather for all of them.

    Args:
        images: (n, C, H, W).
        boxes: (n, p, 4) int64, y0, x0, y1, x1 within the image, ends exclusive.
        size: side of what is given, 2 or more.

    Gives (n·p, C, size, size), channels-last in memory: what F.interpolate gives for each box alone, to rounding.
    """
    top, bottom, down = _neighbours(boxes[..., 0], boxes[..., 2], size)
    left, right, across = _neighbours(boxes[..., 1], boxes[..., 3], size)
    pixels = images.movedim(1, -1)
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    across = across[:, :, None, :, None].to(images.dtype)

    def rows(y: Tensor) -> Tensor:
        y = y[..., None]
        return torch.lerp(pixels[image, y, left[:, :, None]], pixels[image, y, right[:, :, None]], across)

    resized = torch.lerp(rows(top), rows(bottom), down[..., None, None].to(images.dtype))
    return resized.flatten(0, 1).movedim(-1, 1)


def _neighbours(start: Tensor, end: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `size` even steps from a box's first pixel to its last: the pixels before and after, and the way between."""
    # In single precision, as F.interpolate does it: rounded otherwise, features would not be the published ones.
    last = end - start - 1
    steps = (last.float() / (size - 1))[..., None] * torch.arange(size, device=start.device)
    before = torch.minimum(steps.long(), last[..., None])
    after = torch.minimum(before + 1, last[..., None])
    return before + start[..., None], after + start[..., None], steps - before
