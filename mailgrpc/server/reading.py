"""How a stream reads on while the store does not: it waits, and its heartbeats go on.

A look at the table runs beside the stream, which is asked now and then whether it is time for a
heartbeat. The reader moves when the look ends, perhaps while a heartbeat is being written; what it
passed is then not told yet. So `place`, from which tokens are made, moves only when the events are
taken. A store that fails or falls silent costs a stream time and nothing else: its place is as good
afterwards, which the next look checks anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from mailgrpc.core.place import Place
from mailgrpc.errors import StoreUnavailable
from mailgrpc.server.batch import Entry
from mailgrpc.server.feed import Feed
from mailgrpc.server.ring import Reader

_LOOK_UP_S = 1.0
"""How long a stream is not asked whether this process is going away."""
_RETRY_S = 0.25
NOTHING_YET: tuple[Sequence[Entry], bool] = ((), True)


class Reading:
    """One stream's way through the feed. `close` it."""

    def __init__(self, feed: Feed, reader: Reader) -> None:
        self._feed = feed
        self._reader = reader
        self._look: asyncio.Task[tuple[Sequence[Entry], bool]] | None = None
        self._begun_at: Place = reader.place

    @property
    def place(self) -> Place:
        """Behind what was taken, and before all that was not."""
        return self._reader.place if self._look is None else self._begun_at

    async def take(self, within_s: float) -> tuple[Sequence[Entry], bool]:
        """The next entries, and whether there may be more at once; NOTHING_YET in this time.

        Raises TokenExpired, and Unavailable when this process is going away.
        """
        if self._look is None:
            if (at_hand := self._feed.read_at_hand(self._reader)) is not None:
                return at_hand
            self._begun_at = self._reader.place
            self._look = asyncio.create_task(self._feed.read(self._reader))
        self._feed.check_open()
        done, _ = await asyncio.wait({self._look}, timeout=min(within_s, _LOOK_UP_S))
        if not done:
            return NOTHING_YET
        look, self._look = self._look, None
        try:
            return look.result()
        except StoreUnavailable:
            await asyncio.sleep(min(within_s, _RETRY_S))
            return NOTHING_YET

    def close(self) -> None:
        """The stream has ended; nobody waits for the look any more."""
        if self._look is not None:
            self._look.cancel()
            self._look.add_done_callback(_forget)


def _forget(look: asyncio.Task[tuple[Sequence[Entry], bool]]) -> None:
    if not look.cancelled():
        look.exception()
