"""Deliveries under any order of things: a state machine over the real database.

Workers claim, start, hear from providers, die and are reaped; results come at once, late, twice or
in another order; callers resend and cancel; addresses are suppressed; time passes. After each step
the rows keep what tests/worker/world.py demands of them.
"""

from __future__ import annotations

import asyncio
import time
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
    next_step,
    resend_refusal,
    resend_step,
)
from mailgrpc.core.ids import delivery_id, message_of, new_id
from mailgrpc.core.message import RetryWishes
from mailgrpc.db.connecting import Connector
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
from mailgrpc.db.engine import Database, SessionEnded, StaleVersion
from mailgrpc.db.workers import end_session, open_session, read_sessions, read_started
from mailgrpc.worker.expiry import Expiry
from mailgrpc.worker.sweep import Reaper
from tests.machines import steps
from tests.worker.rig import Clock, Store
from tests.worker.world import WAITING, Mail, Told, Try, World

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
WISHES = st.tuples(MODES, RETRIES)
SAID = st.sampled_from([*ANSWERS, "accepted", "rejected", "deferred", "deferred"])
OUT_OF_REACH = timedelta(minutes=2)
"""By this, waits are longer than an example takes: nothing is due before a step says so."""
LISTS = partial(st.lists, min_size=1, max_size=2, unique_by=lambda told: told.attempt.delivery_id)
NUMBERS = st.integers(0, 2)
WORK = ("all", "claim", "claim one", "start", "start twice", "give back")
WHEN = ("at once", "when it was taken for lost", "later")
BETWEEN = ("wait", "wait", "wait", "expire", "walk", "suppress", "cancel", "cancel later")


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
        world.begin()

    @invariant()
    def every_promise_is_kept(self) -> None:
        self.world.look()

    # Workers.

    @initialize(wishes=st.lists(WISHES, min_size=1, max_size=2))
    def enqueue(self, wishes: list[tuple[Mode, RetryWishes]]) -> None:
        for mode, retry in wishes:
            number = len(self.world.mails)
            put = self.store.put(f"{number}@example.com", mode=mode, retry=retry)
            identifier = delivery_id(self.world.run(put), 1)
            time.sleep(0.002)  # ids are in order from one millisecond to the next
            self.world.mails.append(Mail(identifier, mode, retry.policy()))
        self.every_promise_is_kept()

    @rule(target=calls, what=st.sampled_from(WORK), number=NUMBERS)
    def work(self, what: str, number: int) -> object:
        """What one of two workers does, in its parts; a start is run twice if its answer is lost."""
        if what == "all":
            return multiple(*self._start_all(number))
        session = self._session(number)
        if what == "give back":
            everything = [m.delivery_id for m in self.world.mails]
            self.world.run(release_claims(self.db, session, everything))
        elif what.startswith("claim"):
            self._claim(session, 1 if what == "claim one" else 3)
        else:
            return multiple(*self._start(session, 2 if what == "start twice" else 1))
        return multiple()

    def _start_all(self, number: int) -> list[Try]:
        self.make_due()
        self._claim(self._session(number), 3)
        self.every_promise_is_kept()
        return self._start(self._session(number), 1)

    def _session(self, number: int) -> int:
        while len(self.alive) < 2:
            self.alive.append(self.world.run(open_session(self.db, "test", ["default"])))
        return self.alive[number % 2]

    def _claim(self, session: int, limit: int) -> None:
        claims = self.world.run(claim_due(self.db, session, "default", limit, 0))
        for claimed in claims.claimed:
            row = self.world.rows[claimed.delivery_id]
            assert row.lease is None
            assert row.delivery.state in WAITING

    def _start(self, session: int, times: int) -> list[Try]:
        """All that this session holds; that it asks for the rest as well changes nothing."""
        verdicts = self.world.verdicts(session, self.suppressed)
        starting = self._starting()
        for _ in range(times):
            started = self.world.run(start_deliveries(self.db, session, 0, starting))
        assert {s.delivery.delivery_id for s in started} == {
            i for i, state in verdicts.items() if state is State.SENDING
        }
        for identifier, state in verdicts.items():
            self.world.expect(identifier, state)
        return [self.world.begun(s) for s in started]

    def _starting(self) -> list[Starting]:
        return [Starting(m.delivery_id, new_id(), new_id()) for m in self.world.mails]

    @rule(
        target=results,
        number=NUMBERS,
        wish=WISHES,
        answers=st.tuples(SAID, SAID),
        when=st.sampled_from(WHEN),
    )
    def send(
        self, number: int, wish: tuple[Mode, RetryWishes], answers: tuple[str, str], when: str
    ) -> object:
        """The common way in one step: much has to happen before anything is late."""
        if not any(row.delivery.state in WAITING for row in self.world.rows.values()):
            self.enqueue([wish])
        calls = self._start_all(number)
        self.every_promise_is_kept()
        return multiple(*(self.answer(c, a, when) for c, a in zip(calls, answers, strict=False)))

    # Providers, and what becomes of their answers.

    @rule(
        target=results,
        call=consumes(calls),
        answer=SAID,
        when=st.sampled_from(WHEN),
    )
    def answer(self, call: Try, answer: str, when: str) -> Told:
        """The worker that called may have ended long ago: its mail leaves late, or not at all."""
        if when == "when it was taken for lost" and self.world.is_running(call):
            self._reap(self.world.rows[call.delivery_id].lease or 0)
        result, now = ANSWERS[answer], datetime.now(UTC)
        call.took = answer in TAKES
        policy = self.world.mail(call.delivery_id).policy
        step = next_step(call.started.delivery, result, now + OUT_OF_REACH, policy, Random(0))
        told = Told(call, Recorded.of(call.started, "test", now, result, step))
        if when == "at once":
            self.record([told])
            self.every_promise_is_kept()
        return told

    @rule(told=LISTS(results))
    def record(self, told: list[Told]) -> None:
        """A result stays where it came from, so that it may be recorded again."""
        self.world.run(record_outcomes(self.db, 0, [t.recorded for t in told]))
        for one in told:
            self.world.told(one.attempt, one.recorded.result, one.recorded.step)

    # Reapers.

    @precondition(lambda self: self.world.holders)
    @rule(target=results, number=NUMBERS, is_slow=st.booleans())
    def reap(self, number: int, is_slow: bool) -> object:
        """One that is slow has read what it is going to record, and keeps it."""
        session = self.world.holders[number % len(self.world.holders)]
        if not is_slow:
            self._reap(session)
            return multiple()
        return multiple(*self._end(session))

    def _end(self, session: int) -> list[Told]:
        """End a session; what a reaper will record of it."""
        assert self.world.run(end_session(self.db, session))
        self.alive = [s for s in self.alive if s != session]
        with pytest.raises(SessionEnded):
            self.world.run(claim_due(self.db, session, "default", 1, 0))
        with pytest.raises(SessionEnded):
            self.world.run(start_deliveries(self.db, session, 0, self._starting()))
        started = self.world.run(read_started(self.db, session))
        lost = self.world.run(self.reaper._lost(started)) if started else []
        return [Told(self.world.attempt(r.attempt_id), r) for r in lost]

    def _reap(self, session: int) -> None:
        lost = self._end(session)
        sessions = self.world.run(read_sessions(self.db))
        self.world.run(self.reaper._settle(next(s for s in sessions if s.session_id == session)))
        left = self.world.run(read_sessions(self.db))
        assert session not in {s.session_id for s in left}
        for one in lost:
            self.world.told(one.attempt, one.recorded.result, one.recorded.step)
        self.every_promise_is_kept()

    # Time, and what else may come between.

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
                self.world.expect(identifier, State.EXPIRED)

    # Callers.

    def suppress(self, number: int) -> None:
        address = self._address(number)
        if address in self.suppressed:
            sql = "DELETE FROM suppressions WHERE project_id = 1 AND address = $1"
        else:
            sql = "INSERT INTO suppressions (project_id, address, reason) VALUES (1, $1, 2)"
        self.world.run(self.db.write(sql, address))
        self.suppressed ^= {address}

    @rule(target=moves, number=NUMBERS, accept_risk=st.booleans(), at_once=st.booleans())
    def resend(self, number: int, accept_risk: bool, at_once: bool) -> object:
        resendable = [
            mail
            for mail, delivery in ((m, self.world.row(m).delivery) for m in self.world.mails)
            if resend_refusal(delivery, accept_duplicate_risk=accept_risk) is None
            and delivery.recipient not in self.suppressed
        ]
        if not resendable:
            return multiple()
        mail = resendable[-1 - number % len(resendable)]
        delivery = self.world.row(mail).delivery
        assert accept_risk or not mail.copies
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
            self.world.expect(mail.delivery_id, move.step.state, move.step.possibly_sent)
        if is_current and move.step.state is State.QUEUED:
            refusal = resend_refusal(move.delivery, accept_duplicate_risk=False)
            mail.is_sent = False
            mail.resends += 1
            mail.risks += refusal is not None

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
        return self.world.mails[-1 - number % len(self.world.mails)]

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
            run_state_machine_as_test(lambda: Deliveries(world), settings=steps(50, 50))
        finally:
            runner.run(reads.close())
            runner.run(db.close())
