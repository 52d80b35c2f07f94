"""Deliveries under any order of things: a state machine over the real database.

Workers claim, start, hear from providers, die and are reaped; results come at once, late, twice or
in another order; callers resend and cancel; addresses are suppressed; time passes. After each step
the rows keep what tests/worker/world.py demands of them.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from datetime import UTC, datetime, timedelta
from functools import partial
from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mailgrpc.core.delivery import (
    Cause,
    Mode,
    Outcome,
    Result,
    State,
    Step,
    late_step,
    next_step,
    resend_refusal,
    resend_step,
)
from mailgrpc.core.ids import delivery_id, message_of, new_id
from mailgrpc.core.message import RetryWishes
from mailgrpc.db.deliveries import (
    Move,
    Recorded,
    Starting,
    claim_due,
    move_deliveries,
    promote_scheduled,
    record_outcomes,
    release_claims,
    resend_deliveries,
    start_deliveries,
)
from mailgrpc.db.connecting import Connector
from mailgrpc.db.engine import Database, SessionEnded, StaleVersion
from mailgrpc.db.workers import end_session, open_session, read_sessions, read_started
from mailgrpc.worker.expiry import Expiry
from mailgrpc.worker.sweep import Reaper
from tests.machines import steps
from tests.worker.rig import Clock, Store
from tests.worker.world import WAITING, Mail, Told, Try, World

KNOWN_FAULTS = """
Two ways in which `possibly_sent` is lost, each with a test of its own that fails until it is mended;
then what is said of `has_lost_its_mark` here and in world.py goes:

- Resend of SENT does not set it (test_what_was_sent_stays_marked_when_it_is_resent).
- Late proof that the last attempt was not sent takes it away, though an earlier one is known to be
  accepted (test_with_an_earlier_attempt_accepted_the_mark_stays).
"""
ANSWERS = {
    "accepted": Result(Outcome.ACCEPTED, status_code=250),
    "deferred": Result(Outcome.DEFERRED, Cause.MAILBOX_FULL, 452),
    "deferred for an hour": Result(
        Outcome.DEFERRED, Cause.RATE_LIMITED, 451, retry_after=timedelta(hours=1)
    ),
    "channel failed": Result(Outcome.DEFERRED, Cause.CONNECTION, of_channel=True),
    "last look": Result(Outcome.DEFERRED, Cause.WORKER_LOST),
    "rejected": Result(Outcome.REJECTED, Cause.BAD_ADDRESS, 550),
    "no answer, taken": Result(Outcome.UNKNOWN, Cause.TIMEOUT),
    "no answer, not taken": Result(Outcome.UNKNOWN, Cause.TIMEOUT),
}
TAKES = ("accepted", "no answer, taken")
MODES = st.sampled_from([Mode.RETRYING, Mode.RETRYING, Mode.SEND_ONCE])
RETRIES = st.sampled_from([RetryWishes(3, timedelta(hours=1)), RetryWishes(2)])
OUT_OF_REACH = timedelta(minutes=2)
"""By this, waits are longer than an example takes: nothing is due before a step says so."""
LISTS = partial(st.lists, min_size=1, max_size=2, unique_by=lambda told: told.attempt.delivery_id)
NUMBERS = st.integers(0, 2)
BETWEEN = ("wait", "expire", "walk", "suppress", "cancel", "cancel later")
RESENDABLE = set(State) - {State.QUEUED, State.SENDING, State.COMPLAINED}


class Deliveries(RuleBasedStateMachine):
    """What workers, reapers, callers and time do to a few deliveries."""

    calls: Bundle[Try] = Bundle("calls")  # on the wire
    results: Bundle[Told] = Bundle("results")
    moves: Bundle[Move] = Bundle("moves")  # decided by a caller

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.db = world.db
        self.store = Store(world.db)
        self.clock = Clock()
        self.expiry = Expiry(world.db, lane=0, clock=self.clock)
        self.reaper = Reaper(world.db, lane=0, clock=self.clock)
        self.alive: list[int] = []
        self.suppressed: set[str] = set()
        self.expected: dict[uuid.UUID, tuple[State, bool]] = {}
        world.begin()

    @invariant()
    def every_promise_is_kept(self) -> None:
        expected, self.expected = self.expected, {}
        self.world.look(expected)

    def any_in(self, *states: State) -> bool:
        """Whether a delivery is in one of these states."""
        return any(row.delivery.state in states for row in self.world.rows.values())

    # Workers.

    @initialize(wishes=st.lists(st.tuples(MODES, RETRIES), min_size=1, max_size=2))
    def enqueue(self, wishes: list[tuple[Mode, RetryWishes]]) -> None:
        for number, (mode, retry) in enumerate(wishes):
            put = self.store.put(f"{number}@example.com", mode=mode, retry=retry)
            identifier = delivery_id(self.world.run(put), 1)
            time.sleep(0.002)  # ids are in order from one millisecond to the next
            self.world.mails.append(Mail(identifier, mode, retry.policy()))

    @precondition(lambda self: self.any_in(*WAITING))
    @rule(target=calls, number=NUMBERS)
    def wait_claim_and_start(self, number: int) -> object:
        self.make_due()
        self.claim(number, 3)
        self.every_promise_is_kept()
        return self.start(number, answer_is_lost=False)

    @precondition(lambda self: self.any_in(*WAITING))
    @rule(number=NUMBERS, limit=st.integers(1, 3))
    def claim(self, number: int, limit: int) -> None:
        claims = self.world.run(claim_due(self.db, self._session(number), "default", limit, 0))
        for claimed in claims.claimed:
            row = self.world.rows[claimed.delivery_id]
            assert row.lease is None
            assert row.delivery.state in WAITING

    @precondition(lambda self: self.holders)
    @rule(target=calls, number=NUMBERS, answer_is_lost=st.booleans())
    def start(self, number: int, answer_is_lost: bool) -> object:
        """All that this session holds; that it asks for the rest as well changes nothing."""
        session = self._session(number)
        verdicts = self._verdicts(session)
        starting = [Starting(m.delivery_id, new_id(), new_id()) for m in self.world.mails]
        for _ in range(1 + answer_is_lost):
            started = self.world.run(start_deliveries(self.db, session, 0, starting))
        assert {s.delivery.delivery_id for s in started} == {
            i for i, state in verdicts.items() if state is State.SENDING
        }
        for identifier, state in verdicts.items():
            self.expected[identifier] = (
                state,
                self.world.rows[identifier].delivery.possibly_sent,
            )
        tries = []
        for one in started:
            mail = self.world.mail(one.delivery.delivery_id)
            assert all(t.known for t in mail.tries)  # one attempt at a time
            assert not mail.is_sent
            name = f"attempt {one.delivery.attempt_count} of {self.world.mails.index(mail)}"
            mail.tries.append(Try(name, one))
            tries.append(mail.tries[-1])
        return multiple(*tries)

    def _verdicts(self, session: int) -> dict[uuid.UUID, State]:
        """Where a start of this session takes what it holds."""
        verdicts = {}
        for identifier, row in self.world.rows.items():
            if row.lease == session and row.delivery.state in WAITING:
                expiry = row.delivery.expire_at
                if expiry is not None and expiry < datetime.now(UTC):
                    verdicts[identifier] = State.EXPIRED
                elif row.delivery.recipient in self.suppressed:
                    verdicts[identifier] = State.SUPPRESSED
                else:
                    verdicts[identifier] = State.SENDING
        return verdicts

    @precondition(lambda self: self.holders)
    @rule(number=NUMBERS)
    def give_back(self, number: int) -> None:
        everything = [m.delivery_id for m in self.world.mails]
        self.world.run(release_claims(self.db, self._session(number), everything))

    def _session(self, number: int) -> int:
        """One of two that live, opened where there is none."""
        while len(self.alive) < 2:
            self.alive.append(self.world.run(open_session(self.db, "test", ["default"])))
        return self.alive[number % 2]

    # Providers, and what becomes of their answers.

    @rule(target=results, call=consumes(calls), answer=st.sampled_from(sorted(ANSWERS)))
    def answer(self, call: Try, answer: str) -> Told:
        """The worker that called may have ended long ago: its mail leaves late, or not at all."""
        result, now = ANSWERS[answer], datetime.now(UTC)
        call.took = answer in TAKES
        policy = self.world.mail(call.delivery_id).policy
        step = next_step(call.started.delivery, result, now + OUT_OF_REACH, policy, Random(0))
        return Told(call, Recorded.of(call.started, "test", now, result, step))

    @rule(target=results, call=consumes(calls), answer=st.sampled_from(sorted(ANSWERS)))
    def answer_and_record(self, call: Try, answer: str) -> Told:
        told = self.answer(call, answer)
        self.record([told])
        return told

    @rule(target=results, call=consumes(calls), answer=st.sampled_from(sorted(ANSWERS)))
    def answer_too_late(self, call: Try, answer: str) -> Told:
        """Its worker was taken for lost meanwhile."""
        row = self.world.rows[call.delivery_id]
        if row.attempt_id == call.started.attempt_id and row.lease is not None:
            self.reap(self.holders.index(row.lease))
        return self.answer(call, answer)

    @rule(told=LISTS(results))
    def record(self, told: list[Told]) -> None:
        """A result stays where it came from, so that it may be recorded again."""
        self.world.run(record_outcomes(self.db, 0, [t.recorded for t in told]))
        for one in told:
            self._expect(one.attempt, one.recorded.result, one.recorded.step)

    def _expect(self, attempt: Try, result: Result, running: Step) -> None:
        """What the rows must say now that a result was recorded."""
        mail = self.world.mail(attempt.delivery_id)
        row = self.world.row(mail)
        is_news = attempt.known in (None, Outcome.UNKNOWN)
        is_last = mail.tries[-1] is attempt
        step: Step | None = None
        if row.attempt_id == attempt.started.attempt_id:
            step = running
            mail.spared += step.spares
        elif is_news and is_last:
            others = any(
                t.known in (Outcome.ACCEPTED, Outcome.UNKNOWN)
                for t in mail.tries
                if t is not attempt
            )
            step = late_step(row.delivery, result, others_may_have_left=others)
            if step is not None and step.state is State.FAILED and not step.possibly_sent:
                mail.has_lost_its_mark |= bool(mail.copies)
        if step is not None:
            self.expected[mail.delivery_id] = (step.state, step.possibly_sent)
            mail.is_sent = step.state is State.SENT
        if is_news:
            attempt.known = result.outcome
            attempt.was_unknown |= result.outcome is Outcome.UNKNOWN

    # Reapers.

    @property
    def holders(self) -> list[int]:
        """The sessions that hold something, by what they hold."""
        return list(dict.fromkeys(r.lease for r in self.world.rows.values() if r.lease is not None))

    def _end(self, number: int) -> int:
        session = self.holders[number % len(self.holders)]
        assert self.world.run(end_session(self.db, session))
        self.alive = [s for s in self.alive if s != session]
        with pytest.raises(SessionEnded):
            self.world.run(claim_due(self.db, session, "default", 1, 0))
        starting = [Starting(m.delivery_id, new_id(), new_id()) for m in self.world.mails]
        with pytest.raises(SessionEnded):
            self.world.run(start_deliveries(self.db, session, 0, starting))
        return session

    @precondition(lambda self: self.holders)
    @rule(target=results, number=NUMBERS)
    def find_lost(self, number: int) -> object:
        """A reaper has read what it is going to record, and is slow."""
        lost = self._lost(self._end(number))
        return multiple(*(Told(self._attempt(r.attempt_id), r) for r in lost))

    @precondition(lambda self: self.holders)
    @rule(number=NUMBERS)
    def reap(self, number: int) -> None:
        session = self._end(number)
        lost = self._lost(session)
        sessions = self.world.run(read_sessions(self.db))
        [ended] = [s for s in sessions if s.session_id == session]
        self.world.run(self.reaper._settle(ended))
        left = self.world.run(read_sessions(self.db))
        assert session not in {s.session_id for s in left}
        for one in lost:
            self._expect(self._attempt(one.attempt_id), one.result, one.step)

    def _lost(self, session: int) -> list[Recorded]:
        started = self.world.run(read_started(self.db, session))
        return self.world.run(self.reaper._lost(started)) if started else []

    def _attempt(self, attempt_id: uuid.UUID) -> Try:
        tries = (t for m in self.world.mails for t in m.tries)
        return next(t for t in tries if t.started.attempt_id == attempt_id)

    # Time, and what else may come between.

    @precondition(lambda self: self.any_in(*WAITING))
    @rule(target=moves, what=st.sampled_from(BETWEEN), number=NUMBERS)
    def come_between(self, what: str, number: int) -> object:
        """One rule for all of these, so that they do not crowd out the others."""
        if what.startswith("cancel"):
            return self.cancel(number, at_once=what == "cancel")
        if what == "wait":
            self.make_due()
        elif what == "expire":
            self.let_expire(number)
        elif what == "walk":
            self.walk_expired()
        else:
            self.suppress(number)
        return multiple()

    def make_due(self) -> None:
        self.world.run(self.store.make_due())
        self.world.run(promote_scheduled(self.db))

    def let_expire(self, number: int) -> None:
        """What is due is due before it expires, so it is in `due` by then."""
        mail = self._mail(number)
        row = self.world.row(mail)
        if row.delivery.state in WAITING and row.delivery.expire_at is not None and row.is_due:
            self.world.run(
                self.db.write(
                    "UPDATE deliveries SET expire_at = now() - interval '1 hour' WHERE id = $1",
                    mail.delivery_id,
                )
            )

    def walk_expired(self) -> None:
        self.clock.now += 3600.0
        self.world.run(self.expiry.walk())
        for identifier, row in self.world.rows.items():
            expiry = row.delivery.expire_at
            is_free = row.is_due and row.lease is None
            if is_free and expiry is not None and expiry < datetime.now(UTC):
                self.expected[identifier] = (State.EXPIRED, row.delivery.possibly_sent)

    # Callers.

    def suppress(self, number: int) -> None:
        address = self._address(number)
        if address in self.suppressed:
            sql = "DELETE FROM suppressions WHERE project_id = 1 AND address = $1"
        else:
            sql = "INSERT INTO suppressions (project_id, address, reason) VALUES (1, $1, 2)"
        self.world.run(self.db.write(sql, address))
        self.suppressed ^= {address}

    @precondition(lambda self: self.any_in(*RESENDABLE))
    @rule(target=moves, number=NUMBERS, accept_risk=st.booleans(), at_once=st.booleans())
    def resend(self, number: int, accept_risk: bool, at_once: bool) -> object:
        mail = self._mail(number)
        delivery = self.world.row(mail).delivery
        if resend_refusal(delivery, accept_duplicate_risk=accept_risk) is not None:
            return multiple()
        if delivery.recipient in self.suppressed:
            return multiple()
        assert accept_risk or not mail.copies or mail.has_lost_its_mark
        step, forced, expire_at = resend_step(delivery, datetime.now(UTC))
        move = Move(delivery, step, forced, expire_at)
        if at_once:
            self.carry_out(move)
        return move

    def cancel(self, number: int, *, at_once: bool) -> object:
        delivery = self.world.row(self._mail(number)).delivery
        if delivery.state not in WAITING:
            return multiple()
        move = Move(
            delivery, Step(State.CANCELLED, delivery.possibly_sent), expire_at=delivery.expire_at
        )
        if at_once:
            self.carry_out(move)
        return move

    @rule(move=moves)
    def carry_out(self, move: Move) -> None:
        """Decided on what was read: it happens from there, and once."""
        mail = self.world.mail(move.delivery.delivery_id)
        is_current = self.world.row(mail).delivery.version == move.delivery.version
        if move.step.state is State.QUEUED:
            assert self._resend(move) == is_current
        else:
            assert self.world.run(move_deliveries(self.db, 0, "test", [move])) == is_current
        if is_current:
            self.expected[mail.delivery_id] = (move.step.state, move.step.possibly_sent)
        if is_current and move.step.state is State.QUEUED:
            refusal = resend_refusal(move.delivery, accept_duplicate_risk=False)
            mail.has_lost_its_mark |= bool(mail.copies) and not move.step.possibly_sent
            mail.is_sent = False
            mail.resends += 1
            mail.risks += refusal is not None or mail.has_lost_its_mark

    def _resend(self, move: Move) -> bool:
        identifier = move.delivery.delivery_id
        try:
            return self.world.run(
                resend_deliveries(
                    self.db,
                    0,
                    "test",
                    project_id=1,
                    request_id=str(new_id()),
                    message_id=message_of(identifier),
                    fingerprint=b"",
                    rule=1,
                    response="{}",
                    moves=[move],
                )
            )
        except StaleVersion:
            return False

    def _mail(self, number: int) -> Mail:
        return self.world.mails[number % len(self.world.mails)]

    def _address(self, number: int) -> str:
        return self.world.row(self._mail(number)).delivery.recipient


def test_no_order_of_things_breaks_a_promise(database_url: str) -> None:
    with asyncio.Runner() as runner:
        db = Database(database_url, pool_size=1)
        reads = runner.run(
            Connector(database_url).connect(command_timeout=60.0, application_name="test")
        )
        try:
            world = World(runner.get_loop(), db, reads)
            run_state_machine_as_test(lambda: Deliveries(world), settings=steps(100, 60))
        finally:
            runner.run(reads.close())
            runner.run(db.close())
