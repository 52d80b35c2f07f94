"""The breaker of a channel: when a channel fails as a whole, it is not worth asking for a while.

Refused connections, a wrong password, 429: such an answer says nothing about the mail in hand and
would be the same for the next thousand (`Result.of_channel`). So the channel pauses, for longer
each time: 1 s, doubled up to 5 minutes, or as long as the provider asks for. Then one claim of one
delivery is its probe. A probe is real mail, because only that proves that mail passes: a server
that limits rates still greets, and logs us in. While a channel pauses nothing of it is claimed;
what had been started comes back without having been sent and without using up an attempt
(core/delivery.py), and `expire_at` ends the waiting.

A failure does not count while others pass: a server that refuses one connection too many takes mail
on those that stand. That delivery waits, and the channel does not.

Each worker process has its own: what one cannot reach, another one may.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from datetime import timedelta

from mailgrpc.core.delivery import Outcome, Result

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 300.0
_GROWTH = 2.0
_JITTER = 0.2  # so that workers do not all come back at once


class Breaker:
    """Whether a channel is worth asking. Closed at first: it is."""

    def __init__(
        self,
        channel: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._channel = channel
        self._clock = clock
        self._rng = rng or random.Random()
        self._pauses = 0  # in a row
        self._until = float("-inf")
        self._passed_at = float("-inf")
        self.reason: Result | None = None  # why it is open

    @property
    def is_closed(self) -> bool:
        """Whether the channel is asked as usual; else one delivery at a time, after `wait_s`."""
        return self.reason is None

    @property
    def wait_s(self) -> float:
        """How long the channel is not to be asked; 0: it may be."""
        return max(0.0, self._until - self._clock())

    @property
    def pause(self) -> timedelta:
        """How long a delivery waits that the channel failed; never not at all."""
        return timedelta(seconds=max(self.wait_s, FIRST_PAUSE_S))

    def now(self) -> float:
        """A moment, to say when a call began."""
        return self._clock()

    def note(self, result: Result, asked_at: float) -> None:
        """The channel was asked at `asked_at`, and this came back."""
        if result.of_channel:
            if self._passed_at < asked_at:
                self._open(result)
        elif result.status_code or result.outcome is Outcome.ACCEPTED:
            self._passed_at = self._clock()
            if not self.is_closed:
                log.info("channel %s takes mail again", self._channel)
                self.reason, self._pauses, self._until = None, 0, float("-inf")

    def _open(self, result: Result) -> None:
        asked_for_s = result.retry_after.total_seconds() if result.retry_after else 0.0
        if self.wait_s:  # one of those that were on their way when it opened
            self._until = max(self._until, self._clock() + min(asked_for_s, LONGEST_PAUSE_S))
            return
        if self.is_closed:
            log.warning(
                "channel %s pauses, it fails as a whole: %s %s",
                self._channel,
                result.cause.name,
                result.text,
            )
        pause_s = min(FIRST_PAUSE_S * _GROWTH**self._pauses, LONGEST_PAUSE_S)
        pause_s *= self._rng.uniform(1 - _JITTER, 1 + _JITTER)
        self._until = self._clock() + max(pause_s, min(asked_for_s, LONGEST_PAUSE_S))
        self._pauses = min(self._pauses + 1, 32)
        self.reason = result
