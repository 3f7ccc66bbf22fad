"""Waiting for the other processes of a job for as long as they live."""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from tspipe.errors import OtherProcessFailed

BEAT_SECONDS = 1.0
LOST_AFTER_SECONDS = 120.0  # without a heartbeat; more than any call that holds Python's lock
_LONGEST_PAUSE = 0.05
_FAREWELL_SECONDS = 5.0


class Heartbeat:
    """Signs of life between the processes of a job, through a key-value store that all of them reach.

    A thread of every process counts up a key of the store. A process that waits for another reads that key, so the
    wait has no limit while the other lives, and ends within `LOST_AFTER_SECONDS` of its death.

    Args:
        connect: opens a connection to the store (`torch.distributed.Store`); a blocked one serves no other thread.
    """

    def __init__(self, connect: Callable[[], Any], rank: int, size: int):
        self.rank, self.size = rank, size
        self._store, self._calls = connect(), 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(connect(),), daemon=True)
        self._thread.start()

    def meet(self) -> None:
        """Wait until every process has made this call as often as this one; raise OtherProcessFailed if one died."""
        self._calls += 1
        self._store.set(f"call/{self._calls}/{self.rank}", "")
        for rank in range(self.size):
            self._wait(f"call/{self._calls}/{rank}", rank)
        if self._calls > 1:  # no process waits for an earlier call any more
            self._store.delete_key(f"call/{self._calls - 1}/{self.rank}")

    def stop(self, failed: bool) -> None:
        """End the heartbeat. After a failure, processes that wait for this one stop at once.

        Rank 0 may hold the store, so it gives the others some seconds to stop before it.
        """
        self._stopped.set()
        self._thread.join()
        if not failed:
            return
        failures, deadline = [f"failed/{rank}" for rank in range(self.size)], time.monotonic() + _FAREWELL_SECONDS
        with contextlib.suppress(RuntimeError):  # of a store whose process has ended, which the others notice
            self._store.set(failures[self.rank], "")
            while not self.rank and time.monotonic() < deadline and not self._store.check(failures):
                time.sleep(_LONGEST_PAUSE)

    def _beat(self, store: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the store's process has ended, which the next `meet` reports
            store.add(f"beat/{self.rank}", 1)
            while not self._stopped.wait(BEAT_SECONDS):
                store.add(f"beat/{self.rank}", 1)

    def _wait(self, key: str, rank: int) -> None:
        beat, since, pause = 0, time.monotonic(), 0.0005
        while not self._store.check([key]):
            if (latest := self._store.add(f"beat/{rank}", 0)) != beat:
                beat, since = latest, time.monotonic()
            if self._store.check([f"failed/{rank}"]) or time.monotonic() - since > LOST_AFTER_SECONDS:
                raise lost_peer(self.rank)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def lost_peer(rank: int) -> OtherProcessFailed:
    """Return the error of a rank whose peer has failed."""
    return OtherProcessFailed(f"Rank {rank} stops: another process has failed, or cannot be reached.")
