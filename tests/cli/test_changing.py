"""Commands that change something: resend, clear, prefs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from google.protobuf.json_format import Parse

from mailgrpc.testing.outbox import Outbox
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.cli.conftest import Run

Send = Callable[..., str]


def test_resend_needs_the_risk_accepted(run: Run, send: Send, mailgrpc_outbox: Outbox) -> None:
    message_id = send()
    refused = run("resend", message_id)
    assert refused.exit_code == 1
    assert "DUPLICATE_RISK" in refused.stdout
    again = run("resend", message_id, "--accept-duplicate-risk", "--request-id", "again")
    assert again.exit_code == 0, again.stdout
    run("resend", message_id, "--accept-duplicate-risk", "--request-id", "again")
    mailgrpc_outbox.settle()
    assert len(mailgrpc_outbox) == 2


def test_resend_of_some(run: Run, send: Send) -> None:
    message_id = send("--to", "permerror@example.test")
    result = run("resend", message_id, "--to", "permerror@example.test", "--json")
    [resent] = Parse(result.stdout, pb.ResendResponse()).results
    assert resent.delivery.recipient == "permerror@example.test"


def test_clear_counts_before_it_removes(run: Run, send: Send) -> None:
    for _ in range(3):
        send("--tag", "old")
    counted = run("clear", "--before", "now", "--tag", "old", "--dry-run")
    assert counted.stdout == "3 would be removed\n"
    cleared = run("clear", "--before", "now", "--tag", "old", "--yes")
    assert cleared.stdout == "3 removed\n"
    assert run("clear", "--before", "now", "--tag", "old", "--yes").stdout == "0 removed\n"


def test_clear_does_not_remove_unasked(run: Run, send: Send) -> None:
    message_id = send("--tag", "kept")
    result = run("clear", "--before", "now", "--tag", "kept")
    assert result.exit_code == 2
    assert "--yes" in result.stderr
    assert run("status", message_id).exit_code == 0


@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("y", 0)])
def test_clear_asks_on_a_terminal(
    run: Run, send: Send, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    monkeypatch.setattr("mailgrpc.cli.clear._can_ask", lambda: True)
    message_id = send("--tag", f"asked-{answer}")
    result = run("clear", "--before", "now", "--tag", f"asked-{answer}", stdin=f"{answer}\n")
    assert result.exit_code == code
    assert "Remove 1 messages?" in result.stderr
    assert run("status", message_id).exit_code == 1 - code


def test_clear_goes_on_while_there_is_more(
    run: Run, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mailgrpc.cli.clear.A_CALL", 2)
    for _ in range(5):
        send("--tag", "many")
    result = run("clear", "--before", "now", "--tag", "many", "--yes")
    assert result.stdout == "5 removed\n"
    assert "2 removed …" in result.stderr
    assert "4 removed …" in result.stderr


def test_clear_needs_an_end_of_time(run: Run) -> None:
    result = run("clear", "--yes")
    assert result.exit_code == 2
    assert "--before" in result.stderr


def test_prefs_are_shown_set_blocked_and_unblocked(run: Run) -> None:
    address = "Choosy@Example.org"
    assert run("prefs", "get", address).stdout.split("\t")[:2] == [
        "choosy@example.org",
        "accepts all",
    ]
    blocked = run("prefs", "block", address, "newsletter", "5").stdout.split("\t")
    assert blocked[1:3] == ["refuses bits 2 5", "newsletter"]
    assert run("prefs", "unblock", address, "2").stdout.split("\t")[1] == "refuses bits 5"
    assert run("prefs", "set", address, "1", "2").stdout.split("\t")[1] == "refuses bits 1 2"
    assert run("prefs", "set", address).stdout.split("\t")[1] == "accepts all"
    answer = Parse(run("prefs", "get", address, "--json").stdout, pb.GetPrefsResponse())
    assert answer.prefs.accepts_all


def test_an_unknown_kind_of_mail_is_named(run: Run) -> None:
    result = run("prefs", "block", "ada@example.org", "newsleter")
    assert result.exit_code == 1
    assert "UNKNOWN_CATEGORY" in result.stderr
    assert run("prefs", "block", "ada@example.org", "31").exit_code == 2
    assert run("prefs", "set", "ada@example.org", "newsletter").exit_code == 2
