"""NTS-Net's anchors, suppression and crops compared with slow, plain references (plain_regions.py)."""

import pytest
import torch
import torch.nn.functional as F

import plain_regions as plain
from tspipe.models.networks import _ntsnet_regions as regions


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# --- Anchors


def test_anchors_equal_the_plain_reference():
    assert regions.anchor_boxes(448).tolist() == plain.anchors(448)


def test_anchors_of_the_published_size_by_hand():
    boxes = regions.anchor_boxes(448)
    assert boxes.shape == (1614, 4) and boxes.dtype == torch.int64
    # 48·2^⅓ = 60.48; /√0.667 = 74.05 high, ·√0.667 = 49.39 wide, around 224 + 16.
    assert boxes[0].tolist() == [202, 215, 277, 264]
    # The next anchor is one stride to the right; the 15th is one stride below.
    assert boxes[1].tolist() == [202, 247, 277, 296]
    assert boxes[14].tolist() == [234, 215, 309, 264]
    # Level 64 begins after 6·14² anchors: 96·2^⅓ = 120.95, 148.10 high, 98.78 wide, around 224 + 32.
    assert boxes[1176].tolist() == [181, 206, 330, 305]
    # Level 128 after 6·7² more: 192/√0.667 = 235.09 high, 156.81 wide, around 224 + 64.
    assert boxes[1470].tolist() == [170, 209, 405, 366]
    # 192·2^⅔ = 304.78; /√1.5 = 248.85 high, ·√1.5 = 373.28 wide, around 224 + 448.
    assert boxes[-1].tolist() == [547, 485, 796, 858]


@pytest.mark.parametrize("side", [16, 17, 28, 32, 33, 65, 129, 224, 300])
def test_anchors_of_other_sides_lie_within_the_margin(side):
    y0, x0, y1, x1 = regions.anchor_boxes(side).unbind(1)
    assert min(y0.min(), x0.min()) >= 0 and max(y1.max(), x1.max()) <= side + 2 * (side // 2)
    assert (y1 > y0).all() and (x1 > x0).all()


@pytest.mark.parametrize("side", [128, 224, 256])
def test_anchors_scale_with_the_side(side):
    edge = side + 2 * (side // 2)
    assert regions.anchor_boxes(side).tolist() == [[min(end, edge) for end in box] for box in plain.anchors(side)]


# --- Non-maximum suppression


@pytest.mark.parametrize("values", [4, 1000, None], ids=["many ties", "some ties", "no ties"])
@pytest.mark.parametrize("side", [64, 192])
def test_suppression_is_greedy(side, values):
    boxes = regions.anchor_boxes(side)
    scores = torch.rand(5, len(boxes)) if values is None else torch.randint(values, (5, len(boxes))).float()
    expected = [plain.suppressed(row, boxes.tolist(), 6) for row in scores.tolist()]
    assert regions.suppress(scores, regions.overlapping(boxes), 6).tolist() == expected


def test_suppression_of_the_published_anchors():
    boxes = regions.anchor_boxes(448)
    scores = torch.randn(3, 1614)
    expected = [plain.suppressed(row, boxes.tolist(), 6) for row in scores.tolist()]
    assert regions.suppress(scores, regions.overlapping(boxes), 6).tolist() == expected


@pytest.mark.parametrize("count", [2, 6, 21])
def test_the_best_suppressed_boxes_follow_where_too_few_remain(count):
    boxes = regions.anchor_boxes(16)
    scores = torch.randint(5, (4, len(boxes))).float()
    expected = [plain.suppressed(row, boxes.tolist(), count) for row in scores.tolist()]
    assert regions.suppress(scores, regions.overlapping(boxes), count).tolist() == expected


def test_boxes_overlap_from_an_iou_of_exactly_a_quarter():
    boxes = torch.tensor([[0, 0, 2, 2], [0, 0, 4, 4], [0, 0, 17, 1], [0, 0, 4, 1], [7, 7, 9, 9]])
    overlaps = regions.overlapping(boxes).tolist()
    assert overlaps == [[plain.overlap(one, other) for other in boxes.tolist()] for one in boxes.tolist()]
    assert overlaps[0][1] and not overlaps[2][3]  # 4/16 and 4/17


# --- Crops


@pytest.mark.parametrize("channels_last", [False, True])
def test_crops_equal_interpolate(channels_last):
    images = F.pad(torch.rand(2, 3, 448, 448), [224] * 4)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    anchors = regions.anchor_boxes(448)
    # The first and last anchors, half in the padding; random ones; then one pixel, one row, and the padded image.
    boxes = torch.cat([anchors[[0, 1175, 1470, -1]], anchors[torch.randint(1614, (8,))]])
    extremes = torch.tensor([[300, 301, 301, 302], [300, 224, 301, 672], [0, 0, 896, 896], [446, 446, 670, 670]])
    boxes = torch.stack([torch.cat([boxes, extremes]), torch.cat([boxes, extremes]).flip(0)])
    expected = [
        plain.resized(image, box, 224) for image, row in zip(images, boxes.tolist(), strict=True) for box in row
    ]
    crops = regions.crop(images, boxes, 224)
    assert crops.shape == (32, 3, 224, 224)
    torch.testing.assert_close(crops, torch.stack(expected), rtol=0, atol=1e-5)


def test_a_crop_of_the_same_size_copies_the_pixels():
    images = torch.rand(1, 2, 9, 9)
    assert torch.equal(regions.crop(images, torch.tensor([[[2, 1, 7, 6]]]), 5), images[:, :, 2:7, 1:6])
