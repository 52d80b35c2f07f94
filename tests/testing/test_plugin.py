"""`mailgrpc.testing` as the tests of a service use it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

A_SERVICES_TESTS = """
import pytest
from mailgrpc.client import MailClient
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1.mail_service_pb2_grpc import MailServiceStub

@pytest.fixture(scope="session")
def mailgrpc_options():
    return {"categories": {"newsletter": 2}, "channels": ["default", "bulk-mail"]}

def order(target, address, **more):
    with MailClient(target) as mail:
        return mail.send(sender="shop@example.org", to=address, subject="Receipt",
                         text="Thank you.", html="<p>Thank you.</p>",
                         attachments=[("invoice.pdf", b"pdf")], **more)

def test_a_mail_is_what_was_ordered(mailgrpc_target, mailgrpc_outbox):
    receipt = order(mailgrpc_target, "Ada <ada@example.org>", bcc="log@example.org", tags=["t"])
    [mail] = mailgrpc_outbox.wait_for(1)
    assert mail.message_id == receipt.message_id
    assert (mail.to, mail.bcc) == (("ada@example.org",), ("log@example.org",))
    assert mail.recipients == ("ada@example.org", "log@example.org")
    assert (mail.subject, mail.text, mail.html) == ("Receipt", "Thank you.", "<p>Thank you.</p>")
    assert (mail.attachments[0].filename, mail.attachments[0].data) == ("invoice.pdf", b"pdf")
    assert mail.parsed["To"] == "Ada <ada@example.org>"
    assert b"log@example.org" not in mail.raw
    assert mail.tags == ("t",)

def test_the_outbox_is_empty_again(mailgrpc_outbox):
    mailgrpc_outbox.settle()
    assert mailgrpc_outbox.mails == []
    assert not list(mailgrpc_outbox)

def test_late_mail_of_an_earlier_test_part_1(mailgrpc_target):
    backoff = pb.EnqueueRequest().options.retry
    backoff.initial_backoff.FromSeconds(1)
    order(mailgrpc_target, "temperror+1@example.test", retry=backoff)

def test_late_mail_of_an_earlier_test_part_2(mailgrpc_target, mailgrpc_outbox, mailgrpc_client):
    receipt = order(mailgrpc_target, "ada@example.org")
    late = mailgrpc_client.watch(stop_after_s=5)
    assert any(event.recipient == "temperror+1@example.test"
               and event.state_changed.delivery.state == 4 for event in late)
    assert [mail.message_id for mail in mailgrpc_outbox] == [receipt.message_id]

def test_waiting_in_vain_says_what_came(mailgrpc_target, mailgrpc_outbox):
    order(mailgrpc_target, "ada@example.org")
    with pytest.raises(AssertionError, match=r"2 mails .* 1 were sent\\n  'Receipt' to ada@"):
        mailgrpc_outbox.wait_for(2, timeout_s=0.3)

def test_what_waits_for_later_is_settled(mailgrpc_target, mailgrpc_outbox):
    order(mailgrpc_target, "temperror+9@example.test")
    mailgrpc_outbox.settle()
    assert mailgrpc_outbox.mails == []

def test_a_mail_that_is_told_as_sent_lies_in_the_outbox(mailgrpc_target, mailgrpc_outbox):
    for count in range(1, 6):
        order(mailgrpc_target, "ada@example.org", wait_s=5)
        assert len(mailgrpc_outbox) == count

def test_preferences_and_channels_work(mailgrpc_client, mailgrpc_target, mailgrpc_outbox):
    change = pb.PrefsChange(block_categories=["newsletter"])
    mailgrpc_client.update_prefs(pb.UpdatePrefsRequest(address="g@example.org", change=change))
    order(mailgrpc_target, ["g@example.org", "a@example.org"], categories=["newsletter"],
          channel="bulk-mail")
    [mail] = mailgrpc_outbox.wait_for(1)
    assert mail.to == ("a@example.org",)

def test_any_stub_will_do(mailgrpc_channel):
    prefs = MailServiceStub(mailgrpc_channel).GetPrefs(pb.GetPrefsRequest(address="x@example.org"))
    assert prefs.prefs.accepts_all
"""

ASYNCIO_TESTS = """
import pytest
from mailgrpc.client import AsyncMailClient

@pytest.mark.parametrize("number", range(10))
async def test_each_in_a_loop_of_its_own(mailgrpc_target, mailgrpc_outbox, number):
    async with AsyncMailClient(mailgrpc_target) as mail:
        await mail.send(sender="shop@example.org", to="ada@example.org", subject=str(number),
                        text="x", wait_s=5)
    assert [mail.subject for mail in mailgrpc_outbox] == [str(number)]
"""


def test_a_services_tests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(A_SERVICES_TESTS)
    result = pytester.runpytest_subprocess("-q")
    result.assert_outcomes(passed=9)


def test_asyncio_tests(pytester: pytest.Pytester) -> None:
    """The loop of one test does not disturb the next."""
    pytester.makeini(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
        "filterwarnings = error\n"
    )
    pytester.makepyfile(ASYNCIO_TESTS)
    result = pytester.runpytest_subprocess("-q")
    result.assert_outcomes(passed=10)


def test_a_given_server_gets_a_database_of_its_own_that_goes_again(
    pytester: pytest.Pytester, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAILGRPC_TEST_DATABASE_URL", database_url)
    pytester.makepyfile(
        """
        import asyncio, asyncpg, os

        async def databases():
            connection = await asyncpg.connect(os.environ["MAILGRPC_TEST_DATABASE_URL"])
            names = await connection.fetch("SELECT datname FROM pg_database")
            await connection.close()
            return {name for (name,) in names}

        def test_it(mailgrpc_client, mailgrpc_outbox):
            mailgrpc_client.send(sender="a@example.org", to="b@example.org", subject="s", text="t")
            mailgrpc_outbox.wait_for(1)
            ours = f"mailgrpc_test_{os.getpid()}_"
            assert any(name.startswith(ours) for name in asyncio.run(databases()))
        """
    )
    before = _databases(database_url)
    pytester.runpytest_subprocess("-q").assert_outcomes(passed=1)
    assert _databases(database_url) == before


def _databases(url: str) -> set[str]:
    import asyncio

    import asyncpg

    async def ask() -> set[str]:
        connection = await asyncpg.connect(url)
        names = await connection.fetch("SELECT datname FROM pg_database")
        await connection.close()
        return {name for (name,) in names}

    return asyncio.run(ask())


def test_no_setting_of_the_developer_reaches_the_gateway(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above all no channel: a test must never send a mail."""
    monkeypatch.setenv("MAILGRPC_CHANNEL_URL", "smtp://mail.example.org")
    monkeypatch.setenv("MAILGRPC_AUTH", "keys")
    pytester.makefile(".toml", mailgrpc='listen = "127.0.0.1:1"\n')
    pytester.makepyfile(
        """
        def test_it(mailgrpc_client, mailgrpc_outbox):
            mailgrpc_client.send(sender="a@example.org", to="b@example.org", subject="s", text="t")
            assert len(mailgrpc_outbox.wait_for(1)) == 1
        """
    )
    pytester.runpytest_subprocess("-q").assert_outcomes(passed=1)


def test_runs_that_do_not_use_it_do_not_pay_for_it() -> None:
    code = (
        "import sys, mailgrpc.testing;"
        " print(sorted({'grpc', 'google', 'sqlalchemy', 'asyncpg'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['asyncpg'] = None\n"
        "from mailgrpc.testing import run_mailgrpc\nrun_mailgrpc()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert "pip install 'mailgrpc[embedded]'" in done.stderr.splitlines()[-1]
