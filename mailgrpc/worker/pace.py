"""Pace: how fast calls of a channel end, and so how far ahead of the wire mail may be started.

What is started ahead keeps the wire busy while the next start is on its way. It is also in doubt when its
worker is killed, and what is urgent waits behind it. So it is what goes out in half a second, and on
the fastest channel a few hundred.
"""

from __future__ import annotations

from collections.abc import Callable

AHEAD = 448
"""Beside what has a free slot, at the most: a flush may have 500 messages."""
AHEAD_S = 0.5
"""And no more than go out in this time: so long may wait what is urgent, or comes once."""


class Pace:
    """Of one channel in one worker process. `look` now and then."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._rate = 0.0  # calls a second that ended, lately
        self._ended = 0  # since the last look
        self._looked_at = clock()

    def note_end(self) -> None:
        """A call has ended."""
        self._ended += 1

    def look(self) -> None:
        """Take in what has ended since the last look."""
        now = self._clock()
        if (passed_s := now - self._looked_at) > 0:
            self._rate += (self._ended / passed_s - self._rate) / 2
            self._ended, self._looked_at = 0, now

    @property
    def ahead(self) -> int:
        """How many may be started beside those that have a slot.

        At the beginning as many as have just ended: looks are further apart than a channel needs to
        show what it can.
        """
        return int(min(AHEAD, max(self._rate * AHEAD_S, self._ended)))
