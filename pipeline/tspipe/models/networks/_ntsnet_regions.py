"""NTS-Net's regions: the anchors, non-maximum suppression, and crops."""

import torch
from torch import Tensor

_PUBLISHED_SIDE = 448  # pixels of the images for which the sizes below are
_CUBE_ROOTS = (2 ** (1 / 3), 2 ** (2 / 3))
_LEVELS = (  # stride, size, scales
    (32, 48, _CUBE_ROOTS),
    (64, 96, _CUBE_ROOTS),
    (128, 192, (1.0, *_CUBE_ROOTS)),
)
_RATIOS = (0.667, 1.0, 1.5)
_IOU_THRESHOLD = 0.25


def anchors_per_position() -> list[int]:
    """Return the number of anchors at a position of each level's map: scales times ratios."""
    return [len(scales) * len(_RATIOS) for _, _, scales in _LEVELS]


def anchor_boxes(side: int) -> Tensor:
    """Return the anchors (a, 4) int64 in an image of side S with a margin of S // 2 on each side: y0, x0, y1, x1.

    They are ordered by level, scale, ratio, y, x. Sizes are proportional to S. Strides are those of the network, so a
    level has ceil(S / stride)² positions; where a stride exceeds S, there is one position in the middle. Ends are
    exclusive and clamped to the margin, since for sides other than 448 the last anchors can reach beyond it.
    """
    levels = []
    for stride, size, scales in _LEVELS:
        step = min(stride, side)
        centres = step / 2 + step * torch.arange(-(-side // stride), dtype=torch.float64)
        axes = torch.tensor(scales, dtype=torch.float64), torch.tensor(_RATIOS, dtype=torch.float64), centres, centres
        scale, ratio, y, x = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
        half = size * side / _PUBLISHED_SIDE * scale / 2
        half_height, half_width = half / ratio.sqrt(), half * ratio.sqrt()
        levels.append(torch.stack([y - half_height, x - half_width, y + half_height, x + half_width], dim=1))
    margin = side // 2
    return (torch.cat(levels) + margin).long().clamp(max=side + 2 * margin)


def overlapping(boxes: Tensor) -> Tensor:
    """Return which pairs of boxes (a, 4) have an IoU of 0.25 or more: (a, a) bool."""
    y0, x0, y1, x1 = boxes.unbind(1)
    height = torch.minimum(y1, y1[:, None]) - torch.maximum(y0, y0[:, None])
    width = torch.minimum(x1, x1[:, None]) - torch.maximum(x0, x0[:, None])
    intersection = height.clamp(min=0) * width.clamp(min=0)
    area = (y1 - y0) * (x1 - x0)
    return intersection / (area + area[:, None] - intersection) >= _IOU_THRESHOLD


def suppress(scores: Tensor, overlaps: Tensor, count: int) -> Tensor:
    """Return the indices (n, count) int64 of the boxes that non-maximum suppression selects, best first.

    Each round selects the box of the highest score (the first of equal ones) and suppresses those that overlap it.
    When all boxes are suppressed, the best of them follow without further suppression.

    Args:
        scores: (n, a).
        overlaps: (a, a) bool, from `overlapping`; `count` is at most a.
    """
    selected = torch.zeros_like(scores, dtype=torch.bool)
    suppressed = selected.clone()
    indices = []
    for _ in range(count):
        excluded = torch.where(suppressed.all(1, keepdim=True), selected, suppressed)
        best = scores.masked_fill(excluded, -torch.inf).argmax(1, keepdim=True)
        selected = selected.scatter(1, best, True)
        suppressed = suppressed | selected | overlaps[best[:, 0]]
        indices.append(best)
    return torch.cat(indices, dim=1)


def crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Return the boxes' pixels, resized bilinearly with aligned corners, in one gather for all boxes.

    The result is (n·p, C, size, size), channels-last in memory. It equals F.interpolate for each box up to rounding.

    Args:
        images: (n, C, H, W).
        boxes: (n, p, 4) int64, y0, x0, y1, x1 within the image, ends exclusive.
        size: the side of the crops in pixels, 2 or more.
    """
    top, bottom, row_weight = _neighbours(boxes[..., 0], boxes[..., 2], size)
    left, right, column_weight = _neighbours(boxes[..., 1], boxes[..., 3], size)
    pixels = images.movedim(1, -1)
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    column_weight = column_weight[:, :, None, :, None].to(images.dtype)

    def rows(y: Tensor) -> Tensor:
        y = y[..., None]
        return torch.lerp(pixels[image, y, left[:, :, None]], pixels[image, y, right[:, :, None]], column_weight)

    resized = torch.lerp(rows(top), rows(bottom), row_weight[..., None, None].to(images.dtype))
    return resized.flatten(0, 1).movedim(-1, 1)


def _neighbours(start: Tensor, end: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pixels before and after each of `size` even steps from a box's first pixel to its last, and weights.

    Weights (n, p, size) are those of the pixels after.
    """
    # In single precision, as in F.interpolate: other rounding would change the published features.
    last = end - start - 1
    steps = (last.float() / (size - 1))[..., None] * torch.arange(size, device=start.device)
    before = torch.minimum(steps.long(), last[..., None])
    after = torch.minimum(before + 1, last[..., None])
    return before + start[..., None], after + start[..., None], steps - before
