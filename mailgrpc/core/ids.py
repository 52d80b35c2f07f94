"""Identifiers: ordered by time, opaque to callers, 16 bytes in the database.

A message id is a UUIDv7 (RFC 9562) whose last 16 bits are zero. The delivery to its n-th
recipient (1 is the first) is the same number with n in these bits. So the deliveries of a message
lie side by side in the primary key, a delivery tells its message without a look-up, and no second
index is needed on the largest table. 58 random bits within a millisecond remain.

To callers an id is a prefix and 26 characters of Crockford's base32, lowercase, which keeps the
order: `msg_` + 26. Nobody may take anything from it, and foreign ids are only looked up, so what
does not parse is simply not found.

Ids are made as the driver makes those that it reads: its class is the standard library's UUID, and
equal to it, but made in C, in a fifth of the time.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import datetime

from asyncpg.pgproto.pgproto import UUID

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_DIGIT_OF = {c: i for i, c in enumerate(_ALPHABET)}
# Two characters at a time.
_PAIRS = [a + b for a in _ALPHABET for b in _ALPHABET]
_TEXT_LENGTH = 26

MESSAGE = "msg_"
DELIVERY = "dlv_"
EVENT = "evt_"
CALL = "call_"


def new_id(now_ms: int | None = None) -> uuid.UUID:
    """A UUIDv7: for attempts, calls and events. `now_ms` is Unix time in milliseconds."""
    return _of(_number(now_ms))


def new_message_id(now_ms: int | None = None) -> uuid.UUID:
    """A fresh message id; its last 16 bits are zero."""
    return _of(_number(now_ms) & ~0xFFFF)


def _number(now_ms: int | None) -> int:
    ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    try:
        chance = _spare.pop()
    except IndexError:
        chance = _draw()
    value = (ms & 0xFFFF_FFFF_FFFF) << 80 | int.from_bytes(chance, "big")
    return value & ~(0xF << 76 | 0x3 << 62) | 7 << 76 | 2 << 62


_spare: list[bytes] = []
"""Ten random bytes each: the kernel is asked for many at once, which costs as much as for one."""
_DRAWN = 256
os.register_at_fork(after_in_child=_spare.clear)  # or two processes would make the same ids


def _draw() -> bytes:
    drawn = os.urandom(10 * _DRAWN)
    _spare.extend(drawn[i : i + 10] for i in range(10, len(drawn), 10))
    return drawn[:10]


def _of(number: int) -> uuid.UUID:
    return UUID(number.to_bytes(16, "big"))


def first_id_at(moment: datetime) -> uuid.UUID:
    """The lowest id that can have been made at `moment` or later, by the clock that made it."""
    ms = min(max(int(moment.timestamp() * 1000), 0), 0xFFFF_FFFF_FFFF)
    return _of(ms << 80)


def delivery_id(message_id: uuid.UUID, number: int) -> uuid.UUID:
    """The id of the delivery to recipient `number`, from 1 to 65,535."""
    return _of(message_id.int | number)


def message_of(delivery: uuid.UUID) -> uuid.UUID:
    """The message that a delivery belongs to."""
    return UUID(delivery.bytes[:14] + b"\0\0")


def number_of(delivery: uuid.UUID) -> int:
    """Which of its message's recipients a delivery goes to, from 1."""
    return delivery.int & 0xFFFF


def to_text(prefix: str, value: uuid.UUID) -> str:
    """How callers see an id."""
    n = value.int
    return (  # no loop: it is on the way of every answer and every mail
        f"{prefix}{_PAIRS[n >> 120]}{_PAIRS[n >> 110 & 1023]}{_PAIRS[n >> 100 & 1023]}"
        f"{_PAIRS[n >> 90 & 1023]}{_PAIRS[n >> 80 & 1023]}{_PAIRS[n >> 70 & 1023]}"
        f"{_PAIRS[n >> 60 & 1023]}{_PAIRS[n >> 50 & 1023]}{_PAIRS[n >> 40 & 1023]}"
        f"{_PAIRS[n >> 30 & 1023]}{_PAIRS[n >> 20 & 1023]}{_PAIRS[n >> 10 & 1023]}{_PAIRS[n & 1023]}"
    )


def from_text(prefix: str, text: str) -> uuid.UUID | None:
    """The id behind `text`; None for anything that `to_text` cannot have written."""
    if len(text) != len(prefix) + _TEXT_LENGTH or not text.startswith(prefix):
        return None
    number = 0
    for character in text[len(prefix) :]:
        digit = _DIGIT_OF.get(character)
        if digit is None:
            return None
        number = number << 5 | digit
    return _of(number) if number < 1 << 128 else None


def rfc_message_id(message_id: uuid.UUID, sender_address: str) -> str:
    """The Message-ID header (RFC 5322 section 3.6.4), with its brackets; the same in every attempt.

    Under the sender's domain, because that is who vouches for its being unique.
    """
    return f"<{to_text(MESSAGE, message_id)}@{sender_address.rpartition('@')[2]}>"
