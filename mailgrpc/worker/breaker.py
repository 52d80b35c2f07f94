"""The breaker of a channel: when a channel fails as a whole, it is not worth asking for a while.

Refused connections, a wrong password, 429: such an answer says nothing about the mail in hand and
would be the same for the next thousand (`Result.of_channel`). So the channel pauses, for longer
each time: 1 s, doubled up to 5 minutes, or as long as the provider asks for, up to an hour. Then one claim of one
delivery is its probe. A probe is real mail, because only that proves that mail passes: a server
that limits rates still greets, and logs us in. While a channel pauses nothing of it is claimed;
what had been started comes back without having been sent and without using up an attempt
(core/delivery.py), and `expire_at` ends the waiting.

One failure does not count while others pass: a server that refuses one connection too many takes mail
on those that stand. So the breaker opens when more calls have failed in a row than are still under
way, or at once where the provider says for how long. That delivery waits, the channel does not.

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
LONGEST_OBEYED_S = 3600.0
_BEHIND_S = 10.0
"""By how much what was a probe waits longer than the pause: one bad mail must not be every probe."""
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
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        self._on_close = on_close
        self._channel = channel
        self._clock = clock
        self._rng = rng or random.Random()
        self._pauses = 0  # in a row
        self._until = float("-inf")
        self._opened_at = float("-inf")
        self._failures = 0  # in a row
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
        return timedelta(seconds=max(self.wait_s + min(self.wait_s, _BEHIND_S), FIRST_PAUSE_S))

    def now(self) -> float:
        """A moment, to say when a call began."""
        return self._clock()

    def note(self, result: Result, asked_at: float, others: int = 0) -> None:
        """The channel was asked at `asked_at`, and this came back; `others` are still under way."""
        if result.of_channel:
            self._failures += 1
            if result.retry_after or self._failures > others or not self.is_closed:
                self._open(result, asked_at)
        elif result.outcome is Outcome.ACCEPTED or (
            result.status_code and result.outcome is not Outcome.UNKNOWN
        ):
            self._failures = 0
            if not self.is_closed:
                log.info("channel %s takes mail again", self._channel)
                self.reason, self._pauses, self._until = None, 0, float("-inf")
                self._on_close()

    def _open(self, result: Result, asked_at: float) -> None:
        asked_for_s = result.retry_after.total_seconds() if result.retry_after else 0.0
        asked_for_s = min(asked_for_s, LONGEST_OBEYED_S)
        if asked_at < self._opened_at:  # it was on its way when the breaker opened: no probe
            if asked_for_s:
                self._until = max(self._until, self._clock() + asked_for_s)
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
        self._opened_at = self._clock()
        self._until = self._opened_at + max(pause_s, asked_for_s)
        self._pauses = min(self._pauses + 1, 32)
        self.reason = result
