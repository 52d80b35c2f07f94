"""Commands that look: status, show, events, watch, inbox, call."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.json_format import Parse

from mailgrpc.embedded.mailbox import Envelope, Mailbox
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1.delivery_pb2 import DeliveryState
from tests.cli.conftest import Run

Send = Callable[..., str]


def test_status_is_a_line_a_delivery_for_a_pipe(run: Run, send: Send) -> None:
    message_id = send("--to", "permerror@example.test")
    result = run("status", message_id)
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [(line[0], line[1]) for line in lines] == [
        ("ada@example.org", "SENT"),
        ("permerror@example.test", "FAILED"),
    ]
    assert lines[1][4].startswith("550 5.1.1 ")


def test_status_takes_a_request_id_too(run: Run, send: Send) -> None:
    send("--request-id", "order-1")
    answer = Parse(run("status", "order-1", "--json").stdout, pb.GetStatusResponse())
    assert answer.status.request_id == "order-1"
    assert answer.status.ended


def test_an_unknown_message_is_one_line(run: Run) -> None:
    result = run("status", "msg_nothing")
    assert result.exit_code == 1
    assert "MESSAGE_NOT_FOUND" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_show_has_the_mail_and_its_attempts(run: Run, send: Send) -> None:
    result = run("show", send("--cc", "grace@example.org"))
    assert "Subject:\tHi" in result.stdout
    assert "Cc:\tgrace@example.org" in result.stdout
    assert "Message-ID:\t<msg_" in result.stdout
    assert "default (capture)\tACCEPTED" in result.stdout


def test_show_json_has_attachments_only_when_asked(run: Run, send: Send, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("content")
    message_id = send("--attach", str(file))
    without = Parse(run("show", message_id, "--json").stdout, pb.GetMessageResponse())
    full = Parse(run("show", message_id, "--json", "--full").stdout, pb.GetMessageResponse())
    assert without.message.attachments[0].data == b""
    assert full.message.attachments[0].data == b"content"


def test_events_go_on_from_a_token(run: Run, send: Send) -> None:
    before = Parse(run("call", "ListEvents").stdout, pb.ListEventsResponse()).resume_token
    message_id = send()
    result = run("events", "--token", before, "--message", message_id)
    assert [line.split("\t")[3] for line in result.stdout.splitlines()] == [
        "QUEUED",
        "QUEUED → SENDING",
        "SENDING → SENT",
    ]
    after = result.stderr.strip().removeprefix("go on with: --token ")
    assert run("events", "--token", after, "--message", message_id).stdout == ""


def test_events_in_pages_are_all_of_them(run: Run, send: Send) -> None:
    before = Parse(run("call", "ListEvents").stdout, pb.ListEventsResponse()).resume_token
    send()
    one = run("events", "--token", before, "--limit", "1", "--json").stdout
    assert len(Parse(one, pb.ListEventsResponse()).events) == 1
    rest = run("events", "--token", Parse(one, pb.ListEventsResponse()).resume_token)
    assert len(rest.stdout.splitlines()) == 2


def test_watch_begins_with_a_snapshot_and_ends_with_a_token(run: Run, send: Send) -> None:
    message_id = send("--correlation-id", "watched")
    result = run(*("watch", "--correlation-id", "watched", "--snapshot", "all", "--for", "300ms"))
    assert result.exit_code == 0
    [line] = result.stdout.splitlines()
    assert line.split("\t")[1:4] == [message_id, "ada@example.org", "SENT"]
    assert "caught up" in result.stderr
    assert "go on with: --token " in result.stderr


def test_watch_json_lines_carry_their_token(run: Run, send: Send) -> None:
    before = Parse(run("call", "ListEvents").stdout, pb.ListEventsResponse()).resume_token
    send()
    result = run("watch", "--token", before, "--for", "300ms", "--json")
    responses = [Parse(line, pb.WatchStatusResponse()) for line in result.stdout.splitlines()]
    assert all(response.resume_token for response in responses)
    states = [e.state_changed.delivery.state for r in responses for e in r.events]
    assert states[-1] == DeliveryState.DELIVERY_STATE_SENT
    assert any(response.caught_up for response in responses)


def test_watch_ends_on_ctrl_c_and_says_how_to_go_on(mailgrpc_target: str) -> None:
    watch = subprocess.Popen(
        [sys.executable, "-m", "mailgrpc", "--target", mailgrpc_target, "watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert watch.stderr is not None
    assert "caught up" in watch.stderr.readline()
    watch.send_signal(signal.SIGINT)
    _, told = watch.communicate(timeout=30)
    assert watch.returncode == 130
    assert told.startswith("go on with: --token ")
    assert len(told.splitlines()) == 1


def test_a_broken_token_is_one_line(run: Run) -> None:
    result = run("watch", "--token", "nonsense")
    assert result.exit_code == 1
    assert "INVALID_TOKEN" in result.stderr


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    mails = Mailbox(tmp_path / "inbox")
    for subject in ("first", "second"):
        content = f"Subject: {subject}\r\n\r\nbody \x1b[31mof {subject}\r\n".encode()
        mails.add(content, Envelope(mail_from="a@example.org", rcpt_tos=("b@example.org",)))
    return tmp_path


def test_inbox_lists_the_newest_first(run: Run, inbox: Path) -> None:
    lines = run("inbox", "--data-dir", str(inbox)).stdout.splitlines()
    assert [line.split("\t")[1:4] for line in lines] == [
        ["a@example.org", "b@example.org", "second"],
        ["a@example.org", "b@example.org", "first"],
    ]
    listed = run("inbox", "--data-dir", str(inbox), "list", "--json", "--limit", "1").stdout
    assert json.loads(listed)["subject"] == "second"


def test_inbox_shows_a_mail_byte_for_byte(run: Run, inbox: Path) -> None:
    newest = run("inbox", "--data-dir", str(inbox), "show").stdout_bytes
    assert newest == b"Subject: second\r\n\r\nbody \x1b[31mof second\r\n"
    oldest = run("inbox", "--data-dir", str(inbox)).stdout.splitlines()[-1].split("\t")[0]
    assert b"of first" in run("inbox", "--data-dir", str(inbox), "show", oldest).stdout_bytes


def test_inbox_says_where_it_looked(run: Run, tmp_path: Path) -> None:
    assert str(tmp_path) in run("inbox", "--data-dir", str(tmp_path)).stderr
    result = run("inbox", "--data-dir", str(tmp_path), "show", "../../etc/passwd")
    assert result.exit_code == 1
    assert "no mail" in result.stderr


def test_call_speaks_to_any_method(run: Run, send: Send) -> None:
    message_id = send()
    body = json.dumps({"messageId": message_id})
    assert Parse(run("call", "GetStatus", body).stdout, pb.GetStatusResponse()).status.ended
    assert run("call", "GetStatus", "-", stdin=body).exit_code == 0
    assert run("call", "mailgrpc.v1.MailService/GetStatus", body).exit_code == 0


def test_call_lists_and_describes_the_methods(run: Run) -> None:
    listed = [line.split("\t")[0] for line in run("call").stdout.splitlines()]
    assert listed == list(pb.DESCRIPTOR.services_by_name["MailService"].methods_by_name)
    described = run("call", "Enqueue", "--describe").stdout
    assert "message.to[].address\tstring" in described
    assert "DELIVERY_MODE_SEND_ONCE" in described


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(("Enqueu",), "no method"), (("GetStatus", "{"), "not a"), (("GetStatus", '{"x": 1}'), '"x"')],
)
def test_call_with_what_is_no_call_exits_2(run: Run, arguments: tuple[str, ...], text: str) -> None:
    result = run("call", *arguments)
    assert result.exit_code == 2
    assert text in result.stderr


def test_call_is_one_plain_call(run: Run) -> None:
    """Nothing is filled in: without a request_id it is not idempotent, as the caller said."""
    body = (
        '{"message": {"sender": {"address": "a@example.org"}, "subject": "s", "text": "t",'
        ' "to": [{"address": "b@example.org"}]}}'
    )
    message_id = json.loads(run("call", "Enqueue", body).stdout)["messageId"]
    shown = json.loads(run("status", message_id, "--json").stdout)
    assert "requestId" not in shown["status"]
