"""Plain lines of progress, as a log file gets them."""

import pytest

from tspipe.utils import progress


@pytest.mark.parametrize(("seconds", "line"), [(2.0, "0.5/s, 0:00:18 left"), (0.001, "1,000/s, 0:00:00 left")])
def test_lines(seconds: float, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Slow rates keep their digits."""
    clock = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress("teacher", 1010, "images", done=1000) as advance:
        advance(1, "teacher, test")
    assert capsys.readouterr().err == f"teacher, test: 1,001/1,010 images, {line}\n"
