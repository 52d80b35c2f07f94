"""Which events and which messages a filter means."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from mailgrpc.core.delivery import Delivery, Mode, Role, State
from mailgrpc.core.event import (
    CLOCK_SLACK,
    EVERYTHING,
    Event,
    EventKind,
    Filter,
    Labels,
    MessageStatus,
    created_at_of,
)
from mailgrpc.core.ids import delivery_id, new_message_id

MOMENT = datetime(2026, 3, 1, 12, tzinfo=UTC)
MESSAGE = new_message_id(int(MOMENT.timestamp() * 1000))
LABELS = Labels("c1", ("a", "b"), {}, MOMENT)
SENT = Delivery(
    delivery_id=delivery_id(MESSAGE, 1),
    recipient="ada@example.test",
    role=Role.TO,
    state=State.SENT,
    state_since=MOMENT,
    version=3,
    mode=Mode.RETRYING,
)
CHANGED = Event(
    0, 1, 7, 1, EventKind.STATE_CHANGED, MOMENT, message_id=MESSAGE, delivery=SENT, labels=LABELS
)
REMOVED = Event(0, 2, 8, 1, EventKind.MESSAGE_REMOVED, MOMENT, message_id=MESSAGE)
CLEARED = Event(0, 3, 9, 1, EventKind.MESSAGES_CLEARED, MOMENT, payload={"filter": {}, "count": 1})
STATUS = MessageStatus(MESSAGE, "", "Hello", MOMENT, (SENT,), LABELS)
LATER = MOMENT + timedelta(microseconds=1)
ELSEWHERE = frozenset([new_message_id()])

FITTING = [
    EVERYTHING,
    Filter(message_ids=frozenset([MESSAGE]) | ELSEWHERE),
    Filter(correlation_ids=frozenset(["c1", "c2"])),
    Filter(recipients=frozenset(["ada@example.test"])),
    Filter(tags=frozenset(["b", "z"])),
    Filter(states=frozenset([State.SENT])),
    Filter(created_after=MOMENT, created_before=LATER),
    Filter(tags=frozenset(["a"]), states=frozenset([State.SENT]), created_after=MOMENT),
]
MISSING = [
    Filter(message_ids=ELSEWHERE),
    Filter(correlation_ids=frozenset(["c2"])),
    Filter(recipients=frozenset(["bob@example.test"])),
    Filter(tags=frozenset(["z"])),
    Filter(states=frozenset([State.QUEUED])),
    Filter(created_after=LATER),
    Filter(created_before=MOMENT),
    Filter(tags=frozenset(["a"]), states=frozenset([State.QUEUED])),
]


@pytest.mark.parametrize("wanted", FITTING)
def test_a_filter_means_what_fits_all_of_its_fields(wanted: Filter) -> None:
    assert wanted.matches(CHANGED)
    assert wanted.means(STATUS)


@pytest.mark.parametrize("wanted", MISSING)
def test_a_filter_leaves_out_what_misses_one_of_its_fields(wanted: Filter) -> None:
    assert not wanted.matches(CHANGED)
    assert not wanted.means(STATUS)


def test_one_delivery_has_to_satisfy_both_recipient_and_state() -> None:
    queued = replace(SENT, recipient="bob@example.test", state=State.QUEUED)
    status = replace(STATUS, deliveries=(SENT, queued))
    wanted = Filter(recipients=frozenset([queued.recipient]), states=frozenset([State.SENT]))
    assert not wanted.means(status)
    assert replace(wanted, states=frozenset([State.QUEUED])).means(status)


@pytest.mark.parametrize("wanted", [*FITTING, *MISSING])
def test_a_clear_is_told_to_every_filter(wanted: Filter) -> None:
    assert wanted.matches(CLEARED)


@pytest.mark.parametrize("wanted", [*FITTING, *MISSING])
def test_of_a_removal_only_ids_and_times_are_compared(wanted: Filter) -> None:
    compared = Filter(
        message_ids=wanted.message_ids,
        created_after=wanted.created_after,
        created_before=wanted.created_before,
    )
    assert wanted.matches(REMOVED) == compared.matches(REMOVED)
    assert wanted.matches(REMOVED) == (wanted.message_ids != ELSEWHERE)


def test_the_time_of_a_message_that_is_gone_is_taken_from_its_id_generously() -> None:
    gone = replace(CHANGED, labels=Labels())
    for event in (gone, REMOVED):
        assert Filter(created_after=MOMENT + CLOCK_SLACK).matches(event)
        assert not Filter(created_after=LATER + CLOCK_SLACK).matches(event)
        assert Filter(created_before=LATER - CLOCK_SLACK).matches(event)
        assert not Filter(created_before=MOMENT - CLOCK_SLACK).matches(event)


def test_an_id_tells_when_it_was_made() -> None:
    assert created_at_of(MESSAGE) == created_at_of(SENT.delivery_id) == MOMENT


def test_event_ids_are_ordered_by_seq_and_differ_by_fingerprint() -> None:
    first = replace(CHANGED, seq=1, lane=15, fingerprint=-1)
    second = replace(CHANGED, seq=2, lane=0, fingerprint=0)
    assert first.event_id < second.event_id
    assert replace(second, fingerprint=1).event_id != second.event_id
