from types import SimpleNamespace
from typing import Any

import pytest

from tspipe.recipes import load
from tspipe.training import random_source


@pytest.mark.parametrize(
    ("pool", "change", "sentence"),
    [
        (None, ("live", 0), "students train without random images."),
        (range(9), ("live", 0), "students train without random images."),
        (range(10), ("pool", 10), "random images come from the pool in the file."),
    ],
)
def test_without_the_teachers_file_the_pool_is_used_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, pool: range | None, change: tuple[str, int], sentence: str
) -> None:
    cache: Any = SimpleNamespace(name="x.h5", manifest={"teacher": {"network": "mine"}}, has_teacher=True, random=pool)
    recipe = load.load("digits", ["random_images=10"])
    monkeypatch.setattr(random_source, "lacks_teacher", lambda cache, recipe: True)
    changed, remark = random_source.without_live_teacher(recipe, cache)
    assert (changed.random_source, changed.random_images) == change
    assert remark == f"The teacher of x.h5 needs the file of its network (--teacher ./mine.py), so {sentence}"
    monkeypatch.setattr(random_source, "lacks_teacher", lambda cache, recipe: False)
    assert random_source.without_live_teacher(recipe, cache) == (recipe, "")
