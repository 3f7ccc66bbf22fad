"""Slow references for NTS-Net's regions, written as the paper and its code describe them, one region at a time."""

import itertools

import torch.nn.functional as F


def anchors(side, levels=(32, 64, 128), sizes=(48, 96, 192)):
    """Return the anchors of an image, by nested loops, before clamping."""
    cube = [2 ** (1 / 3), 2 ** (2 / 3)]
    boxes = []
    for stride, size, scales in zip(levels, sizes, [cube, cube, [1, *cube]], strict=True):
        positions = [stride / 2 + k * stride for k in range(-(-side // stride))]
        for scale, ratio, y, x in itertools.product(scales, [0.667, 1, 1.5], positions, positions):
            height = size * side / 448 * scale / ratio**0.5
            width = size * side / 448 * scale * ratio**0.5
            box = [y - height / 2, x - width / 2, y + height / 2, x + width / 2]
            boxes.append([int(edge + side // 2) for edge in box])
    return boxes


def overlap(one, other):
    """Return whether the IoU of two boxes is 1/4 or more, in integer arithmetic."""
    height = max(0, min(one[2], other[2]) - max(one[0], other[0]))
    width = max(0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return 4 * height * width >= sum(areas) - height * width


def suppressed(scores, boxes, count):
    """Return the indices selected for one image: greedy, ties in order, then the best suppressed ones."""
    order = sorted(range(len(boxes)), key=lambda i: (-scores[i], i))
    kept = []
    for i in order:
        if not any(overlap(boxes[i], boxes[j]) for j in kept):
            kept.append(i)
    rest = [i for i in order if i not in kept]
    return (kept + rest)[:count]


def resized(image, box, size):
    """Return one box's pixels, resized by F.interpolate."""
    y0, x0, y1, x1 = box
    return F.interpolate(image[None, :, y0:y1, x0:x1], (size, size), mode="bilinear", align_corners=True)[0]
