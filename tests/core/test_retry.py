"""How long a deferred delivery waits."""

from __future__ import annotations

from datetime import timedelta
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from mailgrpc.core.message import RetryWishes
from mailgrpc.core.retry import DEFAULT_POLICY, JITTER, RetryPolicy, backoff


class Steady(Random):
    """Chance that always takes the middle."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


def test_the_default_waits_grow_threefold_from_10_seconds_to_8_hours() -> None:
    waits = [backoff(n, DEFAULT_POLICY, Steady()) for n in range(1, DEFAULT_POLICY.max_attempts)]
    assert [wait.total_seconds() for wait in waits[:4]] == [10, 30, 90, 270]
    assert waits[-1] == timedelta(hours=8)


def test_the_default_policy_tries_for_about_33_hours() -> None:
    waits = [backoff(n, DEFAULT_POLICY, Steady()) for n in range(1, DEFAULT_POLICY.max_attempts)]
    assert timedelta(hours=32) < sum(waits, timedelta()) < timedelta(hours=34)


_SPANS = st.timedeltas(timedelta(seconds=1), timedelta(hours=24))


@given(
    attempts=st.integers(1, 10**6),
    first=_SPANS,
    longest=_SPANS,
    multiplier=st.floats(1, 10),
    seed=st.integers(),
)
def test_a_wait_lies_between_the_first_and_the_longest_but_for_jitter(
    attempts: int, first: timedelta, longest: timedelta, multiplier: float, seed: int
) -> None:
    policy = RetryPolicy(100, first, max(first, longest), multiplier)
    wait = backoff(attempts, policy, Random(seed))
    tolerance = timedelta(microseconds=1)
    assert first * (1 - JITTER) - tolerance <= wait
    assert wait <= policy.max_backoff * (1 + JITTER) + tolerance


@given(attempts=st.integers(1, 100), first=_SPANS, multiplier=st.floats(1, 10))
def test_waits_never_get_shorter_but_for_jitter(
    attempts: int, first: timedelta, multiplier: float
) -> None:
    policy = RetryPolicy(100, first, max(first, timedelta(hours=8)), multiplier)
    assert backoff(attempts, policy, Steady()) <= backoff(attempts + 1, policy, Steady())


def test_what_failed_together_does_not_come_back_together() -> None:
    rng = Random(1)
    assert len({backoff(1, DEFAULT_POLICY, rng) for _ in range(100)}) > 90


def test_wishes_that_say_nothing_are_the_default_policy() -> None:
    assert RetryWishes().policy() == DEFAULT_POLICY


def test_a_first_wait_above_the_default_longest_lengthens_that_too() -> None:
    policy = RetryWishes(initial_backoff=timedelta(hours=12)).policy()
    assert policy.max_backoff == timedelta(hours=12)
