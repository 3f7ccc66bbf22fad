"""NTS-Net's anchors, suppression and crops against slow, plain references (plain_regions.py)."""

import pytest
import torch
import torch.nn.functional as F

import plain_regions as plain
from tspipe.models.networks import _ntsnet_regions as regions


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


# --- Anchors


def test_anchors_are_those_of_the_nested_loops():
    assert regions.anchor_boxes(448).tolist() == plain.anchors(448)


def test_anchors_of_the_published_size_by_hand():
    boxes = regions.anchor_boxes(448)
    assert boxes.shape == (1614, 4) and boxes.dtype == torch.int64
    # 48·2^⅓ = 60.48; /√0.667 = 74.05 high, ·√0.667 = 49.39 wide, around 224 + 16.
    assert boxes[0].tolist() == [202, 215, 277, 264]
    # The next one is a stride to the right, the one after a row a stride below.
    assert boxes[1].tolist() == [202, 247, 277, 296]
    assert boxes[14].tolist() == [234, 215, 309, 264]
    # Level 64 begins after 6·14² anchors: 96·2^⅓ = 120.95, 148.10 high, 98.78 wide, around 224 + 32.
    assert boxes[1176].tolist() == [181, 206, 330, 305]
    # Level 128 after 6·7² more: 192/√0.667 = 235.09 high, 156.81 wide, around 224 + 64.
    assert boxes[1470].tolist() == [170, 209, 405, 366]
    # 192·2^⅔ = 304.78; /√1.5 = 248.85 high, ·√1.5 = 373.28 wide, around 224 + 448.
    assert boxes[-1].tolist() == [547, 485, 796, 858]


@pytest.mark.parametrize("side", [16, 17, 28, 32, 33, 65, 129, 224, 300])
def test_anchors_of_other_sides_have_pixels_within_the_margin(side):
    y0, x0, y1, x1 = regions.anchor_boxes(side).unbind(1)
    assert min(y0.min(), x0.min()) >= 0 and max(y1.max(), x1.max()) <= side + 2 * (side // 2)
    assert (y1 > y0).all() and (x1 > x0).all()


@pytest.mark.parametrize("side", [128, 224, 256])
def test_anchors_of_other_sides_are_in_proportion(side):
    edge = side + 2 * (side // 2)
    assert regions.anchor_boxes(side).tolist() == [[min(end, edge) for end in box] for box in plain.anchors(side)]


# --- Non-maximum suppression


@pytest.mark.parametrize("values", [4, 1000, None], ids=["many ties", "some ties", "no ties"])
@pytest.mark.parametrize("side", [64, 192])
def test_suppression_is_the_greedy_one(side, values):
    boxes = regions.anchor_boxes(side)
    scores = torch.rand(5, len(boxes)) if values is None else torch.randint(values, (5, len(boxes))).float()
    expected = [plain.suppressed(row, boxes.tolist(), 6) for row in scores.tolist()]
    assert regions.suppress(scores, regions.same_place(boxes), 6).tolist() == expected


def test_suppression_of_the_published_anchors():
    boxes = regions.anchor_boxes(448)
    scores = torch.randn(3, 1614)
    expected = [plain.suppressed(row, boxes.tolist(), 6) for row in scores.tolist()]
    assert regions.suppress(scores, regions.same_place(boxes), 6).tolist() == expected


@pytest.mark.parametrize("count", [2, 6, 21])
def test_where_too_few_are_left_the_best_of_the_rest_follow(count):
    boxes = regions.anchor_boxes(16)
    scores = torch.randint(5, (4, len(boxes))).float()
    expected = [plain.suppressed(row, boxes.tolist(), count) for row in scores.tolist()]
    assert regions.suppress(scores, regions.same_place(boxes), count).tolist() == expected


def test_an_overlap_of_exactly_a_quarter_is_the_same_place():
    boxes = torch.tensor([[0, 0, 2, 2], [0, 0, 4, 4], [0, 0, 17, 1], [0, 0, 4, 1], [7, 7, 9, 9]])
    found = regions.same_place(boxes).tolist()
    assert found == [[plain.overlap(one, other) for other in boxes.tolist()] for one in boxes.tolist()]
    assert found[0][1] and not found[2][3]  # 4/16 and 4/17


# --- Crops


@pytest.mark.parametrize("channels_last", [False, True])
def test_crops_are_those_of_interpolate(channels_last):
    images = F.pad(torch.rand(2, 3, 448, 448), [224] * 4)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    anchors = regions.anchor_boxes(448)
    # The first and last of all, half in the padding; some others; one pixel, one row, and the whole image.
    boxes = torch.cat([anchors[[0, 1175, 1470, -1]], anchors[torch.randint(1614, (8,))]])
    odd = torch.tensor([[300, 301, 301, 302], [300, 224, 301, 672], [0, 0, 896, 896], [446, 446, 670, 670]])
    boxes = torch.stack([torch.cat([boxes, odd]), torch.cat([boxes, odd]).flip(0)])
    expected = [
        plain.resized(image, box, 224) for image, row in zip(images, boxes.tolist(), strict=True) for box in row
    ]
    found = regions.crop(images, boxes, 224)
    assert found.shape == (32, 3, 224, 224)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)


def test_a_crop_of_its_own_size_is_the_pixels():
    images = torch.rand(1, 2, 9, 9)
    assert torch.equal(regions.crop(images, torch.tensor([[[2, 1, 7, 6]]]), 5), images[:, :, 2:7, 1:6])
