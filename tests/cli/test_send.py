"""`mailgrpc send`: what is handed over, and exit codes that scripts can rely on."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from google.protobuf.json_format import Parse

from mailgrpc.client import MailClient
from mailgrpc.testing.outbox import Outbox
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import message_pb2
from mailgrpc.v1.delivery_pb2 import DeliveryState
from tests.cli.conftest import Run

TO_ADA = ("send", "--from", "Shop <shop@example.org>", "--to", "ada@example.org", "--subject", "Hi")


def to(address: str, *more: str) -> tuple[str, ...]:
    return (
        "send",
        "--from",
        "s@example.org",
        "--to",
        address,
        "--subject",
        "Hi",
        "--text",
        "x",
        *more,
    )


def test_stdout_is_the_id_and_nothing_else(run: Run, mailgrpc_client: MailClient) -> None:
    result = run(*TO_ADA, "--text", "hello")
    assert result.exit_code == 0
    message_id = result.stdout.rstrip("\n")
    request = pb.GetStatusRequest(message_id=message_id)
    assert mailgrpc_client.get_status(request).status.message_id == message_id


@pytest.mark.parametrize(
    ("arguments", "code", "state"),
    [
        (to("ada@example.org"), 0, "SENT"),
        (to("temperror+1@example.test", "--wait-timeout", "300ms"), 6, "has not ended"),
        (to("permerror@example.test"), 4, "FAILED"),
        (to("timeout@example.test", "--mode", "send-once"), 5, "OUTCOME_UNKNOWN"),
        (to("refuser@example.org", "--category", "newsletter"), 3, "SUPPRESSED"),
        (to("ada@example.org", "--to", "permerror@example.test"), 4, "FAILED"),
    ],
)
def test_the_exit_code_tells_what_became_of_it(
    run: Run, arguments: tuple[str, ...], code: int, state: str
) -> None:
    assert run("prefs", "block", "refuser@example.org", "newsletter").exit_code == 0
    result = run(*arguments, "--wait")
    assert result.exit_code == code, result.stderr
    assert state in result.stderr.splitlines()[-1]


def test_an_expired_message_is_failed(run: Run) -> None:
    result = run(*to("temperror+9@example.test", "--expire", "1s", "--wait"))
    assert result.exit_code == 4
    assert "EXPIRED" in result.stderr


def test_progress_goes_to_stderr(run: Run) -> None:
    result = run(*TO_ADA, "--text", "hello", "--wait")
    assert len(result.stdout.splitlines()) == 1
    assert "QUEUED → SENDING" in result.stderr
    assert "SENDING → SENT" in result.stderr


def test_who_does_not_get_it_is_named(run: Run) -> None:
    run("prefs", "block", "grace@example.org", "newsletter")
    result = run(*to("grace@example.org", "--category", "newsletter"))
    assert result.exit_code == 0
    assert "not queued: grace@example.org  PREFERENCE" in result.stderr


def test_json_is_the_servers_answers_line_by_line(run: Run) -> None:
    first, second = run(*TO_ADA, "--text", "x", "--wait", "--json").stdout.splitlines()
    accepted = Parse(first, pb.EnqueueResponse())
    ended = Parse(second, pb.GetStatusResponse())
    assert accepted.message_id == ended.status.message_id
    assert ended.status.state == DeliveryState.DELIVERY_STATE_SENT
    assert "messageId" in json.loads(first)


def test_every_option_reaches_the_message(
    run: Run, mailgrpc_client: MailClient, tmp_path: Path
) -> None:
    file = tmp_path / "invoice.pdf"
    file.write_bytes(b"pdf")
    page = tmp_path / "page.html"
    page.write_text("<b>hä</b>", "utf-8")
    result = run(
        *("send", "--from", "Shop <shop@example.org>", "--to", "Ada <ada@example.org>"),
        *("--to", "b@example.org", "--cc", "c@example.org", "--bcc", "d@example.org"),
        *("--reply-to", "help@example.org", "--subject", "Hi", "--text-file", "-"),
        *("--html-file", str(page), "--attach", str(file), "--header", "X-Order=4711"),
        *("--category", "receipts", "--flag", "3", "--tag", "t1", "--tag", "t2"),
        *("--arg", "order=4711", "--correlation-id", "o-4711", "--mode", "send-once"),
        *("--priority", "high", "--channel", "default", "--at", "1h", "--expire", "2h"),
        *("--dedupe", "10m", "--request-id", "every-option"),
        stdin="from stdin\n",
    )
    assert result.exit_code == 0, result.stderr
    answer = mailgrpc_client.get_message(
        pb.GetMessageRequest(request_id="every-option", view=pb.MESSAGE_VIEW_FULL)
    )
    mail, options = answer.message, answer.options
    assert (mail.sender.name, mail.sender.address) == ("Shop", "shop@example.org")
    assert [(r.name, r.address) for r in mail.to] == [
        ("Ada", "ada@example.org"),
        ("", "b@example.org"),
    ]
    assert [r.address for r in (*mail.cc, *mail.bcc)] == ["c@example.org", "d@example.org"]
    assert mail.reply_to[0].address == "help@example.org"
    assert (mail.text, mail.html) == ("from stdin\n", "<b>hä</b>")
    assert (mail.attachments[0].filename, mail.attachments[0].data) == ("invoice.pdf", b"pdf")
    assert [(h.name, h.value) for h in mail.headers] == [("X-Order", "4711")]
    assert list(mail.categories) == ["receipts"]
    assert mail.flags == 1 << 3
    assert list(mail.tags) == ["t1", "t2"]
    assert dict(mail.custom_args) == {"order": "4711"}
    assert mail.correlation_id == "o-4711"
    assert options.mode == message_pb2.DELIVERY_MODE_SEND_ONCE
    assert options.priority == message_pb2.PRIORITY_HIGH
    assert options.channel == "default"
    in_an_hour = datetime.now(UTC) + timedelta(hours=1)
    assert abs(options.send_at.ToDatetime(UTC) - in_an_hour) < timedelta(minutes=1)
    assert options.expire_at.seconds - options.send_at.seconds == pytest.approx(3600, abs=1)
    assert options.dedupe_window.seconds == 600


def test_the_same_request_id_sends_once(run: Run, mailgrpc_outbox: Outbox) -> None:
    arguments = (*TO_ADA, "--text", "x", "--request-id", "cron-1", "--wait")
    assert run(*arguments).stdout == run(*arguments).stdout
    assert len(mailgrpc_outbox) == 1


def test_validate_only_stores_nothing(run: Run, mailgrpc_outbox: Outbox) -> None:
    result = run(*TO_ADA, "--text", "x", "--validate-only", "--wait")
    assert (result.exit_code, result.stdout) == (0, "valid\n")
    mailgrpc_outbox.settle()
    assert mailgrpc_outbox.mails == []


def test_what_is_wrong_is_one_line_that_names_the_field(run: Run) -> None:
    result = run(*to("nobody"))
    assert result.exit_code == 1
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("Error: message.to[0].address: ")
    assert "INVALID_ADDRESS" in line


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--text", "a", "--text-file", "b"), "exclude each other"),
        (("--text-file", "-", "--html-file", "-"), "only one"),
        (("--at", "soon"), "not a time"),
        (("--dedupe", "5"), "not a duration"),
        (("--arg", "novalue"), "KEY=VALUE"),
        (("--attach", "/does/not/exist"), "does not exist"),
        (("--flag", "31"), "not in the range"),
    ],
)
def test_wrong_usage_exits_2(run: Run, arguments: tuple[str, ...], text: str) -> None:
    result = run(*TO_ADA, *arguments)
    assert result.exit_code == 2
    assert text in result.stderr


def test_a_body_that_cannot_be_read_is_one_line(run: Run) -> None:
    result = run(*TO_ADA, "--text-file", "/does/not/exist")
    assert result.exit_code == 1
    assert "No such file" in result.stderr
