"""When a call has to be answered: one coarse clock for all calls instead of a timer for each.

Nearly every call ends long before its limit, so that setting and cancelling a timer for each is
work for nothing; it was a tenth of what an Enqueue costs. Here a call is put into the set of the
tick in which it would end, and taken out of it again. A limit is met up to a tick late.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

TICK_S = 0.05


class Limit:
    """Cancels the task that entered it once its time is up. Use it with `with`.

    `expired` tells the task why it was cancelled; what cancels it besides is left alone.
    """

    __slots__ = ("_bucket", "_task", "expired")

    def __init__(self, bucket: set[Limit] | None) -> None:
        self._bucket = bucket
        self.expired = False

    def __enter__(self) -> Self:
        if self._bucket is not None:
            self._task = asyncio.current_task()
            self._bucket.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bucket is None:
            return
        self._bucket.discard(self)
        if not self.expired or self._task is None:
            return
        # Another cancellation that came beside ours stays one: the caller has gone.
        if self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def expire(self) -> None:
        """Its time is up."""
        self.expired = True
        if self._task is not None:
            self._task.cancel()


class Deadlines:
    """The limits of all calls of one event loop."""

    def __init__(self, tick_s: float = TICK_S) -> None:
        self._tick_s = tick_s
        self._buckets: dict[int, set[Limit]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def within(self, seconds: float | None) -> Limit:
        """A limit that raises TimeoutError in its block after `seconds`; None: never."""
        if seconds is None:
            return Limit(None)
        loop = asyncio.get_running_loop()
        tick = int((loop.time() + seconds) / self._tick_s) + 1
        bucket = self._buckets.get(tick)
        if bucket is None:
            bucket = self._buckets[tick] = set()
            if self._timer is None:
                self._timer = loop.call_later(self._tick_s, self._turn, loop)
        return Limit(bucket)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        now = int(loop.time() / self._tick_s)
        for tick in [t for t in self._buckets if t <= now]:
            for limit in list(self._buckets.pop(tick)):
                limit.expire()
        self._timer = loop.call_later(self._tick_s, self._turn, loop) if self._buckets else None
