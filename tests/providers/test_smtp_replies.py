"""The table from SMTP replies to outcomes and causes."""

from __future__ import annotations

import pytest

from mailgrpc.core.delivery import Cause, Outcome
from mailgrpc.providers.smtp_replies import Reply, Stage, queue_id, result_of

D, R, U = Outcome.DEFERRED, Outcome.REJECTED, Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("stage", "code", "text", "outcome", "cause"),
    [
        (Stage.RCPT, 550, "5.1.1 no such user", R, Cause.BAD_ADDRESS),
        (Stage.RCPT, 550, "5.1.10 null MX", R, Cause.BAD_ADDRESS),
        (Stage.RCPT, 550, "no such user", R, Cause.BAD_ADDRESS),
        (Stage.RCPT, 550, "5.2.1 disabled", R, Cause.BAD_ADDRESS),
        (Stage.RCPT, 552, "5.2.2 full", R, Cause.MAILBOX_FULL),
        (Stage.RCPT, 452, "4.2.2 full", D, Cause.MAILBOX_FULL),
        (Stage.RCPT, 552, "over quota", D, Cause.MAILBOX_FULL),
        (Stage.RCPT, 452, "4.5.3 too many recipients", D, Cause.RATE_LIMITED),
        (Stage.RCPT, 552, "5.5.3 too many recipients", D, Cause.RATE_LIMITED),
        (Stage.RCPT, 450, "4.2.0 greylisted", D, Cause.RATE_LIMITED),
        (Stage.RCPT, 451, "4.7.1 try again later", D, Cause.RATE_LIMITED),
        (Stage.RCPT, 450, "try again later", D, Cause.RATE_LIMITED),
        (Stage.RCPT, 451, "4.3.0 local error", D, Cause.PROVIDER),
        (Stage.RCPT, 451, "4.4.3 DNS failure", D, Cause.DNS),
        (Stage.RCPT, 554, "5.7.1 relay access denied", R, Cause.POLICY),
        (Stage.RCPT, 550, "5.1.8 bad sender domain", R, Cause.SENDER),
        (Stage.RCPT, 503, "5.5.1 bad sequence", R, Cause.PROVIDER),
        (Stage.MAIL, 550, "5.7.1 not your address", R, Cause.SENDER),
        (Stage.MAIL, 553, "5.1.7 bad syntax", R, Cause.SENDER),
        (Stage.MAIL, 552, "5.3.4 too big", R, Cause.TOO_LARGE),
        (Stage.MAIL, 552, "too big", R, Cause.TOO_LARGE),
        (Stage.MAIL, 452, "4.3.1 no room", D, Cause.PROVIDER),
        (Stage.MAIL, 530, "5.7.0 authentication required", D, Cause.CREDENTIALS),
        (Stage.MAIL, 530, "5.7.0 Must issue a STARTTLS command first", D, Cause.TLS),
        (Stage.MAIL, 421, "4.3.2 shutting down", D, Cause.PROVIDER),
        (Stage.MAIL, 421, "too many connections", D, Cause.RATE_LIMITED),
        (Stage.DATA, 554, "no valid recipients", R, Cause.POLICY),
        (Stage.CONTENT, 554, "5.7.1 spam", R, Cause.POLICY),
        (Stage.CONTENT, 550, "5.7.26 no DMARC", R, Cause.SENDER),
        (Stage.CONTENT, 554, "5.6.0 bad MIME", R, Cause.CONTENT),
        (Stage.CONTENT, 552, "5.3.4 too big", R, Cause.TOO_LARGE),
        (Stage.CONTENT, 554, "transaction failed", R, Cause.CONTENT),
        (Stage.CONTENT, 451, "4.3.0 queue is full", D, Cause.PROVIDER),
        (Stage.CONTENT, 354, "go on", U, Cause.PROVIDER),
        (Stage.DATA, 250, "ok?", D, Cause.PROVIDER),
        (Stage.LOG_IN, 535, "5.7.8 wrong password", D, Cause.CREDENTIALS),
        (Stage.LOG_IN, 454, "4.7.0 temporary failure", D, Cause.PROVIDER),
        (Stage.HANDSHAKE, 554, "go away", D, Cause.PROVIDER),
        (Stage.HANDSHAKE, 421, "busy", D, Cause.RATE_LIMITED),
    ],
)
def test_a_refusal_has_its_outcome_and_cause(
    stage: Stage, code: int, text: str, outcome: Outcome, cause: Cause
) -> None:
    result = result_of(Reply(code, text), stage)
    assert (result.outcome, result.cause) == (outcome, cause)
    assert result.status_code == code


def test_every_code_has_a_result_and_only_the_final_dot_can_be_accepted() -> None:
    for stage in Stage:
        for code in range(200, 600):
            result = result_of(Reply(code, ""), stage)
            accepted = stage is Stage.CONTENT and code < 300
            assert (result.outcome is Outcome.ACCEPTED) == accepted
            assert (result.cause is Cause.UNSPECIFIED) == accepted
            assert (result.outcome is Outcome.UNKNOWN) == (
                stage is Stage.CONTENT and 300 <= code < 400
            )
            assert not result.of_channel or result.outcome is Outcome.DEFERRED


@pytest.mark.parametrize(
    ("stage", "code", "text", "is_channel"),
    [
        (Stage.HANDSHAKE, 554, "5.7.1 go away", True),
        (Stage.LOG_IN, 535, "5.7.8 wrong password", True),
        (Stage.LOG_IN, 454, "4.7.0 temporary failure", True),
        (Stage.MAIL, 530, "5.7.0 authentication required", True),
        (Stage.MAIL, 530, "Must issue a STARTTLS command first", True),
        (Stage.MAIL, 534, "5.7.9 mechanism too weak", True),
        (Stage.MAIL, 535, "5.7.8 wrong password", True),
        (Stage.MAIL, 538, "5.7.11 encryption required", True),
        (Stage.MAIL, 421, "4.3.2 shutting down", True),
        (Stage.RCPT, 421, "4.3.2 shutting down", True),
        (Stage.DATA, 421, "4.3.2 shutting down", True),
        (Stage.CONTENT, 421, "4.3.2 shutting down", False),
        (Stage.RCPT, 530, "5.7.0 authentication required", False),
        (Stage.MAIL, 451, "4.3.0 local error", False),
        (Stage.MAIL, 452, "4.3.1 no room", False),
        (Stage.RCPT, 450, "4.2.0 greylisted", False),
        (Stage.RCPT, 421, "4.2.1 this mailbox gets too much", False),
        (Stage.DATA, 451, "4.3.0 local error", False),
    ],
)
def test_what_is_of_the_channel_as_a_whole(
    stage: Stage, code: int, text: str, is_channel: bool
) -> None:
    assert result_of(Reply(code, text), stage).of_channel == is_channel


def test_an_enhanced_code_of_another_class_is_not_believed() -> None:
    assert Reply(550, "4.7.1 odd").enhanced_code == ""
    assert Reply(550, "5.7.1").enhanced_code == "5.7.1"
    assert Reply(550, "5.7.10000 odd").enhanced_code == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2.0.0 Ok: queued as 4F2B71", "4F2B71"),
        ("Ok: queued as 4F2B71.", "4F2B71"),
        ("OK id=1tXyz-0001AB-2C", "1tXyz-0001AB-2C"),
        ("2.0.0 41T0abcd Message accepted for delivery", ""),
        ("2.0.0 accepted", ""),
    ],
)
def test_the_queue_id_is_found_where_servers_put_it(text: str, expected: str) -> None:
    assert queue_id(Reply(250, text)) == expected


def test_the_servers_words_are_cleaned() -> None:
    result = result_of(Reply(550, "5.1.1 no\x1b[31m such\x00 user " + "é" * 2000), Stage.RCPT)
    assert result.text.startswith("5.1.1 no [31m such user é")
    assert len(result.text.encode()) <= 1024
