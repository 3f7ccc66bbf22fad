import time
from pathlib import Path

import pytest

from shared import small
from tspipe.extraction import extract, forward, view_cost


def test_the_cost_of_views_is_stated_before_the_teacher_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch of 8 images takes 40 seconds the first time, and then 16."""
    config = small(tmp_path / "shapes", "views.count=5", "features.dtype=float16")
    clock = iter([0.0, 40.0, 50.0, 66.0])
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(clock))
        patch.setattr(forward, "run_teacher_on_blocks", lambda *_: None)
        job = extract._prepare(config)
        sentence = view_cost.describe(job.dimensions, job.teacher, config.recipe.preprocess, (3, 16, 16))
    stored = 16 * 5 * (84 * 2 + 2 * 4 + 3 * 2)
    assert sentence == (
        f"5 views of 16 images are 80 rows: {stored / 1024:.1f} KiB, and about 0:02:40 of the teacher in one process, "
        "5 times that of the images alone."
    )
    extract.extract(config)
    assert "5 views of 16 images are 80 rows: " in capsys.readouterr().err
    extract.extract(config)  # it is finished
    assert capsys.readouterr().err.count("views of") == 0
