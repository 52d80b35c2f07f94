"""Handing over: a mail is started by a worker in the commit that takes it in, where one gave credit.

Otherwise an acknowledged mail waits until a worker finds it: a ring, a claim, its content, a start, each
a trip to a store, and two of them a commit. A worker that has claimed all that is due, and has room, gives
credit instead. A credit is an attempt that it has made up and not used: an id. A server that holds some
stores a delivery as SENDING, by that session, with that attempt (enqueue_messages), and after the commit
tells the worker which delivery it was. The worker reads it and sends.

What is promised without it holds with it.
- PostgreSQL decides. The insert holds the session, shared (lock_session), and starts nothing where it has
  ended or begun a later epoch on the channel: then the delivery is QUEUED like any other.
  And the worker sends only what it reads there as started in its name.
- Redis carries ids, as hints. A notice that comes twice is refused, because a credit is used once; what no
  notice tells of is looked for. Without Redis there is no credit.
- Whatever was given comes back, used or not, within MISSING_S. Where it does not (a server was killed
  between commit and notice, a list was flushed) the worker begins a new epoch, after which no insert can
  use those credits any more, and reads what was started with them: that was not sent, which the worker
  alone can prove, and it says so and tries again. A notice that comes after that is passed over. What
  it was told of, and whose result PostgreSQL has lost with a primary, it calls unknown.
- A place in the journal is taken with each credit.
- No credit is given while more is due than is claimed, nor more than goes out in half a second: what
  waits is overtaken by few, and what is urgent waits no longer than that behind what is not. Priorities
  and the turns of projects are matters of a claim; here all that comes is started at once.
- RETRYING alone. Whatever a killed worker had been given is in doubt, and goes out again after its
  lease; of SEND_ONCE, which would end OUTCOME_UNKNOWN, it must be as little as can be on the wire.
- What is handed over while the channel begins to pause comes back unsent, as what was started before.

A server takes credit only while mail comes in, and keeps it for not much longer than HELD_S: it would be
kept from others, and from the worker's own claims. It looks whether who gave it is alive: a worker says so
with each grant, for ALIVE_S, so that few mails are given to one that was killed.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgpack

from mailgrpc.core.value import value
from mailgrpc.doorbell import Doorbell

T = TypeVar("T")

MAIL_COMES_S = 5.0
"""How long after the last mail more of it is expected, by servers and by workers."""
HELD_S = 0.35
"""How long a server keeps what it does not use. In quarters of that it is looked for."""
LOOK_S = 0.2
"""How often a worker looks after what it has given."""
RETRACT_S = 0.5
"""After which a worker takes back what no server has taken."""
MISSING_S = 1.7
"""After which what has not come back is looked for. More than RETRACT_S, a look and 1.25 × HELD_S, by half
a second for a flush and for processes that wait for a processor; it and another look are less than the two
seconds that a loss in Redis may cost."""
ALIVE_S = 1.2
_NOTICE_S = 30
"""How long a notice lies for a worker that does not listen."""
_BLOCK_S = 1
_PATIENCE_S = 2.0
_AGAIN_S = 0.5
"""Between two questions that Redis does not wait with: it is away."""

Running = tuple[uuid.UUID, uuid.UUID]
"""An attempt and its delivery."""


@value
class Grant:
    """Credits that are given together."""

    session_id: int
    epoch: int
    channel: str
    attempts: tuple[uuid.UUID, ...]


@value
class Notice:
    """What a server tells a worker: what was started by its credits, and which of them were not used."""

    channel: str
    epoch: int
    started: Sequence[Running]
    unused: Sequence[uuid.UUID]


class Handover:
    """One process's end of it. Nothing here raises: what Redis does not do has not happened."""

    def __init__(self, doorbell: Doorbell) -> None:
        self._doorbell = doorbell
        self.exists = doorbell.exists
        self.installation = uuid.UUID(int=0)
        """Whose grants these are: others may share this Redis."""
        self.has_given = asyncio.Event()
        """Set by `give`: there may be something to hear."""

    async def give(self, grant: Grant) -> bool:
        """Lay a grant out for the servers. False: it may lie there nevertheless."""
        self.has_given.set()

        async def lay(redis: Any) -> bool:
            async with redis.pipeline(transaction=False) as both:
                both.set(_alive(grant.session_id), b"1", px=int(ALIVE_S * 1000))
                both.rpush(self._grants(grant.channel), _pack_grant(grant))
                await both.execute()
            return True

        return await self._doorbell.ask(lay, _PATIENCE_S) or False

    async def retract(self, grant: Grant) -> bool:
        """Take a grant back. False: a server may have it."""

        async def remove(redis: Any) -> bool:
            return bool(await redis.lrem(self._grants(grant.channel), 0, _pack_grant(grant)))

        return await self._doorbell.ask(remove, _PATIENCE_S) or False

    async def take(self, channels: Sequence[str]) -> Grant | None:
        """Wait for a grant for one of these channels, for about a second."""

        async def pop(redis: Any) -> Grant | None:
            names = [self._grants(c) for c in channels]
            while (found := await redis.blpop(names, timeout=_BLOCK_S)) is not None:
                if (grant := _grant_of(found[1])) is None:
                    continue
                if await redis.exists(_alive(grant.session_id)):
                    return grant
                unused = Notice(grant.channel, grant.epoch, (), grant.attempts)
                await self.tell(grant.session_id, unused)  # in case that it lives after all
            return None

        return await self._asked_in_peace(pop)

    async def tell(self, session_id: int, notice: Notice) -> None:
        """Tell a worker."""

        async def push(redis: Any) -> None:
            async with redis.pipeline(transaction=False) as both:
                both.rpush(_notices(session_id), _pack_notice(notice))
                both.expire(_notices(session_id), _NOTICE_S)
                await both.execute()

        await self._doorbell.ask(push, _PATIENCE_S)

    async def hear(self, session_id: int) -> Notice | None:
        """Wait for a notice to this session, for about a second."""

        async def pop(redis: Any) -> Notice | None:
            while (
                found := await redis.blpop([_notices(session_id)], timeout=_BLOCK_S)
            ) is not None:
                if (notice := _notice_of(found[1])) is not None:
                    return notice
            return None

        return await self._asked_in_peace(pop)

    async def leave(self, session_id: int) -> None:
        """Say that a worker is not there any more: its credits are of no use."""
        await self._doorbell.ask(lambda redis: redis.delete(_alive(session_id)), _PATIENCE_S)

    async def _asked_in_peace(self, command: Callable[[Any], Awaitable[T | None]]) -> T | None:
        """What a command that waits by itself answers; who asks again does so not at once."""
        clock = asyncio.get_running_loop().time
        asked_at = clock()
        answer = await self._doorbell.ask(command, _BLOCK_S + _PATIENCE_S)
        if answer is None and clock() - asked_at < _AGAIN_S:
            await asyncio.sleep(_AGAIN_S)
        return answer

    def _grants(self, channel: str) -> str:
        return f"mailgrpc:grants:{self.installation}:{channel}"


def _notices(session_id: int) -> str:
    return f"mailgrpc:notices:{session_id}"


def _alive(session_id: int) -> str:
    return f"mailgrpc:alive:{session_id}"


def _pack_grant(grant: Grant) -> bytes:
    packed: bytes = msgpack.packb(
        (grant.session_id, grant.epoch, grant.channel, _bytes(grant.attempts))
    )
    return packed


def _grant_of(packed: bytes) -> Grant | None:
    """None: somebody else has written there."""
    try:
        session_id, epoch, channel, attempts = msgpack.unpackb(packed)
        grant = Grant(session_id, epoch, channel, _ids(attempts))
    except (ValueError, TypeError):
        return None
    fits = type(session_id) is int and 0 <= session_id < 2**63 and _is_named(channel, epoch)
    return grant if fits and attempts else None


def _pack_notice(notice: Notice) -> bytes:
    started = [(attempt.bytes, delivery.bytes) for attempt, delivery in notice.started]
    packed: bytes = msgpack.packb((notice.channel, notice.epoch, started, _bytes(notice.unused)))
    return packed


def _notice_of(packed: bytes) -> Notice | None:
    try:
        channel, epoch, started, unused = msgpack.unpackb(packed)
        running = [(uuid.UUID(bytes=a), uuid.UUID(bytes=d)) for a, d in started]
        notice = Notice(channel, epoch, running, _ids(unused))
    except (ValueError, TypeError):
        return None
    return notice if _is_named(channel, epoch) else None


def _is_named(channel: object, epoch: object) -> bool:
    return type(channel) is str and type(epoch) is int and 0 <= epoch < 2**31


def _bytes(ids: Sequence[uuid.UUID]) -> list[bytes]:
    return [i.bytes for i in ids]


def _ids(packed: Sequence[bytes]) -> tuple[uuid.UUID, ...]:
    return tuple(uuid.UUID(bytes=i) for i in packed)
