"""Scores, against scikit-learn and by hand."""

import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, f1_score, recall_score, top_k_accuracy_score

from tspipe.deploy.scores import calibration_error, macro_f1, score, worst_classes


def test_macro_f1_is_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, predicted = (torch.randint(0, classes, (200,), generator=generator) for classes in (7, 6))
    assert macro_f1(predicted, labels, 9) == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_scores_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(300, 8, generator=generator, dtype=torch.float64).softmax(1)
    labels = torch.randint(0, 8, (300,), generator=generator)
    scores, predicted = score(probabilities, labels, labels), probabilities.argmax(1)
    assert scores.top1 == scores.agreement == pytest.approx(accuracy_score(labels, predicted))
    assert scores.top5 == pytest.approx(top_k_accuracy_score(labels, probabilities, k=5))
    recalls = recall_score(labels, predicted, average=None)
    assert scores.worst_classes == [(i, pytest.approx(recalls[i])) for i in recalls.argsort(stable=True)[:3]]
    confidence, correct = probabilities.max(1).values, predicted == labels
    accuracies, means = calibration_curve(correct, confidence, n_bins=15)
    counts = torch.histc(confidence, 15, 0, 1)
    expected = (counts[counts > 0] / 300 * (torch.tensor(accuracies) - torch.tensor(means)).abs()).sum()
    assert scores.calibration_error == pytest.approx(float(expected))


def test_the_calibration_error_is_the_gap_of_each_bin() -> None:
    # In the bin up to 10/15: confidence 0.65, accuracy 0.5. In the last: confidence 1, accuracy 1.
    confidence, correct = torch.tensor([0.65, 0.65, 1.0, 1.0]), torch.tensor([1, 0, 1, 1])
    assert calibration_error(confidence, correct) == pytest.approx(0.5 * 0.15)
    assert calibration_error(torch.ones(4), torch.zeros(4)) == 1


def test_accuracies_and_agreement() -> None:
    probabilities = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.05, 0.05], [0.05, 0.05, 0.5, 0.2, 0.1, 0.1]])
    probabilities = probabilities + torch.arange(6) * 1e-4
    scores = score(probabilities, torch.tensor([1, 0]), torch.tensor([0, 1]))
    assert (scores.top1, scores.top5, scores.agreement) == (0, 0.5, 0.5)
    assert score(probabilities[:, :5], torch.tensor([0, 2]), torch.tensor([0, 2])).top5 is None


def test_the_worst_classes_have_images() -> None:
    labels, predicted = torch.tensor([0, 0, 1, 1, 3, 4]), torch.tensor([0, 1, 0, 0, 3, 4])
    assert worst_classes(predicted, labels, 6) == [(1, 0), (0, 0.5), (3, 1)]
