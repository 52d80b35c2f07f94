"""Handing over: a mail is started by a worker in the commit that takes it in, where one offers a place.

Otherwise an acknowledged mail waits until a worker finds it: a ring, a claim, its content, a start, each
a trip to a store, and two of them a commit. A worker that has free slots and nothing due offers places
instead. A place is an attempt that it has made up and not used: an id. A server that holds places stores
a delivery as SENDING, by that session, with that attempt (enqueue_messages), and after the commit tells
the worker which delivery it was. The worker reads it and sends.

What is promised without it holds with it.
- PostgreSQL decides. The insert takes the worker's row, shared, as a start does, and starts nothing where
  the session has ended or begun a later epoch on the channel: then the delivery is QUEUED like any other.
  And the worker sends only what it reads there as started in its name.
- Redis carries ids, as hints. What is said twice is refused, because a place is used once; what is never
  said is looked for. Without Redis there are no places.
- Whatever was offered comes back, used or not, within MISSING_S. Where it does not (a server was killed
  between commit and word, a list was flushed) the worker begins a new epoch, after which no insert can
  use those places any more, and reads what was started with them: that was not sent, which the worker
  alone can prove, and it says so and tries again. A word that comes after that is refused.
- A place in the journal is taken with each that is offered.
- Nothing is offered while more is due than is claimed: what waits is overtaken by few.
- RETRYING alone. Whatever a killed worker had been given is in doubt, and goes out again after its
  lease; of SEND_ONCE, which would end OUTCOME_UNKNOWN, it must be as little as can be on the wire.

A server takes places only while mail comes in, and keeps none for longer than HELD_S: they would be kept
from others, and from the worker's own claims. It looks whether who offered them is alive: a worker says
so with each offer, for ALIVE_S, so that few mails are given to one that was killed.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import msgpack

from mailgrpc.core.value import value
from mailgrpc.doorbell import Doorbell

HELD_S = 0.5
"""How long a server keeps what it does not use."""
RETRACT_S = 0.7
"""After which a worker takes back what no server has taken."""
MISSING_S = 1.4
"""After which what has not come back is looked for."""
ALIVE_S = 1.2
NO_INSTALLATION = uuid.UUID(int=0)
_WORD_S = 30
"""How long a word waits for a worker. Nobody reads one that came after MISSING_S."""
_BLOCK_S = 1
_PATIENCE_S = 2.0


@value
class Lot:
    """Places that are offered together."""

    session_id: int
    epoch: int
    channel: str
    attempts: tuple[uuid.UUID, ...]


@value
class Word:
    """What a server tells a worker: which delivery took which place, and which places none took."""

    channel: str
    started: Sequence[tuple[uuid.UUID, uuid.UUID]]
    """Attempt and delivery."""
    unused: Sequence[uuid.UUID]


class Handover:
    """One process's end of it. Nothing here raises: what Redis does not do has not happened."""

    def __init__(self, doorbell: Doorbell) -> None:
        self._doorbell = doorbell
        self.exists = doorbell.exists
        self.installation = NO_INSTALLATION
        """Whose lots these are: others may share this Redis."""

    async def offer(self, lot: Lot) -> bool:
        """Lay a lot out for the servers. False: it may lie there nevertheless."""

        async def lay(redis: Any) -> bool:
            async with redis.pipeline(transaction=False) as both:
                both.set(_alive(lot.session_id), b"1", px=int(ALIVE_S * 1000))
                both.rpush(self._lots(lot.channel), _packed(lot))
                await both.execute()
            return True

        return await self._doorbell.ask(lay, _PATIENCE_S) or False

    async def retract(self, lot: Lot) -> bool:
        """Take a lot back. False: a server may have it."""

        async def remove(redis: Any) -> bool:
            return bool(await redis.lrem(self._lots(lot.channel), 0, _packed(lot)))

        return await self._doorbell.ask(remove, _PATIENCE_S) or False

    async def taken(self, channels: Sequence[str]) -> Lot | None:
        """Wait for a lot for one of these channels, for about a second."""

        async def take(redis: Any) -> Lot | None:
            found = await redis.blpop([self._lots(c) for c in channels], timeout=_BLOCK_S)
            lot = _unpacked(found[1]) if found is not None else None
            if lot is None or await redis.exists(_alive(lot.session_id)):
                return lot
            await self.tell(lot.session_id, Word(lot.channel, (), lot.attempts))
            return None

        return await self._doorbell.ask(take, _BLOCK_S + _PATIENCE_S)

    async def tell(self, session_id: int, word: Word) -> None:
        """Tell a worker."""
        packed = msgpack.packb(
            (word.channel, [(a.bytes, d.bytes) for a, d in word.started], _bytes(word.unused))
        )

        async def push(redis: Any) -> None:
            async with redis.pipeline(transaction=False) as both:
                both.rpush(_words(session_id), packed)
                both.expire(_words(session_id), _WORD_S)
                await both.execute()

        await self._doorbell.ask(push, _PATIENCE_S)

    async def leave(self, session_id: int) -> None:
        """Say that a worker is not there any more: what it offers is of no use."""
        await self._doorbell.ask(lambda redis: redis.delete(_alive(session_id)), _PATIENCE_S)

    def _lots(self, channel: str) -> str:
        return f"mailgrpc:lots:{self.installation}:{channel}"

    async def told(self, session_id: int) -> Word | None:
        """Wait for a word to this session, for about a second."""

        async def take(redis: Any) -> Word | None:
            found = await redis.blpop([_words(session_id)], timeout=_BLOCK_S)
            return _word(found[1]) if found is not None else None

        return await self._doorbell.ask(take, _BLOCK_S + _PATIENCE_S)


def _words(session_id: int) -> str:
    return f"mailgrpc:words:{session_id}"


def _alive(session_id: int) -> str:
    return f"mailgrpc:alive:{session_id}"


def _packed(lot: Lot) -> bytes:
    packed: bytes = msgpack.packb((lot.session_id, lot.epoch, lot.channel, _bytes(lot.attempts)))
    return packed


def _unpacked(packed: bytes) -> Lot | None:
    """None: somebody else has written there."""
    try:
        session_id, epoch, channel, attempts = msgpack.unpackb(packed)
        return Lot(int(session_id), int(epoch), str(channel), _ids(attempts))
    except (ValueError, TypeError):
        return None


def _word(packed: bytes) -> Word | None:
    try:
        channel, started, unused = msgpack.unpackb(packed)
        pairs = [(uuid.UUID(bytes=a), uuid.UUID(bytes=d)) for a, d in started]
        return Word(str(channel), pairs, _ids(unused))
    except (ValueError, TypeError):
        return None


def _bytes(ids: Sequence[uuid.UUID]) -> list[bytes]:
    return [i.bytes for i in ids]


def _ids(packed: Sequence[bytes]) -> tuple[uuid.UUID, ...]:
    return tuple(uuid.UUID(bytes=i) for i in packed)
