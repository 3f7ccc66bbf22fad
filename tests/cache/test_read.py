"""Columns behave as arrays do, travel to other processes, and need neither HDF5 nor torch to be read."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tspipe.cache import Cache
from tspipe.cache import column as columns

pread = os.pread


@given(data=st.data())
def test_indexing_is_numpys(digits: Cache, data: st.DataObject) -> None:
    column = digits.test.features
    array = np.asarray(column)
    n = len(column)
    index = data.draw(
        st.one_of(
            st.integers(-n, n - 1),
            st.slices(n),
            st.lists(st.integers(-n, n - 1), max_size=20).map(lambda rows: np.array(rows, np.int64)),
            st.sets(st.integers(0, n - 1), max_size=20).map(lambda rows: np.isin(np.arange(n), list(rows))),
        )
    )
    np.testing.assert_array_equal(column[index], array[index])


def test_row_by_row_it_is_the_same(digits: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.array([900, 3, 4, 4, 999, 0])
    reads: list[int] = []
    for column in (digits.train.features, digits.train.keys):
        whole = column.take(rows)
        reads.clear()
        monkeypatch.setattr(columns, "_SPAN", 0)
        monkeypatch.setattr(columns.os, "pread", lambda *of: reads.append(of[2]) or pread(*of))
        apart = column.take(rows)
        assert reads == [column.offset + row * column.row_bytes for row in rows]
        np.testing.assert_array_equal(apart, whole)
        apart[0] = apart[1]  # a copy, which can be written to
        monkeypatch.undo()


def test_shapes_and_dtypes(digits: Cache) -> None:
    train = digits.train
    assert (train.features.shape, train.features.dtype) == ((1000, 84), np.dtype("<f2"))
    assert (train.logits.shape, train.logits.dtype) == ((1000, 10), np.dtype("<f4"))
    assert (train.keys.shape, train.keys[3]) == ((1000,), b"3")
    assert train.digests.shape == (1000, 8)
    assert digits.classes == list("0123456789")


def test_a_column_computes_as_an_array_does(digits: Cache) -> None:
    column, array = digits.test.logits, digits.test.logits.load()
    np.testing.assert_array_equal(column - array.max(), array - array.max())
    np.testing.assert_array_equal(2 * column > column[0], 2 * array > array[0])
    np.testing.assert_array_equal(np.mean(column, axis=0), array.mean(axis=0))
    np.testing.assert_array_equal(np.exp(column), np.exp(array))
    assert np.add.reduce(column, axis=None) == array.sum()
    assert isinstance(hash(column), int)
    with pytest.raises(ValueError, match="always makes a copy"):
        np.asarray(column, copy=False)


def test_a_cache_prints_as_a_short_paragraph(digits: Cache) -> None:
    accuracy = (np.argmax(digits.test.logits, axis=1) == digits.test.labels).mean()
    assert str(digits) == (
        f"{digits.name} ({digits.id[:12]}): 1,000 training and 797 test images of digits in 10 classes, "
        f"without their pixels. The teacher lenet5 (in the file) classifies {accuracy:.2%} of the test images "
        "correctly. Each image has 84 features and 10 logits."
    )
    assert repr(digits) == f"<Cache {digits.name} {digits.id[:12]}>"
    assert repr(digits.train.features) == f"<Column (1000, 84) float16 of {digits.name}>"


@pytest.mark.parametrize("index", [1000, -1001, [1000], [[0]]])
def test_indices_beyond_the_rows_are_refused(digits: Cache, index: object) -> None:
    with pytest.raises(IndexError) as refused:
        digits.train.features[index]
    assert str(refused.value) == "row indices must be one-dimensional and below 1000"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_column_pickles_small_and_opens_the_file_in_its_process(digits: Cache, method: str) -> None:
    column = digits.train.features
    rows = np.array([5, 2])
    expected = column.take(rows)  # opened here first: a child must not use this descriptor's place in the file
    assert len(pickle.dumps(column)) < 1000
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        np.testing.assert_array_equal(pool.submit(column.take, rows).result(), expected)


def test_reading_ahead_changes_nothing(digits: Cache) -> None:
    column = digits.train.features
    before = column.load()
    column.advise(np.array([3, 900]))
    np.testing.assert_array_equal(column.load(), before)


def test_the_reader_loads_no_torch() -> None:
    program = "import sys, tspipe.cache; print(sorted({'torch', 'torchvision', 'pydantic'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
