"""Items that come singly and are worked through together.

Reading a message is a long way through Python. Between two calls gRPC and the kernel have the
processor, so that a message that is read in the task of its own call finds nothing of that in the
caches any more, and its answer leaves alone. Read behind one another, and answered so, the same
messages cost the server a third less of its time (docs/decisions/0020).

Whoever comes alone waits for a few turns of the event loop, which is some tens of microseconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

FULL = 128
"""So many are not kept waiting for more."""
_QUIET_TURNS = 15
_LONGEST_S = 0.010


class Together(Generic[T]):
    """Hands what was added to `work`, in the order in which it came, once no more is coming.

    `work` must not raise.
    """

    def __init__(self, work: Callable[[list[T]], None]) -> None:
        self._work = work
        self._items: list[T] = []
        self._gatherer: asyncio.Task[None] | None = None

    def add(self, item: T) -> None:
        """Have `item` worked on, in a few turns of the loop."""
        self._items.append(item)
        if self._gatherer is None:
            self._gatherer = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._items:
                await self._gather()
                items, self._items = self._items, []
                self._work(items)
        finally:
            self._gatherer = None

    async def _gather(self) -> None:
        """Let those in that have come and are still being read, while more of them come.

        On an idle server this is some empty turns of the loop. On a busy one a call takes several
        turns until gRPC hands it over, and the first would otherwise leave with few others.
        """
        clock = asyncio.get_running_loop().time
        until = clock() + _LONGEST_S
        seen, quiet = len(self._items), 0
        while quiet < _QUIET_TURNS and seen < FULL and clock() < until:
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._items) == seen else 0
            seen = len(self._items)
