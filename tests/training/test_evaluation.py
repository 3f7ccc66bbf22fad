from types import SimpleNamespace
from typing import Any

import torch

from tspipe.training.evaluation import Evaluator


def test_learners_that_guess_are_remarked_on_with_likely_reasons() -> None:
    labels = torch.arange(100) % 10

    class Images:
        def __len__(self) -> int:
            return 100

        def batches(self, order: Any) -> Any:
            return [labels[rows] for rows in order]

    data: Any = SimpleNamespace(
        test=Images(), test_labels=labels, train_count=60, preprocess=SimpleNamespace(normalise=lambda images: images)
    )
    constant, perfect = (
        SimpleNamespace(name=name, logits=logits, optimization=SimpleNamespace(lr=0.1))
        for name, logits in (
            ("constant", lambda images: torch.eye(10)[torch.full_like(images, 3)]),
            ("perfect", lambda images: torch.eye(10)[images]),
        )
    )
    rows = [{"epoch": 4, "test_accuracy": 0.1}, {"epoch": 4, "test_accuracy": 1.0}]
    evaluator = Evaluator(data, None, 32)  # type: ignore[arg-type]
    assert list(evaluator.chance_remarks([constant, perfect], rows)) == [  # type: ignore[list-item]
        "constant gives all 100 test images the same class (10.00% are of it). Likely reasons: too few epochs (4) or "
        "training images (60) for its initial weights, or a learning rate (0.1) that is too high or too low."
    ]
