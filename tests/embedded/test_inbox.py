"""The local inbox: what it stores, and how it misbehaves when asked."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiosmtplib
import pytest

from mailgrpc.config import HostPort
from mailgrpc.embedded.inbox import LocalInbox
from mailgrpc.embedded.mailbox import Envelope, Mailbox, list_inbox, read_mail
from mailgrpc.errors import EmbeddedError

ANYWHERE = HostPort("127.0.0.1", 0)
MAIL = b"Message-ID: <1@x.example>\r\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n\r\nHello\r\n"


@pytest.fixture
async def inbox(tmp_path: Path) -> AsyncIterator[LocalInbox]:
    async with LocalInbox(tmp_path / "inbox", ANYWHERE) as inbox:
        yield inbox


async def connect(inbox: LocalInbox, timeout_s: float = 5.0) -> aiosmtplib.SMTP:
    client = aiosmtplib.SMTP(
        hostname="127.0.0.1",
        port=inbox.address.port,
        local_hostname="client.example",
        timeout=timeout_s,
    )
    await client.connect()
    await client.ehlo()
    return client


async def send(inbox: LocalInbox, *recipients: str, mail: bytes = MAIL) -> None:
    client = await connect(inbox)
    try:
        await client.sendmail("ada@x.example", list(recipients), mail)
    finally:
        client.close()


async def test_a_mail_is_stored_with_its_envelope(inbox: LocalInbox) -> None:
    await send(inbox, "bob@y.example", "eve@z.example")
    (mail,) = list_inbox(inbox.directory)
    assert read_mail(inbox.directory, mail.id) == (mail, MAIL)
    assert (mail.subject, mail.message_id, mail.size) == ("Grüße", "<1@x.example>", len(MAIL))
    assert mail.envelope == Envelope(
        mail_from="ada@x.example",
        rcpt_tos=("bob@y.example", "eve@z.example"),
        helo="client.example",
    )


async def test_the_newest_come_first_and_the_oldest_go(tmp_path: Path) -> None:
    mailbox = Mailbox(tmp_path, max_mails=3)
    ids = [mailbox.add(MAIL, Envelope(mail_from="", rcpt_tos=())) for _ in range(5)]
    assert [mail.id for mail in list_inbox(tmp_path)] == ids[:1:-1]
    assert [mail.id for mail in list_inbox(tmp_path, limit=1)] == ids[4:]
    assert len(list(tmp_path.iterdir())) == 6
    with pytest.raises(LookupError):
        read_mail(tmp_path, ids[0])
    reopened = Mailbox(tmp_path, max_mails=3)
    newest = reopened.add(MAIL, Envelope(mail_from="", rcpt_tos=()))
    assert [mail.id for mail in list_inbox(tmp_path)] == [newest, *ids[:2:-1]]


def test_a_mail_that_was_half_written_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "20260101-000000-000000.eml").write_bytes(MAIL)
    (tmp_path / ".20260101-000000-000001.json").write_text("{")
    (tmp_path / "notes.txt").write_text("mine")
    assert list_inbox(tmp_path) == []
    Mailbox(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("mail_id", ["../inbox", "", "20260101-000000-000000", "/etc/passwd"])
def test_an_id_of_nothing_finds_nothing(tmp_path: Path, mail_id: str) -> None:
    with pytest.raises(LookupError, match="no mail"):
        read_mail(tmp_path, mail_id)


def test_no_inbox_is_an_empty_one(tmp_path: Path) -> None:
    assert list_inbox(tmp_path / "none") == []


async def test_smtputf8_and_the_null_sender(inbox: LocalInbox) -> None:
    client = await connect(inbox)
    mail = "Subject: Grüße\r\n\r\nJosé\r\n".encode()
    await client.mail("josé@exämple.org", options=["SMTPUTF8", "BODY=8BITMIME"], encoding="utf-8")
    await client.rcpt("дмитрий@пример.рф", encoding="utf-8")
    await client.data(mail)
    await client.sendmail("", ["bob@y.example"], MAIL)
    client.close()
    bounce, utf8 = list_inbox(inbox.directory)
    assert bounce.envelope.mail_from == ""
    assert (utf8.envelope.mail_from, utf8.envelope.rcpt_tos) == (
        "josé@exämple.org",
        ("дмитрий@пример.рф",),
    )
    assert utf8.envelope.smtputf8
    assert (utf8.subject, read_mail(inbox.directory, utf8.id)[1]) == ("Grüße", mail)


async def test_dots_come_through_and_a_pipeline_is_answered(inbox: LocalInbox) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", inbox.address.port)
    assert (await reader.readline()).startswith(b"220 ")
    writer.write(b"EHLO c.example\r\n")
    offered = b""
    while not offered.endswith(b"250 HELP\r\n"):
        offered += await reader.readline()
    for extension in (b"PIPELINING", b"8BITMIME", b"SMTPUTF8", b"SIZE 67108864"):
        assert b"250-" + extension + b"\r\n" in offered
    writer.write(
        b"MAIL FROM:<a@x.example> BODY=8BITMIME\r\nRCPT TO:<b@y.example>\r\n"
        b"RCPT TO:<permerror@example.test>\r\nRCPT TO:<c@y.example>\r\nDATA\r\n"
        b"\r\n..\r\n..x\r\nx.\r\n.\r\n"
        b"MAIL FROM:<a@x.example>\r\nRCPT TO:<d@y.example>\r\nDATA\r\n\r\n2\r\n.\r\nQUIT\r\n"
    )
    codes = [(await reader.readline())[:3] for _ in range(11)]
    assert b" ".join(codes) == b"250 250 550 250 354 250 250 250 354 250 221"
    assert await reader.read() == b""
    writer.close()
    second, first = list_inbox(inbox.directory)
    assert first.envelope.rcpt_tos == ("b@y.example", "c@y.example")
    assert read_mail(inbox.directory, first.id)[1] == b"\r\n.\r\n.x\r\nx.\r\n"
    assert second.envelope.rcpt_tos == ("d@y.example",)


async def test_permerror_refuses_that_recipient_alone(inbox: LocalInbox) -> None:
    client = await connect(inbox)
    errors, _ = await client.sendmail(
        "a@x.example", ["permerror@example.test", "b@y.example"], MAIL
    )
    client.close()
    assert {address: answer[0] for address, answer in errors.items()} == {
        "permerror@example.test": 550
    }
    (mail,) = list_inbox(inbox.directory)
    assert mail.envelope.rcpt_tos == ("b@y.example",)


async def test_temperror_counts_the_tries_of_each_mail(inbox: LocalInbox) -> None:
    other = MAIL.replace(b"<1@", b"<2@")
    for mail, refused in ((MAIL, True), (other, True), (MAIL, True), (MAIL, False), (other, True)):
        if refused:
            with pytest.raises(aiosmtplib.SMTPDataError) as refusal:
                await send(inbox, "temperror+2@example.test", mail=mail)
            assert (refusal.value.code, refusal.value.message[:5]) == (451, "4.3.0")
        else:
            await send(inbox, "temperror+2@example.test", mail=mail)
    (stored,) = list_inbox(inbox.directory)
    assert stored.message_id == "<1@x.example>"


async def test_timeout_takes_the_mail_and_never_answers(inbox: LocalInbox) -> None:
    client = await connect(inbox, timeout_s=0.3)
    with pytest.raises(aiosmtplib.SMTPReadTimeoutError):
        await client.sendmail("a@x.example", ["timeout@example.test"], MAIL)
    client.close()
    (mail,) = list_inbox(inbox.directory)
    assert not mail.envelope.answered
    while inbox.open_connections:  # the connection's end frees what waited
        await asyncio.sleep(0.01)


async def test_drop_takes_the_mail_and_hangs_up(inbox: LocalInbox) -> None:
    with pytest.raises(aiosmtplib.SMTPServerDisconnected):
        await send(inbox, "drop@example.test")
    (mail,) = list_inbox(inbox.directory)
    assert not mail.envelope.answered


async def test_a_stop_does_not_wait_for_silent_clients(tmp_path: Path) -> None:
    inbox = LocalInbox(tmp_path, ANYWHERE)
    await inbox.start()
    client = await connect(inbox)
    silent = asyncio.create_task(client.sendmail("a@x.example", ["timeout@example.test"], MAIL))
    while not list_inbox(tmp_path):
        await asyncio.sleep(0.01)
    await asyncio.wait_for(inbox.stop(), 5)
    with pytest.raises(aiosmtplib.SMTPException):
        await silent


async def test_a_taken_port_is_told_or_another_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = HostPort("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(EmbeddedError, match="set MAILGRPC_INBOX_SMTP_LISTEN to another"):
            await LocalInbox(tmp_path, listen).start()
        async with LocalInbox(tmp_path, listen, any_port=True) as inbox:
            assert inbox.address.port not in (0, listen.port)
            await send(inbox, "bob@y.example")


async def test_too_large_and_too_long_are_refused(inbox: LocalInbox) -> None:
    client = await connect(inbox)
    with pytest.raises(aiosmtplib.SMTPDataError, match="Line too long"):
        await client.sendmail("a@x.example", ["b@y.example"], b"x" * 2000 + b"\r\n")
    answer = await client.execute_command(b"MAIL FROM:<a@x.example> SIZE=99999999")
    assert answer.code == 552
    client.close()
