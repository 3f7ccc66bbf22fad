"""The page of `tspipe eval`, and the Pareto front."""

import base64
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from shared import HOSTILE
from tspipe.cache import Cache
from tspipe.deploy.counts import Counts
from tspipe.deploy.evaluate import Evaluation
from tspipe.deploy.labelled_images import open_labelled_images
from tspipe.deploy.latency import Latency
from tspipe.deploy.scores import score
from tspipe.experiments import evaluation, figures
from tspipe.experiments.figures import Drawing
from tspipe.experiments.pareto import Point, close_groups, front, ticks


def words(page: str) -> str:
    """Return the text of a page, without its tags."""
    return " ".join(re.sub("<[^>]*>", " ", page).split())


@pytest.fixture
def one(digits: Cache) -> Evaluation:
    """A model that takes three images for another class, the last one with the highest probability."""
    labels = torch.from_numpy(digits.test.labels)
    predicted, confidence = labels.clone(), torch.full((len(labels),), 0.9)
    for row in (3, 5, 9):
        predicted[row], confidence[row] = (labels[row] + 1) % 10, 0.5 + row / 100
    probabilities = torch.nn.functional.one_hot(predicted, 10) * confidence[:, None]
    latencies = [Latency(1, 1, 0.123456, 1234.5, 9), Latency(32, 1, 5, 6, 9)]
    scores = score(probabilities, labels, labels)
    return Evaluation(
        HOSTILE, scores, predicted, confidence, Counts(5_822, 2_400_000), 999, latencies, {1: 2**20, 32: 2**21}
    )


def test_the_tables_show_what_was_measured(one: Evaluation, digits: Cache) -> None:
    quality, speed = evaluation.tables([one])
    assert quality.rows == [[HOSTILE, "99.6", "100.0", "99.6", "10.2", "99.6", "5.82k", "2.4M", "999 B"]]
    assert speed.headings == ["", "images", "1 thread", "95 %", "memory"]
    assert speed.rows == [[HOSTILE, "1", "0.123", "1,234", "1.0 MiB"], [HOSTILE, "32", "5", "6", "2.0 MiB"]]
    unmeasured = Evaluation(HOSTILE, one.scores, one.predicted, one.confidence, Counts(), None)
    assert len(evaluation.tables([unmeasured])) == 1
    assert "Milliseconds" not in evaluation.notes([unmeasured], open_labelled_images(digits))[-1]


def test_the_page_shows_confusions_and_mistakes_and_loads_nothing(
    one: Evaluation, digits: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = open_labelled_images(digits)
    evaluation.write(tmp_path / "a" / "page.html", [one], [test])
    text = (tmp_path / "a" / "page.html").read_text()
    assert "<script" not in text
    assert "\x1b" not in text
    uris = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(uris) == 3
    first = torch.tensor(list(Image.open(io.BytesIO(base64.b64decode(uris[0]))).tobytes())).view(16, 16)
    (expected,) = test.images.batches([torch.tensor([9])])
    assert (first - expected[0, 0]).abs().float().mean() < 4  # by JPEG
    label, predicted = (digits.classes[int(i[9])] for i in (test.labels, one.predicted))
    assert f"{predicted} 59.0% is {label}" in words(text)
    assert text.index("59.0%") < text.index("55.0%") < text.index("53.0%")
    monkeypatch.setattr(evaluation, "_MOST_CLASSES", 9)
    monkeypatch.setattr(figures, "render", lambda name, paint: Drawing(name, "", "", "<svg></svg>", b""))
    large = evaluation._uri(torch.randint(0, 256, (3, 128, 96), dtype=torch.uint8))
    monkeypatch.setattr(evaluation, "_uri", lambda pixels: large)
    evaluation.write(tmp_path / "page.html", [one], [test])
    text = (tmp_path / "page.html").read_text()
    assert f"{label} as {predicted}: 1" in words(text)
    assert large in text  # other long text is shortened


def test_the_front_has_what_no_other_model_beats() -> None:
    cheap, dear, beaten, equal = Point("a", 1, 0.5), Point("b", 9, 0.9), Point("c", 5, 0.4), Point("d", 9, 0.8)
    assert front([dear, beaten, equal, cheap]) == [cheap, dear]


def test_points_whose_labels_would_overlap_share_one() -> None:
    assert close_groups([(0, 0), (40, 0), (3, 4), (0, 90)]) == [[0, 2], [1], [3]]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (268e3, 291e3, [270e3, 276e3, 282e3, 288e3]),
        (235e3, 980e3, [3e5, 4e5, 5e5, 7e5]),
        (0.08, 9, [0.1, 0.2, 0.5, 1, 2, 5]),
        (4e5, 7e9, [1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9, 3e9]),
    ],
)
def test_ticks_are_few_enough_to_read(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)
