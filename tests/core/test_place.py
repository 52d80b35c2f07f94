"""Places only go forward, and a token is the place that was put into it or is refused."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailgrpc.core.event import Event, EventKind
from mailgrpc.core.place import (
    ORIGIN,
    Place,
    Position,
    advance,
    covers,
    decode_token,
    encode_token,
    join,
)
from mailgrpc.errors import InvalidRequest, Reason

LANES = st.integers(0, 15)
SEQS = st.integers(1, 2**63 - 1)
PLACES: st.SearchStrategy[Place] = st.dictionaries(
    LANES, st.builds(Position, SEQS, st.integers(-(2**31), 2**31 - 1))
)
PROJECTS = st.integers(0, 2**31 - 1)
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def event(lane: int, seq: int) -> Event:
    return Event(lane, seq, seq % 1000, 1, EventKind.STATE_CHANGED, NOW)


def refuse(project_id: int, token: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        decode_token(project_id, token)
    [violation] = refusal.value.violations
    assert (violation.field, violation.reason) == ("resume_token", Reason.INVALID_TOKEN)


@given(PROJECTS, PLACES)
def test_a_token_gives_its_place_back(project_id: int, place: Place) -> None:
    token = encode_token(project_id, place)
    assert decode_token(project_id, token) == place
    assert len(token) <= 290
    assert token.isascii()


@given(PROJECTS, PLACES, st.data())
def test_a_token_with_one_character_changed_is_refused(
    project_id: int, place: Place, data: st.DataObject
) -> None:
    token = encode_token(project_id, place)
    index = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.characters().filter(lambda c: c != token[index]))
    refuse(project_id, token[:index] + other + token[index + 1 :])


@given(PROJECTS, PLACES, st.data())
def test_a_token_cut_anywhere_is_refused(
    project_id: int, place: Place, data: st.DataObject
) -> None:
    token = encode_token(project_id, place)
    refuse(project_id, token[: data.draw(st.integers(0, len(token) - 1))])
    refuse(project_id, token[data.draw(st.integers(1, len(token))) :])
    refuse(project_id, token + data.draw(st.text(min_size=1)))


@given(st.text())
def test_any_text_is_refused(text: str) -> None:
    refuse(1, text)


@given(st.binary(max_size=400))
def test_any_bytes_in_the_form_of_a_token_are_refused(content: bytes) -> None:
    import base64

    refuse(1, base64.urlsafe_b64encode(content).rstrip(b"=").decode())


@given(PROJECTS, PROJECTS, PLACES)
def test_a_token_of_another_project_is_refused(mine: int, yours: int, place: Place) -> None:
    if mine != yours:
        refuse(mine, encode_token(yours, place))


def test_a_seq_that_no_database_has_is_refused() -> None:
    refuse(1, encode_token(1, {0: Position(2**63)}))


@given(PLACES, st.lists(st.tuples(LANES, SEQS)))
def test_advancing_over_later_events_covers_them_and_where_it_began(
    place: Place, more: list[tuple[int, int]]
) -> None:
    events = [event(lane, seq) for lane, seq in sorted(more) if seq > place.get(lane, ORIGIN).seq]
    moved = advance(place, events)
    assert covers(moved, place)
    assert all(moved[e.lane].seq >= e.seq for e in events)
    assert moved == join(place, advance({}, events))
    assert covers(place, moved) == (not events)


@given(PLACES, PLACES, PLACES)
def test_covering_is_an_order_and_a_join_is_its_least_upper_bound(
    a: Place, b: Place, c: Place
) -> None:
    assert covers(a, a)
    assert covers(a, {})
    if covers(a, b) and covers(b, c):
        assert covers(a, c)
    both = join(a, b)
    assert covers(both, a)
    assert covers(both, b)
    if covers(c, a) and covers(c, b):
        assert covers(c, both)


def test_advancing_changes_no_place_that_others_hold() -> None:
    place = {0: Position(1, 1)}
    assert advance(place, [event(0, 5)]) == {0: Position(5, 5)}
    assert place == {0: Position(1, 1)}
