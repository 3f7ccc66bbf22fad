"""A thread behind a loop, and the clock that says what the loop waits for."""

import threading
import time

import pytest

from tspipe.utils import threads as overlap
from tspipe.utils.threads import TimeBreakdown, background_writer, prefetch_map


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order_and_so_many_are_worked_on_ahead(threads: int) -> None:
    begun = [threading.Event() for _ in range(6)]

    def work(number: int) -> int:
        begun[number].set()
        time.sleep(0.01 * (6 - number))
        return 10 * number

    results = prefetch_map(work, range(6), threads)
    assert next(results) == 0
    assert all(event.wait(60) for event in begun[: threads + 1])
    assert not any(event.is_set() for event in begun[threads + 1 :])
    assert list(results) == [10, 20, 30, 40, 50]
    assert list(prefetch_map(work, [])) == []


def test_what_work_ahead_raises_comes_in_its_place() -> None:
    results = prefetch_map(lambda number: 1 // number, [1, 1, 0, 1])
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_tasks_are_done_in_their_order_and_two_at_most_are_on_their_way() -> None:
    done: list[int] = []
    threads = set()

    def task(number: int) -> None:
        time.sleep(0.01)
        threads.add(threading.get_ident())
        done.append(number)

    with background_writer() as do:
        for number in range(6):
            do(lambda number=number: task(number))  # type: ignore[misc]
            assert len(done) >= number - 1
    assert done == list(range(6))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_what_a_task_raises_reaches_the_caller() -> None:
    def fail() -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"), background_writer() as do:
        do(fail)
    calls = 0
    with pytest.raises(OSError, match="no room"), background_writer() as do:
        for _ in range(100):
            calls += 1
            do(fail)
    assert calls == 3


def test_what_was_given_is_done_where_the_caller_raises() -> None:
    done: list[bool] = []
    with pytest.raises(KeyboardInterrupt), background_writer() as do:
        do(lambda: done.append(True))
        raise KeyboardInterrupt
    assert done == [True]


def test_the_part_that_took_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then: 2 s of waiting; 3 s of it and 3.5 at another part; 4 and 6.5."""
    clock = iter([0.0, 2.0, 10.0, 13.5, 20.0, 21.0, 30.0, 33.0, 40.0, 41.0])
    monkeypatch.setattr(overlap.time, "monotonic", lambda: next(clock))
    times, longest = TimeBreakdown(), []
    for _ in times.iterate("decoding", ["a", "b"]):
        longest.append(times.longest)
        with times.measure("teacher"):
            pass
    assert longest == ["decoding", "teacher"]
    assert times.longest == "teacher"
