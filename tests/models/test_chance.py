import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from tspipe.models.chance import is_suspicious, remark

RNG = np.random.default_rng(0)


def predictions(labels: np.ndarray, right: float, seed: int = 0) -> np.ndarray:
    """Predictions of which this share is right; the others are drawn from the labels."""
    draw = np.random.default_rng(seed)
    return np.where(draw.random(len(labels)) < right, labels, draw.permutation(labels))


BALANCED = [np.arange(2000) % 2, np.arange(1000) % 10, np.arange(20000) % 1000, np.arange(1000) % 1000]
IMBALANCED = np.repeat([0, 1], [950, 50])


@pytest.mark.parametrize("labels", [*BALANCED, IMBALANCED], ids=lambda labels: f"{labels.max() + 1}x{len(labels)}")
def test_guesses_are_remarked_on_and_little_knowledge_is_not(labels: np.ndarray) -> None:
    remarked = [remark(predictions(labels, 0, seed), labels) is not None for seed in range(50)]
    assert sum(remarked) >= 44  # of 50, where the deviation is exceeded by 2 to 3 %
    learned = predictions(labels, 0.15)
    assert remark(learned, labels) is None
    for predicted in (predictions(labels, 0, 1), np.zeros_like(labels)):
        assert is_suspicious(float((predicted == labels).mean()), labels) or remark(predicted, labels) is None


def test_one_class_for_all_images() -> None:
    assert remark(np.full(1000, 3), np.arange(1000) % 10) == (
        "gives all 1,000 test images the same class (10.00% are of it)"
    )
    assert remark(np.zeros(9, np.int64), np.zeros(9, np.int64)) is None  # nothing else could be right
    assert remark(np.zeros(1, np.int64), np.ones(1, np.int64)) is None


def test_a_useful_classifier_of_imbalanced_classes_may_be_wrong_more_often_than_a_constant_one() -> None:
    predicted = IMBALANCED.copy()
    predicted[:60] = 1  # all 50 of the rare class are found, with 60 false alarms
    assert (predicted == IMBALANCED).mean() < 0.95
    assert cohen_kappa_score(predicted, IMBALANCED) > 0.5
    assert remark(predicted, IMBALANCED) is None


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_perfect_predictions_of_few_images_are_not_guesses(count: int) -> None:
    labels = np.arange(count) % 2
    assert remark(labels, labels) is None
    assert remark(1 - labels, labels) is not None


def test_the_limit_is_two_deviations_of_permuted_predictions() -> None:
    labels = np.repeat([0, 1, 2], [100, 60, 40])
    predicted = RNG.permutation(np.repeat([0, 1, 2], [20, 80, 100]))
    agreements = [(RNG.permutation(predicted) == labels).mean() for _ in range(4000)]
    expected = np.mean(agreements) + 2 * np.std(agreements)
    text = remark(np.sort(predicted)[::-1], labels)
    assert text is not None
    assert float(text.split()[-1].rstrip("%")) / 100 == pytest.approx(expected, abs=0.003)
