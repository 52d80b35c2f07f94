"""What an outcome means for its delivery."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mailgrpc.core.delivery import (
    AGGREGATE_ORDER,
    MOVES,
    RESENT_EXPIRY,
    UNENDED,
    WITHOUT_PROOF,
    Cause,
    Delivery,
    Mode,
    Outcome,
    Result,
    Role,
    State,
    SuppressionReason,
    WaitReason,
    aggregate,
    late_step,
    next_step,
    resend_refusal,
    resend_step,
    result_text,
)
from mailgrpc.core.retry import DEFAULT_POLICY, RetryPolicy
from mailgrpc.errors import Reason

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
RNG = Random(7)
PROVEN_NOT_SENT = (Outcome.DEFERRED, Outcome.REJECTED)


def a_delivery(
    state: State = State.SENDING,
    mode: Mode = Mode.RETRYING,
    *,
    attempts: int = 1,
    expire_at: datetime | None = NOW + timedelta(days=5),
    forced: bool = False,
    possibly_sent: bool = False,
    suppression_reason: SuppressionReason = SuppressionReason.UNSPECIFIED,
) -> Delivery:
    return Delivery(
        uuid.UUID(int=1),
        "ann@example.com",
        Role.TO,
        state,
        NOW,
        version=3,
        mode=mode,
        attempt_count=attempts,
        expire_at=expire_at,
        forced=forced,
        possibly_sent=possibly_sent,
        suppression_reason=suppression_reason,
    )


_OUTCOMES = st.sampled_from(Outcome)
_RESULTS = st.builds(
    Result,
    outcome=_OUTCOMES,
    cause=st.sampled_from(Cause),
    retry_after=st.none() | st.timedeltas(),
)
_POLICIES = st.builds(
    RetryPolicy,
    max_attempts=st.integers(1, 100),
    initial_backoff=st.timedeltas(timedelta(seconds=1), timedelta(hours=24)),
    max_backoff=st.just(timedelta(hours=24)),
    multiplier=st.floats(1, 10),
)


_SENDING = st.just(State.SENDING)


def _deliveries(states: st.SearchStrategy[State] = _SENDING) -> st.SearchStrategy[Delivery]:
    return st.builds(
        a_delivery,
        states,
        st.sampled_from(Mode),
        attempts=st.integers(1, 120),
        expire_at=st.none()
        | st.timedeltas(timedelta(days=-1), timedelta(days=60)).map(lambda d: NOW + d),
        forced=st.booleans(),
        possibly_sent=st.booleans(),
    )


@given(_deliveries(), _RESULTS, _POLICIES)
@example(a_delivery(), Result(Outcome.DEFERRED, retry_after=timedelta.max), DEFAULT_POLICY)
def test_an_attempt_leads_only_where_the_table_says(
    delivery: Delivery, result: Result, policy: RetryPolicy
) -> None:
    step = next_step(delivery, result, NOW, policy, RNG)
    assert step.state in MOVES[State.SENDING]
    assert (step.due_at is not None) == (step.state is State.DEFERRED)
    assert (step.wait_reason is not WaitReason.UNSPECIFIED) == (step.state is State.DEFERRED)


@given(_deliveries(), _RESULTS, _POLICIES)
def test_a_wait_never_reaches_past_the_expiry(
    delivery: Delivery, result: Result, policy: RetryPolicy
) -> None:
    step = next_step(delivery, result, NOW, policy, RNG)
    if step.due_at is not None and delivery.expire_at is not None:
        assert step.due_at <= delivery.expire_at


@given(_deliveries(), _RESULTS, _POLICIES)
def test_possibly_sent_is_never_forgotten(
    delivery: Delivery, result: Result, policy: RetryPolicy
) -> None:
    step = next_step(delivery, result, NOW, policy, RNG)
    assert step.possibly_sent == (delivery.possibly_sent or result.outcome is Outcome.UNKNOWN)


@given(_deliveries(), _RESULTS, _POLICIES)
def test_failed_is_said_only_with_proof(
    delivery: Delivery, result: Result, policy: RetryPolicy
) -> None:
    step = next_step(delivery, result, NOW, policy, RNG)
    if step.state is State.FAILED and result.outcome is not Outcome.REJECTED:
        assert result.outcome is Outcome.DEFERRED
        assert not step.possibly_sent


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("forced", [False, True])
def test_accepted_is_sent_and_rejected_has_failed_whatever_the_mode(
    mode: Mode, forced: bool
) -> None:
    delivery = a_delivery(mode=mode, forced=forced)
    for outcome, state in ((Outcome.ACCEPTED, State.SENT), (Outcome.REJECTED, State.FAILED)):
        assert next_step(delivery, Result(outcome), NOW, DEFAULT_POLICY, RNG).state is state


@given(_deliveries(), _POLICIES)
def test_send_once_is_unknown_when_the_outcome_is(delivery: Delivery, policy: RetryPolicy) -> None:
    """At most once: never tried again by itself, so never sent twice."""
    step = next_step(delivery, Result(Outcome.UNKNOWN), NOW, policy, RNG)
    if delivery.mode is Mode.SEND_ONCE or delivery.forced:
        assert step.state is State.OUTCOME_UNKNOWN
    assert step.possibly_sent


def test_send_once_tries_again_what_was_provably_not_sent() -> None:
    delivery = a_delivery(mode=Mode.SEND_ONCE)
    step = next_step(delivery, Result(Outcome.DEFERRED), NOW, DEFAULT_POLICY, RNG)
    assert (step.state, step.wait_reason) == (State.DEFERRED, WaitReason.BACKOFF)


def test_retrying_tries_again_an_unknown_outcome_and_marks_it() -> None:
    step = next_step(a_delivery(), Result(Outcome.UNKNOWN), NOW, DEFAULT_POLICY, RNG)
    assert step.state is State.DEFERRED
    assert step.possibly_sent


@given(
    st.sampled_from([Outcome.DEFERRED, Outcome.UNKNOWN]),
    st.sampled_from(Mode),
    st.booleans(),
    st.booleans(),
)
def test_attempts_used_up_have_failed_only_if_none_may_have_been_sent(
    outcome: Outcome, mode: Mode, possibly_sent: bool, forced: bool
) -> None:
    delivery = a_delivery(
        mode=mode,
        attempts=1 if forced else DEFAULT_POLICY.max_attempts,
        possibly_sent=possibly_sent,
        forced=forced,
    )
    step = next_step(delivery, Result(outcome), NOW, DEFAULT_POLICY, RNG)
    may_have = possibly_sent or outcome is Outcome.UNKNOWN
    assert step.state is (State.OUTCOME_UNKNOWN if may_have else State.FAILED)


def test_one_attempt_less_than_all_is_not_used_up() -> None:
    delivery = a_delivery(attempts=DEFAULT_POLICY.max_attempts - 1)
    step = next_step(delivery, Result(Outcome.DEFERRED), NOW, DEFAULT_POLICY, RNG)
    assert step.state is State.DEFERRED


def test_a_longer_wait_that_the_provider_asks_for_is_honoured() -> None:
    asked = Result(Outcome.DEFERRED, retry_after=timedelta(hours=1))
    step = next_step(a_delivery(), asked, NOW, DEFAULT_POLICY, RNG)
    assert (step.due_at, step.wait_reason) == (NOW + timedelta(hours=1), WaitReason.RATE_LIMITED)


@pytest.mark.parametrize("seconds", [-5, 0, 1])
def test_a_shorter_wait_that_the_provider_asks_for_is_not(seconds: int) -> None:
    asked = Result(Outcome.DEFERRED, retry_after=timedelta(seconds=seconds))
    step = next_step(a_delivery(), asked, NOW, DEFAULT_POLICY, RNG)
    assert step.wait_reason is WaitReason.BACKOFF
    assert step.due_at is not None
    assert step.due_at >= NOW + timedelta(seconds=8)


@given(_deliveries(st.sampled_from(State)), _RESULTS, st.booleans())
def test_a_late_result_moves_a_delivery_only_by_proof_and_only_where_there_was_none(
    delivery: Delivery, result: Result, others_may_have_left: bool
) -> None:
    step = late_step(delivery, result, others_may_have_left=others_may_have_left)
    proof = {Outcome.ACCEPTED: State.SENT, Outcome.REJECTED: State.FAILED}
    if delivery.state is State.OUTCOME_UNKNOWN and not others_may_have_left:
        proof[Outcome.DEFERRED] = State.FAILED
    if delivery.state in WITHOUT_PROOF and result.outcome in proof:
        assert step is not None
        assert step.state is proof[result.outcome]
        assert step.state in MOVES[delivery.state]
        assert step.due_at is None
        accepted = result.outcome is Outcome.ACCEPTED
        assert step.possibly_sent == (delivery.possibly_sent if accepted else others_may_have_left)
    else:
        assert step is None


def test_the_table_knows_every_state_and_nothing_follows_a_complaint() -> None:
    assert set(MOVES) == set(State)
    assert {state for state in State if not MOVES[state]} == {State.COMPLAINED}
    assert all(state not in MOVES[state] for state in State)


def test_only_what_is_being_sent_becomes_deferred_or_unknown() -> None:
    for state in (State.DEFERRED, State.OUTCOME_UNKNOWN):
        assert [s for s in State if state in MOVES[s]] == [State.SENDING]


def test_only_what_waits_is_started() -> None:
    assert {s for s in State if State.SENDING in MOVES[s]} == {State.QUEUED, State.DEFERRED}


def test_what_ended_moves_again_only_by_resend_feedback_or_proof() -> None:
    by_others = {State.QUEUED, State.SENT, State.DELIVERED, State.BOUNCED, State.COMPLAINED}
    for state in set(State) - UNENDED:
        assert MOVES[state] <= by_others | {State.FAILED}


@given(st.sets(st.sampled_from(State), min_size=1))
def test_a_message_has_the_first_state_in_the_order(states: set[State]) -> None:
    found = aggregate(states)
    assert found in states
    assert all(AGGREGATE_ORDER.index(found) <= AGGREGATE_ORDER.index(s) for s in states)
    if states & UNENDED:  # a message that still moves must not read as ended
        assert found in UNENDED


def test_the_order_of_the_aggregate_holds_every_state_once() -> None:
    assert sorted(AGGREGATE_ORDER) == sorted(State)


@given(_deliveries(st.sampled_from(State)))
def test_resend_leads_to_queued_wherever_it_is_allowed(delivery: Delivery) -> None:
    if resend_refusal(delivery, accept_duplicate_risk=True) is not None:
        assert delivery.state in {State.SENDING, State.QUEUED, State.COMPLAINED}
        return
    step, forced, expire_at = resend_step(delivery, NOW)
    assert step.state in MOVES[delivery.state]
    assert (step.state, step.due_at) == (State.QUEUED, NOW)
    # What it risked a second mail for is not forgotten when the next attempt fails.
    asked_for_the_risk = resend_refusal(delivery, accept_duplicate_risk=False)
    assert (
        step.possibly_sent
        or asked_for_the_risk is not Reason.DUPLICATE_RISK
        or (delivery.suppression_reason is SuppressionReason.DUPLICATE)
    )
    assert step.possibly_sent or not delivery.possibly_sent
    goes_on = delivery.state is State.DEFERRED
    assert forced == (delivery.forced if goes_on else True)
    assert expire_at == (delivery.expire_at if goes_on else NOW + RESENT_EXPIRY)


@pytest.mark.parametrize("state", [State.SENT, State.DELIVERED])
def test_what_was_sent_stays_marked_when_it_is_resent(state: State) -> None:
    """Else a refusal of the second attempt ends it FAILED as if nothing had ever been sent."""
    assert resend_step(a_delivery(state), NOW)[0].possibly_sent


@given(_deliveries(st.sampled_from(State)))
def test_nothing_that_may_have_been_sent_is_resent_without_the_risk_accepted(
    delivery: Delivery,
) -> None:
    may_have = delivery.possibly_sent or delivery.state in {
        State.SENT,
        State.DELIVERED,
        State.OUTCOME_UNKNOWN,
    }
    if may_have:
        assert resend_refusal(delivery, accept_duplicate_risk=False) is not None


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (State.SENDING, Reason.MESSAGE_SENDING),
        (State.COMPLAINED, Reason.NOT_RESENDABLE),
        (State.OUTCOME_UNKNOWN, Reason.DUPLICATE_RISK),
        (State.FAILED, None),
        (State.EXPIRED, None),
    ],
)
def test_why_resend_is_refused(state: State, reason: Reason | None) -> None:
    assert resend_refusal(a_delivery(state), accept_duplicate_risk=False) is reason


def test_a_duplicate_is_resent_only_with_the_risk_accepted() -> None:
    delivery = a_delivery(State.SUPPRESSED, suppression_reason=SuppressionReason.DUPLICATE)
    assert resend_refusal(delivery, accept_duplicate_risk=False) is Reason.DUPLICATE_RISK
    assert resend_refusal(delivery, accept_duplicate_risk=True) is None


@given(st.text(max_size=2000))
@example("ü" * 2000)
def test_a_providers_words_are_one_printable_line_of_at_most_1024_bytes(text: str) -> None:
    cleaned = result_text(text)
    assert len(cleaned.encode()) <= 1024
    assert cleaned.isprintable()
    assert result_text(cleaned) == cleaned.rstrip()
