"""What a server does with the credit that workers offer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mailgrpc.core.delivery import Mode, Role, State
from mailgrpc.core.ids import delivery_id, new_id, new_message_id
from mailgrpc.core.message import (
    Attachment,
    DeliveryOptions,
    Mailbox,
    MailMessage,
    Recipient,
    Submission,
)
from mailgrpc.db.engine import AmbiguousCommit, Database
from mailgrpc.db.messages import Inserted, NewMessage, insert_messages
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import StoreUnavailable
from mailgrpc.handover import HELD_S, Grant, Handover, Notice
from mailgrpc.server.credits import ENOUGH, MOST_CHARACTERS, Credits
from tests.gateway import Gateway, enqueue, until

PLAIN = Inserted(frozenset(), frozenset())


class Desk(Handover):
    """A Redis of which a test sees all: grants are laid on it, and notices lie in `said`."""

    def __init__(self) -> None:
        super().__init__(Doorbell(None))
        self.exists = True
        self.grants: list[Grant] = []
        self.laid = asyncio.Event()
        self.said: list[tuple[int, Notice]] = []

    def lay(self, *grants: Grant) -> None:
        self.grants += grants
        self.laid.set()

    async def take(self, channels: Any) -> Grant | None:
        while True:
            for grant in self.grants:
                if grant.channel in channels:
                    self.grants.remove(grant)
                    return grant
            self.laid.clear()
            await self.laid.wait()

    async def tell(self, session_id: int, notice: Notice) -> None:
        self.said.append((session_id, notice))

    @property
    def unused(self) -> list[uuid.UUID]:
        return [a for _, notice in self.said for a in notice.unused]

    @property
    def started(self) -> list[tuple[uuid.UUID, uuid.UUID]]:
        return [pair for _, notice in self.said for pair in notice.started]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def grant(
    count: int = 4, *, session_id: int = 7, epoch: int = 0, channel: str = "default"
) -> Grant:
    return Grant(session_id, epoch, channel, tuple(new_id() for _ in range(count)))


def new(
    to: int = 1,
    *,
    channel: str = "default",
    text: str = "Hi",
    files: tuple[Attachment, ...] = (),
    **options: Any,
) -> NewMessage:
    recipients = tuple(Recipient(f"a{n}@example.com", role=Role.TO) for n in range(to))
    mail = MailMessage(Mailbox("shop@example.com"), recipients, "Hello", text, attachments=files)
    return NewMessage(
        new_message_id(),
        1,
        Submission(mail, DeliveryOptions(**options)),
        b"",
        0,
        channel,
        datetime.now(UTC) + timedelta(days=1),
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
async def credit(desk: Desk, clock: Clock) -> AsyncIterator[Credits]:
    """Of a server that takes mail in on two channels."""
    credit = Credits(desk, ["default", "bulk"], clock=clock)
    credit.start(uuid.uuid4())
    assert credit.take_for([new()]) is None  # there are none yet, and now they are wanted
    yield credit
    await credit.stop()


async def held(desk: Desk, *grants: Grant) -> None:
    desk.lay(*grants)
    await until(lambda: not desk.grants)
    await asyncio.sleep(0)


async def test_a_flush_takes_credit_for_what_may_have_it(credit: Credits, desk: Desk) -> None:
    await held(desk, grant())
    soon = datetime.now(UTC) + timedelta(hours=1)
    file = Attachment("a.txt", b"a", "text/plain")
    flush = [
        new(),
        new(2),
        new(files=(file,)),
        new(send_at=soon),
        new(mode=Mode.SEND_ONCE),
        new(text="x" * (MOST_CHARACTERS + 1)),
        new(channel="bulk"),
        new(mode=Mode.RETRYING),
    ]
    start = credit.take_for(flush)
    assert start is not None
    assert [a is not None for a in start.attempts] == [True, *[False] * 6, True]
    assert (start.session_id, start.channel) == (7, "default")
    assert not credit.note_stored(start, flush, PLAIN)  # the others are to be rung for
    await until(lambda: len(desk.started) == 2)
    assert desk.started == [
        (start.attempts[0], delivery_id(flush[0].message_id, 1)),
        (start.attempts[-1], delivery_id(flush[-1].message_id, 1)),
    ]


async def test_a_flush_is_started_by_one_worker(credit: Credits, desk: Desk) -> None:
    await held(desk, grant(1), grant(2), grant(2, session_id=8))
    flush = [new() for _ in range(4)]
    start = credit.take_for(flush)
    assert start is not None
    assert [a is not None for a in start.attempts] == [True, True, True, False]
    second = credit.take_for(flush)
    assert second is not None
    assert second.session_id == 8


async def test_who_was_not_started_does_not_use_a_place_up(credit: Credits, desk: Desk) -> None:
    await held(desk, grant())
    flush = [new() for _ in range(3)]
    start = credit.take_for(flush)
    assert start is not None
    known, suppressed = (frozenset({flush[n].message_id}) for n in (0, 1))
    assert credit.note_stored(start, flush, Inserted(known, suppressed))
    await until(lambda: bool(desk.said))
    assert desk.unused == list(start.attempts[:2])
    assert desk.started == [(start.attempts[2], delivery_id(flush[2].message_id, 1))]


async def test_credits_of_a_session_that_is_over_are_forgotten(credit: Credits, desk: Desk) -> None:
    await held(desk, grant(), grant(session_id=8))
    flush = [new()]
    start = credit.take_for(flush)
    assert start is not None
    assert not credit.note_stored(start, flush, Inserted(frozenset(), frozenset(), unstarted=True))
    assert desk.said == []
    following = credit.take_for(flush)
    assert following is not None
    assert following.session_id == 8


async def test_what_is_not_used_goes_back(credit: Credits, desk: Desk, clock: Clock) -> None:
    await held(desk, first := grant())
    start = credit.take_for([new()])
    assert start is not None
    clock.now += HELD_S
    await until(lambda: len(desk.unused) == 3)
    assert set(desk.unused) == set(first.attempts) - set(start.attempts)
    assert credit.take_for([new()]) is None


async def test_a_server_that_stops_gives_all_back(desk: Desk, clock: Clock) -> None:
    credit = Credits(desk, ["default"], clock=clock)
    credit.start(uuid.uuid4())
    credit.take_for([new()])
    await held(desk, first := grant())
    await credit.stop()
    assert sorted(desk.unused) == sorted(first.attempts)


async def test_enough_is_enough(credit: Credits, desk: Desk) -> None:
    desk.lay(grant(ENOUGH - 1), grant(ENOUGH), grant(1), grant(1, channel="bulk"))
    await until(lambda: len(desk.grants) == 1)
    await asyncio.sleep(0.01)
    assert [left.channel for left in desk.grants] == ["default"]


async def test_without_mail_nothing_is_taken(desk: Desk, clock: Clock) -> None:
    credit = Credits(desk, ["default"], clock=clock)
    credit.start(uuid.uuid4())
    desk.lay(grant())
    await asyncio.sleep(0.01)
    assert len(desk.grants) == 1
    credit.take_for([new()])
    await until(lambda: not desk.grants)
    await credit.stop()


@pytest.mark.parametrize(
    ("error", "goes_back"), [(AmbiguousCommit("?"), False), (StoreUnavailable("!"), True)]
)
async def test_what_may_have_been_stored_keeps_its_place(
    server_only: Gateway,
    monkeypatch: pytest.MonkeyPatch,
    error: StoreUnavailable,
    goes_back: bool,
) -> None:
    """In doubt the worker looks for it; where nothing was done the place is free again."""
    desk, credit = _desk_of(server_only)
    credit.take_for([new()])
    await held(desk, first := grant())
    _fail_once(monkeypatch, error)
    stub = server_only.stub
    if goes_back:
        with pytest.raises(Exception, match="UNAVAILABLE"):
            await stub.Enqueue(enqueue())
    else:
        await stub.Enqueue(enqueue())
    await server_only.server._credits.stop()  # gives back what is left of it
    assert len(set(first.attempts) - set(desk.unused)) == (0 if goes_back else 1)
    assert desk.started == []


def _desk_of(gateway: Gateway) -> tuple[Desk, Credits]:
    credit = gateway.server._credits
    desk = Desk()
    credit._handover = desk
    return desk, credit


def _fail_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real: Callable[..., Any] = insert_messages
    left = [error]

    async def insert(*args: Any) -> Inserted:
        if left:
            raise left.pop()
        found: Inserted = await real(*args)
        return found

    monkeypatch.setattr("mailgrpc.server.intake.insert_messages", insert)


async def test_a_gateway_hands_over_and_sends_each_once(gateway: Gateway, db: Database) -> None:
    """Real parts: after the first mails the rest go from hand to hand."""
    for n in range(40):
        await gateway.stub.Enqueue(enqueue(f"a{n}@example.com"))
        await asyncio.sleep(0.01)
    await until(lambda: len(gateway.capture.outbox) >= 40)
    async with asyncio.timeout(10):
        while await db.fetch("SELECT FROM due LIMIT 1"):
            await asyncio.sleep(0.01)
    left = [r.address for captured in gateway.capture.outbox for r in captured.recipients]
    assert sorted(left) == sorted(f"a{n}@example.com" for n in range(40))
    [[handed]] = await db.fetch("SELECT count(*) FROM attempts WHERE id = call_id")
    assert handed > 10
    states = await db.fetch("SELECT DISTINCT state FROM deliveries")
    assert [row["state"] for row in states] == [State.SENT]
