"""How long a deferred delivery waits before it is tried again."""

from __future__ import annotations

from datetime import timedelta
from random import Random

from mailgrpc.core.value import value

JITTER = 0.2
"""Share by which a wait is lengthened or shortened at random, so that what failed together does
not come back together."""


@value
class RetryPolicy:
    """Attempts and waits. The defaults try for about 33 hours."""

    max_attempts: int = 12
    initial_backoff: timedelta = timedelta(seconds=10)
    max_backoff: timedelta = timedelta(hours=8)
    multiplier: float = 3.0


DEFAULT_POLICY = RetryPolicy()


def backoff(attempts_made: int, policy: RetryPolicy, rng: Random) -> timedelta:
    """The wait after `attempts_made` attempts (1 or more): exponential, bounded, with jitter."""
    # In floats and bounded before the multiplication: 10 ** 100 attempts must not overflow.
    seconds = policy.initial_backoff.total_seconds()
    longest = policy.max_backoff.total_seconds()
    for _ in range(attempts_made - 1):
        if seconds >= longest:
            break
        seconds *= policy.multiplier
        if policy.multiplier <= 1:
            break
    return timedelta(seconds=min(seconds, longest) * rng.uniform(1 - JITTER, 1 + JITTER))
