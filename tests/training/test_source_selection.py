from types import SimpleNamespace
from typing import Any

import pytest

from tspipe.recipes import load
from tspipe.training import source_selection


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
    manifest = {"teacher": {"network": "mine"}, "random": pool and {"kind": "mixed"}}
    cache: Any = SimpleNamespace(name="x.h5", manifest=manifest, has_teacher=True, random=pool)
    recipe = load.load("digits", ["random_images=10"])
    monkeypatch.setattr(source_selection, "lacks_teacher", lambda cache, recipe: True)
    changed, remark = source_selection.without_live_teacher(recipe, cache)
    assert (changed.random_source, changed.random_images) == change
    assert changed.random_kind == ("mixed" if change[0] == "pool" else "uniform")
    assert remark == f"The teacher of x.h5 needs the file of its network (--teacher ./mine.py), so {sentence}"
    monkeypatch.setattr(source_selection, "lacks_teacher", lambda cache, recipe: False)
    assert source_selection.without_live_teacher(recipe, cache) == (recipe, "")
