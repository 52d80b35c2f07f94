"""Places in the feed, and the resume tokens that carry them to callers and back.

A place is a position in each lane; a lane that it leaves out stands at its beginning. A token is
a place made opaque: a version, the project it was made for, the positions, a checksum. It is
neither secret nor signed, because forging one yields nothing: every read is filtered by the
caller's own project. The checksum is there so that a cut or mistyped token is told as INVALID_TOKEN
and not as a strange place in history.

    byte 0        version, 1
    bytes 1–4     project id, big-endian
    13 each       lane (1), seq (8), fingerprint (4, signed), lanes ascending
    last 4        CRC-32 of all before

in URL-safe base64 without padding. Each place has one token: another text for the same bytes is
refused too.
"""

from __future__ import annotations

import base64
import contextlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mailgrpc.core.event import Event
from mailgrpc.errors import InvalidRequest, Reason, Violation

_VERSION = 1
_HEAD = struct.Struct(">BI")
_ENTRY = struct.Struct(">BQi")
_CHECKSUM = struct.Struct(">I")
_MAX_TEXT = 512  # 16 lanes take 290 characters
_MAX_SEQ = 2**63 - 1  # what PostgreSQL can be asked for


@dataclass(frozen=True, slots=True)
class Position:
    """The last event seen of a lane, with the fingerprint that proves it is the same event."""

    seq: int
    fingerprint: int = 0


Place = Mapping[int, Position]
ORIGIN = Position(0)
HISTORY_GONE = "this place in the history no longer exists; take a snapshot and go on from there"
"""What the owner of an expired token is told."""


def advance(place: Place, events: Sequence[Event]) -> dict[int, Position]:
    """The place behind these events, which were read at `place` and in this order."""
    moved = dict(place)
    for event in events:
        moved[event.lane] = Position(event.seq, event.fingerprint)
    return moved


def covers(place: Place, other: Place) -> bool:
    """Whether `place` is at or behind `other` in every lane: it has seen all that `other` has."""
    return all(place.get(lane, ORIGIN).seq >= position.seq for lane, position in other.items())


def join(place: Place, other: Place) -> dict[int, Position]:
    """The place that has seen what either has: in each lane the later of both."""
    joined = dict(place)
    for lane, position in other.items():
        if position.seq > joined.get(lane, ORIGIN).seq:
            joined[lane] = position
    return joined


def encode_token(project_id: int, place: Place) -> str:
    """The token of a place, for the callers of one project."""
    entries = [_ENTRY.pack(lane, p.seq, p.fingerprint) for lane, p in sorted(place.items())]
    body = b"".join([_HEAD.pack(_VERSION, project_id), *entries])
    return _text_of(body + _CHECKSUM.pack(zlib.crc32(body)))


def decode_token(project_id: int, token: str) -> dict[int, Position]:
    """The place in a token. Raises InvalidRequest for one that this project was not given."""
    whole = _bytes_of(token)
    body, checksum = whole[: -_CHECKSUM.size], whole[-_CHECKSUM.size :]
    size = len(body) - _HEAD.size
    if size < 0 or size % _ENTRY.size or _CHECKSUM.pack(zlib.crc32(body)) != checksum:
        raise _invalid("it is cut or changed")
    version, project = _HEAD.unpack_from(body)
    if version != _VERSION:
        raise _invalid("it was made by a version that this server does not know")
    if project != project_id:
        raise _invalid("it was made for another project")
    entries = list(_ENTRY.iter_unpack(body[_HEAD.size :]))
    lanes = [lane for lane, _, _ in entries]
    if lanes != sorted(set(lanes)) or any(seq > _MAX_SEQ for _, seq, _ in entries):
        raise _invalid("it was not made by this service")
    return {lane: Position(seq, fingerprint) for lane, seq, fingerprint in entries}


def _bytes_of(token: str) -> bytes:
    if len(token) <= _MAX_TEXT and token.isascii():
        padded = token.encode() + b"=" * (-len(token) % 4)
        with contextlib.suppress(ValueError):  # binascii.Error is one
            whole = base64.b64decode(padded, altchars=b"-_", validate=True)
            if _text_of(whole) == token:
                return whole
    raise _invalid("it is not a token of this service")


def _text_of(whole: bytes) -> str:
    return base64.urlsafe_b64encode(whole).rstrip(b"=").decode()


def _invalid(why: str) -> InvalidRequest:
    return InvalidRequest(Violation("resume_token", Reason.INVALID_TOKEN, why))
