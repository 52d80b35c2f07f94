"""Places only go forward, and a token is the place that was put into it or is refused."""

from __future__ import annotations

import base64
import itertools
import struct
import zlib
from datetime import UTC, datetime

import pytest
from hypothesis import assume, given
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
SEQS = st.integers(0, 2**63 - 1)
PLACES: st.SearchStrategy[Place] = st.dictionaries(
    LANES, st.builds(Position, SEQS, st.integers(-(2**31), 2**31 - 1))
)
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
PROJECTS = st.integers(0, 2**31 - 1)
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def event(lane: int, seq: int) -> Event:
    return Event(lane, seq, seq % 1000, 1, EventKind.STATE_CHANGED, NOW)


def refuse(project_id: int, token: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        decode_token(project_id, token)
    [violation] = refusal.value.violations
    assert (violation.field, violation.reason) == ("resume_token", Reason.INVALID_TOKEN)


def text_of(whole: bytes) -> str:
    return base64.urlsafe_b64encode(whole).rstrip(b"=").decode()


def sealed(body: bytes) -> str:
    """A token with a checksum that is right, whatever is in it."""
    return text_of(body + struct.pack(">I", zlib.crc32(body)))


def opened(token: str) -> bytes:
    return base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))


def seqs(place: Place) -> dict[int, int]:
    """How far a place has come; a lane that it leaves out stands at its beginning."""
    return {lane: p.seq for lane, p in place.items() if p.seq}


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


@given(PROJECTS, PLACES, st.data())
def test_a_token_with_a_character_more_or_less_anywhere_is_refused(
    project_id: int, place: Place, data: st.DataObject
) -> None:
    token = encode_token(project_id, place)
    index = data.draw(st.integers(0, len(token) - 1))
    refuse(project_id, token[:index] + token[index + 1 :])
    more = data.draw(st.sampled_from(ALPHABET) | st.characters())
    refuse(project_id, token[:index] + more + token[index:])


@given(PROJECTS, PLACES, st.integers(0, 255).filter(lambda version: version != 1))
def test_a_token_of_another_version_is_refused_though_it_is_whole(
    project_id: int, place: Place, version: int
) -> None:
    refuse(project_id, sealed(bytes([version]) + opened(encode_token(project_id, place))[1:-4]))


@given(PROJECTS, st.lists(st.tuples(LANES, SEQS), max_size=16))
def test_a_place_has_one_token(project_id: int, entries: list[tuple[int, int]]) -> None:
    """Lanes out of order or twice were written by somebody else."""
    body = struct.pack(">BI", 1, project_id) + b"".join(
        struct.pack(">BQi", lane, seq, 7) for lane, seq in entries
    )
    lanes = [lane for lane, _ in entries]
    if all(a < b for a, b in itertools.pairwise(lanes)):
        place = {lane: Position(seq, 7) for lane, seq in entries}
        assert sealed(body) == encode_token(project_id, place)
        assert decode_token(project_id, sealed(body)) == place
    else:
        refuse(project_id, sealed(body))


@given(st.text())
def test_any_text_is_refused(text: str) -> None:
    refuse(1, text)


@given(st.binary(max_size=400))
def test_any_bytes_in_the_form_of_a_token_are_refused(content: bytes) -> None:
    refuse(1, text_of(content))
    assume(sealed(content) != encode_token(1, {}))
    if (len(content) - 5) % 13 or content[0] != 1 or content[1:5] != b"\0\0\0\1":
        refuse(1, sealed(content))


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


@given(PLACES, PLACES, PLACES)
def test_places_that_cover_each_other_are_one_and_joins_come_in_any_order(
    a: Place, b: Place, c: Place
) -> None:
    assert (covers(a, b) and covers(b, a)) == (seqs(a) == seqs(b))
    assert join(a, a) == a
    assert seqs(join(a, b)) == seqs(join(b, a))
    assert seqs(join(join(a, b), c)) == seqs(join(a, join(b, c)))
    assert covers(a, b) == (seqs(join(a, b)) == seqs(a))


@given(PLACES, PLACES, st.lists(st.tuples(LANES, SEQS)), st.integers(0))
def test_who_is_ahead_stays_ahead_and_a_page_may_be_cut_anywhere(
    a: Place, b: Place, more: list[tuple[int, int]], cut: int
) -> None:
    ahead = join(a, b)
    events = [event(lane, seq) for lane, seq in sorted(more) if seq > ahead.get(lane, ORIGIN).seq]
    assert covers(advance(ahead, events), advance(a, events))
    first = cut % (len(events) + 1)
    assert advance(advance(a, events[:first]), events[first:]) == advance(a, events)


def test_advancing_changes_no_place_that_others_hold() -> None:
    place = {0: Position(1, 1)}
    assert advance(place, [event(0, 5)]) == {0: Position(5, 5)}
    assert place == {0: Position(1, 1)}
