"""The gateway without pytest's fixtures, and what is left of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mailgrpc.client import MailClient
from mailgrpc.errors import EmbeddedError
from mailgrpc.testing import run_mailgrpc

MAIL = {"sender": "shop@example.org", "to": "ada@example.org", "subject": "Hi", "text": "x"}

WITHOUT_PYTEST = """
import sys
sys.modules["pytest"] = None
from mailgrpc.testing import run_mailgrpc
from mailgrpc.client import MailClient
with run_mailgrpc() as gateway, MailClient(gateway.target) as mail:
    outbox = gateway.new_outbox()
    mail.send(sender="a@example.org", to="b@example.org", subject="s", text="t")
    print(outbox.wait_for(1)[0].subject)
"""


def test_two_at_once_know_nothing_of_each_other(database_url: str) -> None:
    with (
        run_mailgrpc(database_url=database_url) as one,
        run_mailgrpc(database_url=database_url) as other,
        MailClient(one.target) as client,
    ):
        first, second = one.new_outbox(), other.new_outbox()
        client.send(**MAIL)
        assert len(first.wait_for(1)) == 1
        second.settle()
        assert second.mails == []


def test_an_outbox_begins_where_it_is_made(database_url: str) -> None:
    with run_mailgrpc(database_url=database_url) as gateway, MailClient(gateway.target) as client:
        for _ in range(20):  # within a millisecond or two of each other
            outbox = gateway.new_outbox()
            client.send(**MAIL, wait_s=5)
            assert len(outbox) == 1


def test_it_works_without_pytest() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PYTEST],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "s\n", done.stderr


def test_a_start_that_fails_says_why_and_leaves_nothing(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def remembered() -> Path:
        from mailgrpc.embedded.accounts import make_private_directory

        made.append(make_private_directory(None))
        return made[-1]

    monkeypatch.setattr("mailgrpc.testing.gateway.make_private_directory", lambda _: remembered())
    with (
        pytest.raises(EmbeddedError, match="MAILGRPC_LISTEN"),
        run_mailgrpc(database_url=database_url, listen="nonsense"),
    ):
        pass
    assert [path.exists() for path in made] == [False]
