"""What a machine of deliveries holds the rows to: a ledger of what providers really took.

The rows are read anew after each step. Whatever the step did not announce must be as it was, and
what is there must keep the promises of DESIGN §4 and §7, each of which is a method here.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from mailgrpc.core.delivery import (
    MOVES,
    Delivery,
    Mode,
    Outcome,
    Result,
    State,
    Step,
    late_step,
    step_beside_acceptance,
)
from mailgrpc.core.retry import RetryPolicy
from mailgrpc.db.deliveries import Recorded, Started
from mailgrpc.db.engine import Connection, Database
from mailgrpc.db.rows import delivery_of

T = TypeVar("T")
WAITING = (State.QUEUED, State.DEFERRED)
TAKEN = (State.SENT, State.DELIVERED, State.BOUNCED, State.COMPLAINED)


@dataclass(eq=False)
class Try:
    """One attempt, as the provider and we know it."""

    name: str
    started: Started
    took: bool = False  # the provider has a copy
    known: Outcome | None = None  # what was recorded of it last
    was_unknown: bool = False  # it was recorded as UNKNOWN at some time

    @property
    def delivery_id(self) -> uuid.UUID:
        return self.started.delivery.delivery_id

    def __repr__(self) -> str:
        return self.name


@dataclass(eq=False)
class Mail:
    """One delivery, and all that ever happened to it."""

    delivery_id: uuid.UUID
    mode: Mode
    policy: RetryPolicy
    tries: list[Try] = field(default_factory=list)
    spared: int = 0
    resends: int = 0
    risks: int = 0  # of these, those with accept_duplicate_risk
    is_sent: bool = False  # acceptance of the last attempt is recorded, and no Resend came since

    @property
    def copies(self) -> int:
        """How many mails the recipient has."""
        return sum(t.took for t in self.tries)


@dataclass(eq=False)
class Told:
    """A result on its way to the database: in flight, in a journal, or in a reaper's hands."""

    attempt: Try
    recorded: Recorded

    def __repr__(self) -> str:
        return f"{self.attempt} was {self.recorded.result.outcome.name}"


@dataclass(frozen=True)
class Row:
    """A delivery, and where it stands in the queues."""

    delivery: Delivery
    attempt_id: uuid.UUID | None
    is_due: bool
    lease: int | None
    is_scheduled: bool


class World:
    """The database of all examples, one after the other, and the mails of this one."""

    def __init__(self, loop: asyncio.AbstractEventLoop, db: Database, reads: Connection) -> None:
        self._loop = loop
        self._reads = reads
        self.db = db

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it now."""
        self._is_as_read = False
        return self._loop.run_until_complete(work)

    def begin(self) -> None:
        """Forget the example before."""
        self.mails: list[Mail] = []
        self.rows: dict[uuid.UUID, Row] = {}
        self.run(
            self.db.write(
                """WITH a AS (DELETE FROM deliveries), b AS (DELETE FROM due),
                   c AS (DELETE FROM scheduled), d AS (DELETE FROM attempts),
                   e AS (DELETE FROM messages), f AS (DELETE FROM workers),
                   g AS (DELETE FROM suppressions), h AS (DELETE FROM request_ids)
                   DELETE FROM events"""
            )
        )
        self._seq = 0
        self._expected: dict[uuid.UUID, tuple[State, bool]] = {}

    def look(self) -> None:
        """Read all rows; what moved since was expected, and every promise is kept."""
        if self._is_as_read:
            return
        before, expected = self.rows, self._expected
        self._expected = {}
        rows, attempts, events = self.run(self._read())
        self._is_as_read = True
        self.rows = {row["id"]: _row_of(row) for row in rows}
        for mail in self.mails:
            now = self.rows[mail.delivery_id]
            was = before.get(mail.delivery_id)
            _nothing_else_moved(was, now, expected.get(mail.delivery_id))
            _events_have_no_gap_and_no_repeat(
                was, now, [e for e in events if e["delivery_id"] == mail.delivery_id]
            )
            _attempts_say_what_was_recorded(
                mail, {a["id"]: a for a in attempts if a["delivery_id"] == mail.delivery_id}
            )
            _queues_agree(now, {t.started.attempt_id for t in mail.tries})
            _no_copy_too_many(mail)
            _no_state_claims_too_much(mail, now.delivery)
            _spared_attempts_use_nothing_up(mail, now.delivery)

    async def _read(self) -> tuple[list[Any], list[Any], list[Any]]:
        rows = await self._reads.fetch(
            """SELECT d.*, q.delivery_id IS NOT NULL AS is_due, q.session_id AS lease,
                   s.delivery_id IS NOT NULL AS is_scheduled
               FROM deliveries d LEFT JOIN due q ON q.delivery_id = d.id
               LEFT JOIN scheduled s ON s.delivery_id = d.id ORDER BY d.id"""
        )
        attempts = await self._reads.fetch("SELECT delivery_id, id, number, outcome FROM attempts")
        events = await self._reads.fetch(
            "SELECT seq, delivery_id, version, old_state, state FROM events"
            " WHERE seq > $1 ORDER BY seq",
            self._seq,
        )
        self._seq = events[-1]["seq"] if events else self._seq
        return rows, attempts, events

    # What was read, and what a step is going to change.

    def row(self, mail: Mail) -> Row:
        """Of a delivery, as last read."""
        return self.rows[mail.delivery_id]

    def mail(self, delivery_id: uuid.UUID) -> Mail:
        """The one with this id."""
        return next(m for m in self.mails if m.delivery_id == delivery_id)

    def attempt(self, attempt_id: uuid.UUID) -> Try:
        """The one with this id."""
        tries = (t for m in self.mails for t in m.tries)
        return next(t for t in tries if t.started.attempt_id == attempt_id)

    def is_running(self, attempt: Try) -> bool:
        """Whether its delivery is SENDING by this attempt."""
        return self.rows[attempt.delivery_id].attempt_id == attempt.started.attempt_id

    @property
    def holders(self) -> list[int]:
        """The sessions that hold something, in the order of what they hold."""
        return list(dict.fromkeys(r.lease for r in self.rows.values() if r.lease is not None))

    def expect(self, delivery_id: uuid.UUID, state: State, mark: bool | None = None) -> None:
        """The delivery moves; its mark `possibly_sent` stays where none is given."""
        if mark is None:
            mark = self.rows[delivery_id].delivery.possibly_sent
        self._expected[delivery_id] = (state, mark)

    def verdicts(self, session: int, suppressed: set[str]) -> dict[uuid.UUID, State]:
        """Where a start of this session takes what it holds."""
        verdicts = {}
        for identifier, row in self.rows.items():
            if row.lease == session and row.delivery.state in WAITING:
                expiry = row.delivery.expire_at
                if expiry is not None and expiry < datetime.now(UTC):
                    verdicts[identifier] = State.EXPIRED
                elif row.delivery.recipient in suppressed:
                    verdicts[identifier] = State.SUPPRESSED
                else:
                    verdicts[identifier] = State.SENDING
        return verdicts

    def begun(self, started: Started) -> Try:
        """An attempt was started: the only one that runs, and of nothing that is known as sent."""
        mail = self.mail(started.delivery.delivery_id)
        assert all(t.known for t in mail.tries)
        assert not mail.is_sent
        name = f"attempt {started.delivery.attempt_count} of {self.mails.index(mail)}"
        mail.tries.append(Try(name, started))
        return mail.tries[-1]

    def told(self, attempt: Try, result: Result, running: Step) -> None:
        """A result was recorded; `running` is its step if the attempt still ran."""
        mail = self.mail(attempt.delivery_id)
        is_news = attempt.known in (None, Outcome.UNKNOWN)
        step: Step | None = None
        if self.is_running(attempt):
            known = any(t.known is Outcome.ACCEPTED for t in mail.tries)
            step = step_beside_acceptance(
                running, self.row(mail).delivery, another_was_accepted=known
            )
            mail.spared += step.spares
        elif is_news:
            others = any(
                t.known in (Outcome.ACCEPTED, Outcome.UNKNOWN)
                for t in mail.tries
                if t is not attempt
            )
            step = late_step(
                self.row(mail).delivery,
                result,
                others_may_have_left=others,
                is_overtaken=mail.tries[-1] is not attempt,
            )
        if step is not None:
            self.expect(mail.delivery_id, step.state, step.possibly_sent)
            mail.is_sent = step.state is State.SENT
        if is_news:
            attempt.known = result.outcome
            attempt.was_unknown |= result.outcome is Outcome.UNKNOWN


def _row_of(row: Any) -> Row:
    return Row(
        delivery_of(row), row["attempt_id"], row["is_due"], row["lease"], row["is_scheduled"]
    )


def _nothing_else_moved(was: Row | None, now: Row, expected: tuple[State, bool] | None) -> None:
    if was is None:
        assert (now.delivery.state, now.delivery.version) == (State.QUEUED, 1)
        return
    had, has = was.delivery, now.delivery
    if expected is None:
        assert has.version == had.version
        expected = (had.state, had.possibly_sent)
    else:
        assert has.version == had.version + 1
    assert (has.state, has.possibly_sent) == expected


def _events_have_no_gap_and_no_repeat(was: Row | None, now: Row, events: list[Any]) -> None:
    """Each tells the next version, by a move that the domain knows."""
    version, state = (was.delivery.version, was.delivery.state) if was else (0, 0)
    for event in events:
        version += 1
        assert (event["version"], event["old_state"]) == (version, state)
        state = State(event["state"])
        assert not event["old_state"] or state in MOVES[State(event["old_state"])]
    assert (now.delivery.version, now.delivery.state) == (version, state)


def _attempts_say_what_was_recorded(mail: Mail, attempts: dict[uuid.UUID, Any]) -> None:
    assert {t.started.attempt_id: t.known for t in mail.tries if t.known} == {
        i: Outcome(a["outcome"]) for i, a in attempts.items()
    }
    assert sorted(a["number"] for a in attempts.values()) == [
        n for n, t in enumerate(mail.tries, 1) if t.known
    ]


def _queues_agree(now: Row, attempts: set[uuid.UUID]) -> None:
    """A row in `due` is the lease of what is sent; what waits is in one queue, the rest in none."""
    state = now.delivery.state
    assert (state is State.SENDING) == (now.attempt_id is not None)
    assert now.attempt_id is None or now.attempt_id in attempts
    if state is State.SENDING:
        assert now.is_due and now.lease is not None and not now.is_scheduled
    elif state in WAITING:
        assert now.is_due != now.is_scheduled
        assert now.delivery.due_at is not None
        if now.is_scheduled:
            assert now.delivery.due_at > datetime.now(UTC) + timedelta(minutes=9)
    else:
        assert not now.is_due and not now.is_scheduled and now.delivery.due_at is None


def _no_copy_too_many(mail: Mail) -> None:
    unknown = sum(t.was_unknown for t in mail.tries)
    if mail.mode is Mode.SEND_ONCE:
        assert mail.copies <= 1 + mail.risks
    assert mail.copies <= 1 + unknown + mail.risks


def _no_state_claims_too_much(mail: Mail, delivery: Delivery) -> None:
    """SENT is true, and so is the silence of a delivery that is not marked `possibly_sent`."""
    if delivery.state in TAKEN:
        assert mail.copies
    elif not (delivery.state is State.SENDING or delivery.possibly_sent):
        assert not mail.copies
    if any(t.known is Outcome.UNKNOWN for t in mail.tries):
        assert delivery.possibly_sent


def _spared_attempts_use_nothing_up(mail: Mail, delivery: Delivery) -> None:
    assert delivery.attempt_count == len(mail.tries)
    assert delivery.spared == mail.spared
    if not mail.resends:
        used = len(mail.tries) - mail.spared
        assert used <= mail.policy.max_attempts
        assert delivery.state is not State.DEFERRED or used < mail.policy.max_attempts
