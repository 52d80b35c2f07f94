"""How far ahead of the wire mail may be started."""

from __future__ import annotations

from mailgrpc.worker.pace import AHEAD, AHEAD_S, Pace

LOOK_S = 0.2


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def ended(pace: Pace, calls: int) -> None:
    for _ in range(calls):
        pace.note_end()


def test_nothing_is_started_ahead_where_nothing_has_ended() -> None:
    assert Pace(Clock()).ahead == 0


def test_before_the_first_look_as_many_as_have_ended() -> None:
    pace = Pace(Clock())
    ended(pace, 20)
    assert pace.ahead == 20
    ended(pace, 20)
    assert pace.ahead == 40


def test_it_is_what_goes_out_in_half_a_second_and_never_more_than_a_few_hundred() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(20):
        ended(pace, 40)
        clock.now += LOOK_S
        pace.look()
    assert abs(pace.ahead - 40 / LOOK_S * AHEAD_S) <= 1
    ended(pace, 10_000)
    assert pace.ahead == AHEAD


def test_a_channel_that_has_stopped_is_not_believed_for_long() -> None:
    clock = Clock()
    pace = Pace(clock)
    ended(pace, 1000)
    for _ in range(12):
        clock.now += LOOK_S
        pace.look()
    assert pace.ahead == 0
