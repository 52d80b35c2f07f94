"""The checker, with runs that never were: each broken promise is found, and what is allowed is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mailgrpc.core.delivery import Cause, Outcome, State
from tests.faults.checker import Box, Fault, Tried, Verdict, check
from tests.faults.clients import Acknowledged, History, Seen
from tests.faults.ledger import Entry

TO = "r0.a@example.org"
ACCEPTED = Tried(1, 10.0, 11.0, Outcome.ACCEPTED, Cause.UNSPECIFIED)
UNKNOWN = Tried(1, 10.0, 11.0, Outcome.UNKNOWN, Cause.CONNECTION)
LOST = Tried(1, 10.0, 11.0, Outcome.UNKNOWN, Cause.WORKER_LOST)
REJECTED = Tried(1, 10.0, 11.0, Outcome.REJECTED, Cause.BAD_ADDRESS)
SENT = Box("dlv_1", "msg_1", "a", TO, False, State.SENT, 3, False, (ACCEPTED,))
ONCE = replace(SENT, once=True)
TAKEN = Entry(11.0, "a", TO, "taken")
SWALLOWED = Entry(11.0, "a", TO, "swallowed")
KILLED = Fault("worker killed", 10.5, 10.5, 1)


def seen(*states: State, outcomes: dict[int, Outcome] | None = None) -> list[Seen]:
    """A delivery's way through these states, as one subscriber is told of it."""
    outcomes = outcomes or {}
    return [
        Seen(f"evt_{n}", "dlv_1", n, states[n - 2] if n > 1 else 0, state, outcomes.get(n, 0))
        for n, state in enumerate(states, 1)
    ]


WAY = seen(State.QUEUED, State.SENDING, State.SENT)
AGAIN = (UNKNOWN, replace(ACCEPTED, number=2, started_at=12.0, ended_at=13.0))
WAY_AGAIN = seen(
    *(State.QUEUED, State.SENDING, State.DEFERRED, State.SENDING, State.SENT),
    outcomes={3: Outcome.UNKNOWN, 5: Outcome.ACCEPTED},
)
TWICE = replace(SENT, version=5, possibly_sent=True, attempts=AGAIN)
DOUBTFUL = replace(ONCE, state=State.OUTCOME_UNKNOWN, possibly_sent=True, attempts=(UNKNOWN,))
WAY_OF_DOUBT = seen(
    State.QUEUED, State.SENDING, State.OUTCOME_UNKNOWN, outcomes={3: Outcome.UNKNOWN}
)


def judged(
    box: Box | None,
    *entries: Entry,
    way: list[Seen] = WAY,
    faults: list[Fault] | None = None,
    ids: tuple[str, ...] = ("msg_1",),
) -> Verdict:
    """A run of one message that was acknowledged, with two subscribers."""
    history = History({"a": Acknowledged(9.0, False, (TO,), set(ids))}, [way, list(way)])
    return check(history, [box] if box else [], entries, faults or [])


def the_finding(verdict: Verdict) -> str:
    assert verdict.findings
    return verdict.findings[0]


def test_a_mail_that_was_sent_once_is_no_finding() -> None:
    verdict = judged(SENT, TAKEN)
    assert verdict.findings == []
    assert verdict.sent == 1


def test_what_was_acknowledged_and_is_not_stored_is_lost() -> None:
    verdict = judged(None, way=[])
    assert "of it is stored: []" in the_finding(verdict)
    assert verdict.rows["before any"].lost == 1


def test_one_request_id_has_one_message() -> None:
    assert "acknowledged as" in the_finding(judged(SENT, TAKEN, ids=("msg_1", "msg_2")))


def test_sent_and_in_no_box_is_lost() -> None:
    assert any("nobody got it" in f for f in judged(SENT).findings)


@pytest.mark.parametrize("state", [State.QUEUED, State.SENDING, State.DEFERRED])
def test_what_has_not_ended_is_a_finding(state: State) -> None:
    assert "not ended" in the_finding(judged(replace(SENT, state=state, attempts=())))


def test_send_once_is_never_in_a_box_twice() -> None:
    verdict = judged(ONCE, TAKEN, TAKEN)
    assert any("SEND_ONCE, and 2 copies" in f for f in verdict.findings)
    assert verdict.rows["before any"].twice_once == 1


def test_a_second_copy_after_a_doubt_is_justified() -> None:
    verdict = judged(TWICE, SWALLOWED, TAKEN, way=WAY_AGAIN)
    assert verdict.findings == []
    assert (verdict.rows["before any"].again, verdict.rows["before any"].again_justified) == (1, 1)


def test_a_second_copy_without_a_doubt_is_not() -> None:
    box = replace(TWICE, attempts=(replace(UNKNOWN, outcome=Outcome.DEFERRED), AGAIN[1]))
    verdict = judged(box, TAKEN, TAKEN, way=[replace(e, outcome=0) for e in WAY_AGAIN])
    assert any("copies after 0 doubts" in f for f in verdict.findings)
    assert any("said to have sent nothing" in f for f in verdict.findings)


def test_a_second_copy_is_marked() -> None:
    verdict = judged(replace(TWICE, possibly_sent=False), SWALLOWED, TAKEN, way=WAY_AGAIN)
    assert "not marked possibly_sent" in the_finding(verdict)


def test_a_doubt_that_the_provider_made_is_explained() -> None:
    verdict = judged(DOUBTFUL, SWALLOWED, way=WAY_OF_DOUBT)
    assert verdict.findings == []
    assert verdict.rows["the provider's own doing"].unknown_justified == 1


def test_a_doubt_after_a_kill_is_explained() -> None:
    box = replace(DOUBTFUL, attempts=(LOST,))
    verdict = judged(box, TAKEN, way=WAY_OF_DOUBT, faults=[KILLED])
    assert verdict.findings == []
    assert verdict.rows["worker killed"].unknown_justified == 1


@pytest.mark.parametrize(
    ("tried", "fault"),
    [
        (LOST, None),
        (LOST, Fault("worker killed", 90.0, 90.0, 1)),
        (LOST, Fault("Valkey killed", 10.5, 10.5, 1)),
        (LOST, Fault("SMTP line reset", 10.0, 11.0)),
        (UNKNOWN, Fault("HTTP line reset", 10.0, 11.0)),
        (replace(UNKNOWN, cause=Cause.INTERNAL), KILLED),
    ],
)
def test_a_doubt_that_nothing_explains_is_a_finding(tried: Tried, fault: Fault | None) -> None:
    box = replace(DOUBTFUL, attempts=(tried,))
    verdict = judged(box, way=WAY_OF_DOUBT, faults=[fault] if fault else [])
    assert "nothing befell it" in the_finding(verdict)


def test_a_doubt_in_retrying_is_no_end() -> None:
    verdict = judged(replace(DOUBTFUL, once=False), SWALLOWED, way=WAY_OF_DOUBT)
    assert "nothing should have ended it so" in the_finding(verdict)


def test_failed_is_for_what_was_refused_for_good() -> None:
    box = replace(SENT, state=State.FAILED, attempts=(REJECTED,))
    way = seen(State.QUEUED, State.SENDING, State.FAILED)
    assert judged(box, Entry(11.0, "", TO, "rejected"), way=way).findings == []
    assert "nobody refused it" in the_finding(judged(box, way=way))


def test_failed_and_in_the_box_is_a_lie() -> None:
    box = replace(SENT, state=State.FAILED, attempts=(REJECTED,))
    assert any("the mail is in the box" in f for f in judged(box, TAKEN).findings)


def test_given_up_is_what_six_workers_ended_with() -> None:
    box = replace(SENT, state=State.FAILED, attempts=(replace(REJECTED, cause=Cause.WORKER_LOST),))
    way = seen(State.QUEUED, State.SENDING, State.FAILED)
    verdict = judged(box, way=way, faults=[KILLED] * 6)
    assert verdict.given_up == 1
    assert "given up" in the_finding(verdict)
    assert "nobody refused it" in the_finding(judged(box, way=way, faults=[KILLED] * 5))


def test_an_attempt_that_says_accepted_was_taken() -> None:
    assert any("said to be accepted" in f for f in judged(SENT, SWALLOWED).findings)


def test_an_attempt_without_a_result_is_a_finding() -> None:
    box = replace(SENT, attempts=(replace(ACCEPTED, number=2),))
    assert "an attempt has no result" in the_finding(judged(box, TAKEN))


def test_a_subscriber_that_missed_a_version_is_a_gap() -> None:
    verdict = judged(SENT, TAKEN, way=[WAY[0], WAY[2]])
    assert (verdict.gaps, verdict.repeats) == (2, 0)


def test_a_subscriber_that_missed_the_end_is_a_gap() -> None:
    assert judged(SENT, TAKEN, way=WAY[:2]).gaps == 2


def test_a_subscriber_that_is_told_again_is_a_repeat() -> None:
    verdict = judged(SENT, TAKEN, way=[*WAY, WAY[1]])
    assert (verdict.gaps, verdict.repeats) == (0, 2)


def test_subscribers_are_told_the_same() -> None:
    other = [*WAY[:2], replace(WAY[2], state=State.FAILED)]
    history = History({"a": Acknowledged(9.0, False, (TO,), {"msg_1"})}, [WAY, other])
    verdict = check(history, [SENT], [TAKEN], [])
    assert "one is told" in the_finding(verdict)


@pytest.mark.parametrize(
    "states",
    [
        (State.QUEUED, State.SENT, State.SENT),
        (State.QUEUED, State.SENDING, State.SENT, State.SENDING, State.SENT),
        (State.SENDING, State.DEFERRED, State.SENT),
    ],
)
def test_what_is_no_move_is_a_finding(states: tuple[State, ...]) -> None:
    verdict = judged(replace(SENT, version=len(states)), TAKEN, way=seen(*states))
    assert any("not a move" in f for f in verdict.findings)


def test_nobody_asked_for_a_resend() -> None:
    states = (State.QUEUED, State.SENDING, State.SENT, State.QUEUED, State.SENDING, State.SENT)
    verdict = judged(replace(SENT, version=6), TAKEN, way=seen(*states))
    assert "nobody asked for a Resend" in the_finding(verdict)


def test_a_subscriber_is_told_of_nothing_that_is_not_stored() -> None:
    history = History({}, [WAY, list(WAY)])
    assert "is not stored" in the_finding(check(history, [], [], []))
