"""Telling once, not twice a second, that PostgreSQL is away: every loop of the worker meets it."""

from __future__ import annotations

import logging
import time

log = logging.getLogger(__name__)

_AGAIN_S = 60.0


class Outage:
    """What the loops of one worker know together about the store's being away."""

    def __init__(self) -> None:
        self._told_at: float | None = None

    def met(self, error: Exception) -> None:
        """The store did not answer."""
        now = time.monotonic()
        if self._told_at is None or now - self._told_at >= _AGAIN_S:
            self._told_at = now
            log.warning("PostgreSQL cannot be asked, the worker waits: %s", error)

    def over(self) -> None:
        """The store answered."""
        if self._told_at is not None:
            self._told_at = None
            log.info("PostgreSQL answers again")
