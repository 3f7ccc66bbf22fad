"""Finished run folders with given metrics, so that a test knows the expected results."""

from pathlib import Path
from typing import Any

from tspipe.training.run_folder import RunFolder

ALONE, TAUGHT, RANDOM = "alone", "taught", "taught + random"
PAPER = {
    "title": "Table 1",
    "source": "arXiv 2005.00393, Table 1",
    "accuracy": {"lenet5": {ALONE: 0.78, TAUGHT: 0.8136}},
    "others": {"Wu and Gu [26]": 0.804},
    "differs": ["1 epoch, not 200"],
}
Accuracies = dict[str | tuple[str, str], list[list[float]]]  # by arm, or by arm and loss; by seed, by epoch


def make_run(path: Path, accuracies: Accuracies, *, columns: dict[str, Any] | None = None, **summary: Any) -> RunFolder:
    """Write a finished run of one student.

    `columns` are additional columns; a list has a value for each epoch. `summary` is merged into summary.json, except
    for `student`, the student's name, and `labels`, the content of random_labels.json.
    """
    seeds, epochs = len(next(iter(accuracies.values()))), len(next(iter(accuracies.values()))[0])
    student, labels = summary.pop("student", "lenet5"), summary.pop("labels", None)
    config = {"students": {student: {}}, "cache": "ab" * 32, "seeds": seeds, "epochs": epochs}
    run = RunFolder(path, config, {"device": "cpu", "torch": "2.6.0"})
    run.create()
    rows = []
    for seed in range(seeds):
        for epoch in range(epochs):
            further = {name: v[epoch] if isinstance(v, list) else v for name, v in (columns or {}).items()}
            for key, by_seed in accuracies.items():
                arm, loss = key if isinstance(key, tuple) else (key, "xent" if key == ALONE else "ts")
                rows.append({
                    "seed": seed, "epoch": epoch + 1, "student": student, "arm": arm, "loss": loss,
                    "test_accuracy": by_seed[seed][epoch], "seconds_training": 2.0, "seconds_testing": 0.5, **further,
                })  # fmt: skip
    run.append(rows, list(rows[0]))
    teacher = {"network": "resnet56", "test_accuracy": 0.832, "parameters": 853018}
    summary_json = {"dataset": "cifar10", "teacher": teacher, "parameters": {student: 62006}, **summary}
    if labels is not None:
        run.write_json("random_labels.json", labels)
    run.write_json("summary.json", summary_json)
    return run
