"""SMTP: what each failure of a transaction, a connection and a pool becomes."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any

import pytest
import uvloop

from mailgrpc.core.delivery import Cause, Outcome, Result, Role
from mailgrpc.core.message import Attachment, Recipient
from mailgrpc.core.mime import render
from mailgrpc.providers.provider import ProbeFailed
from mailgrpc.providers.smtp import SmtpProvider
from mailgrpc.providers.smtp_pool import SmtpServer

from .calls import call_of, call_to, message
from .smtp_peer import DROP, STALL, SmtpPeer

ANN, BOB, CAT = "ann@example.org", "bob@example.org", "cat@example.org"
BIG = b"x" * 3_000_000


@asynccontextmanager
async def provider_for(
    peer: SmtpPeer, *, concurrency: int = 2, attempt_timeout_s: float = 3.0, **server: Any
) -> AsyncIterator[SmtpProvider]:
    settings = {"host": "127.0.0.1", "port": peer.port, "tls": "none", "timeout_s": 0.25, **server}
    provider = SmtpProvider(
        SmtpServer(**settings), concurrency=concurrency, attempt_timeout_s=attempt_timeout_s
    )
    try:
        yield provider
    finally:
        await provider.close()


async def send_one(peer: SmtpPeer, *addresses: str, **server: Any) -> list[Result]:
    async with peer, provider_for(peer, **server) as provider:
        return await provider.send(call_to(*addresses or (ANN,)))


def fates(results: list[Result]) -> list[tuple[Outcome, Cause]]:
    return [(r.outcome, r.cause) for r in results]


# The transaction


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize(
    ("command", "reply", "expected"),
    [
        ("MAIL", "550 5.1.8 bad sender", (Outcome.REJECTED, Cause.SENDER)),
        ("MAIL", "451 4.3.0 not now", (Outcome.DEFERRED, Cause.PROVIDER)),
        ("MAIL", "421 too busy", (Outcome.DEFERRED, Cause.RATE_LIMITED)),
        ("MAIL", DROP, (Outcome.DEFERRED, Cause.CONNECTION)),
        ("MAIL", STALL, (Outcome.DEFERRED, Cause.TIMEOUT)),
        ("MAIL", "hello there", (Outcome.DEFERRED, Cause.PROVIDER)),
        ("RCPT", DROP, (Outcome.DEFERRED, Cause.CONNECTION)),
        ("RCPT", STALL, (Outcome.DEFERRED, Cause.TIMEOUT)),
        ("DATA", "451 4.3.0 not now", (Outcome.DEFERRED, Cause.PROVIDER)),
        ("DATA", "554 5.7.1 no", (Outcome.REJECTED, Cause.POLICY)),
        ("DATA", "250 2.0.0 what?", (Outcome.DEFERRED, Cause.PROVIDER)),
        ("DATA", DROP, (Outcome.DEFERRED, Cause.CONNECTION)),
        ("DATA", STALL, (Outcome.DEFERRED, Cause.TIMEOUT)),
        ("DOT", "554 5.7.1 spam", (Outcome.REJECTED, Cause.POLICY)),
        ("DOT", "451 4.3.0 disk full", (Outcome.DEFERRED, Cause.PROVIDER)),
        ("DOT", "421 4.3.2 leaving", (Outcome.DEFERRED, Cause.PROVIDER)),
        ("DOT", DROP, (Outcome.UNKNOWN, Cause.CONNECTION)),
        ("DOT", STALL, (Outcome.UNKNOWN, Cause.TIMEOUT)),
        ("DOT", "354 more?", (Outcome.UNKNOWN, Cause.PROVIDER)),
        ("DOT", "hello there", (Outcome.UNKNOWN, Cause.PROVIDER)),
    ],
)
async def test_a_failure_at_each_command(
    pipelining: bool, command: str, reply: str, expected: tuple[Outcome, Cause]
) -> None:
    peer = SmtpPeer(pipelining=pipelining, script={command: [reply]})
    async with peer, provider_for(peer) as provider:
        assert fates(await provider.send(call_to(ANN, BOB))) == [expected] * 2
        # Whatever happened, the next mail goes through, on this connection or another.
        assert fates(await provider.send(call_to(CAT))) == [(Outcome.ACCEPTED, Cause.UNSPECIFIED)]
    assert peer.taken[-1].recipients == [CAT]


@pytest.mark.parametrize("pipelining", [True, False])
async def test_recipients_are_classed_alone_and_the_others_get_the_mail(pipelining: bool) -> None:
    script: dict[str, str | list[str]] = {
        f"RCPT {ANN}": "550 5.1.1 unknown",
        f"RCPT {CAT}": "452 4.2.2 full",
    }
    peer = SmtpPeer(pipelining=pipelining, script=script)
    results = await send_one(peer, ANN, BOB, CAT)
    assert fates(results) == [
        (Outcome.REJECTED, Cause.BAD_ADDRESS),
        (Outcome.ACCEPTED, Cause.UNSPECIFIED),
        (Outcome.DEFERRED, Cause.MAILBOX_FULL),
    ]
    assert results[0].enhanced_code == "5.1.1"
    assert results[1].provider_message_id == "4F2B71"
    assert [t.recipients for t in peer.taken] == [[BOB]]


async def test_data_accepted_without_a_recipient_never_delivers_an_empty_mail() -> None:
    peer = SmtpPeer(script={"RCPT": "550 5.1.1 unknown", "DATA": "354 go on"})
    results = await send_one(peer, ANN, BOB)
    assert fates(results) == [(Outcome.REJECTED, Cause.BAD_ADDRESS)] * 2
    assert peer.taken == []


async def test_stepwise_no_data_is_said_when_all_are_refused() -> None:
    peer = SmtpPeer(pipelining=False, script={"RCPT": "550 5.1.1 unknown"})
    await send_one(peer, ANN, BOB)
    assert "DATA" not in peer.commands
    assert "RSET" in peer.commands


async def test_421_in_the_middle_spares_the_verdicts_that_stand() -> None:
    script: dict[str, str | list[str]] = {
        f"RCPT {ANN}": "550 5.1.1 unknown",
        f"RCPT {CAT}": "421 4.7.0 leaving",
    }
    results = await send_one(SmtpPeer(script=script), ANN, BOB, CAT)
    assert fates(results) == [
        (Outcome.REJECTED, Cause.BAD_ADDRESS),
        (Outcome.DEFERRED, Cause.RATE_LIMITED),
        (Outcome.DEFERRED, Cause.RATE_LIMITED),
    ]


async def test_a_refused_sender_stands_whatever_the_server_says_next() -> None:
    for last in ("421 4.7.0 too many errors", DROP, "hello there"):
        peer = SmtpPeer(script={"MAIL": "550 5.1.8 bad sender", "RCPT": last})
        assert fates(await send_one(peer, ANN, BOB)) == [(Outcome.REJECTED, Cause.SENDER)] * 2


async def test_421_is_of_the_channel_unless_it_could_be_about_this_mail() -> None:
    """One mail with many bad recipients, or a sender that one server hates, stops no others."""
    for reply, is_channel in [
        ("421 4.3.2 shutting down", True),
        ("421 too many connections", True),
        ("421 4.1.8 that sender again", False),
        ("421 4.2.2 mailbox full", False),
        ("421 4.5.3 too many recipients", False),
    ]:
        results = await send_one(SmtpPeer(script={f"RCPT {BOB}": reply}), ANN, BOB)
        assert [(r.outcome, r.of_channel) for r in results] == [(Outcome.DEFERRED, is_channel)] * 2
    script: dict[str, str | list[str]] = {
        f"RCPT {ANN}": "550 5.1.1 unknown",
        f"RCPT {BOB}": "421 4.7.0 too many errors",
    }
    results = await send_one(SmtpPeer(script=script), ANN, BOB)
    assert [(r.outcome, r.of_channel) for r in results] == [
        (Outcome.REJECTED, False),
        (Outcome.DEFERRED, False),
    ]


async def test_421_on_a_connection_that_has_served_is_not_of_the_channel() -> None:
    async with SmtpPeer() as peer, provider_for(peer) as provider:
        await provider.send(call_to(ANN))
        peer.script["RCPT"] = ["421 4.7.0 enough for one connection"]
        [result] = await provider.send(call_to(BOB))
        assert (result.outcome, result.of_channel) == (Outcome.DEFERRED, False)
        assert peer.connections == 1


async def test_a_log_in_that_has_lapsed_is_made_again_unseen() -> None:
    async with SmtpPeer() as peer, provider_for(peer) as provider:
        await provider.send(call_to(ANN))
        peer.script["MAIL"] = ["530 5.7.0 authentication required"]
        assert fates(await provider.send(call_to(BOB))) == [(Outcome.ACCEPTED, Cause.UNSPECIFIED)]
    assert peer.connections == 2


async def test_a_refusal_while_the_content_is_written_is_proof() -> None:
    peer = SmtpPeer(early="552 5.3.4 too big")
    mail = message(ANN, attachments=(Attachment("big.bin", BIG, "application/octet-stream"),))
    async with peer, provider_for(peer) as provider:
        assert fates(await provider.send(call_of(mail))) == [(Outcome.REJECTED, Cause.TOO_LARGE)]
    assert peer.taken == []


async def test_a_large_mail_is_looked_at_when_only_its_end_is_left() -> None:
    peer = SmtpPeer()
    mail = message(ANN, attachments=(Attachment("big.bin", BIG, "application/octet-stream"),))
    async with peer, provider_for(peer, timeout_s=3.0) as provider:
        assert fates(await provider.send(call_of(mail, last_look=lambda: False))) == [
            (Outcome.DEFERRED, Cause.WORKER_LOST)
        ]
        assert peer.taken == []
        call = call_of(mail)
        assert fates(await provider.send(call)) == [(Outcome.ACCEPTED, Cause.UNSPECIFIED)]
    raw = render(mail, rfc_message_id=call.rfc_message_id, date=call.created_at)
    assert peer.taken[0].content == raw


async def test_a_worker_that_lost_its_lease_keeps_the_verdicts_that_stand() -> None:
    peer = SmtpPeer()
    async with peer, provider_for(peer) as provider:
        call = call_to("refused@example.org", ANN, last_look=lambda: False)
        assert fates(await provider.send(call)) == [
            (Outcome.REJECTED, Cause.BAD_ADDRESS),
            (Outcome.DEFERRED, Cause.WORKER_LOST),
        ]
    assert peer.taken == []


async def test_dots_at_the_beginning_of_lines_arrive_as_written() -> None:
    peer = SmtpPeer()
    text = ".\n..\n.hidden\nend.\n.\n"
    async with peer, provider_for(peer) as provider:
        await provider.send(call_of(message(ANN, text=text)))
    received = message_from_bytes(peer.taken[0].content, policy=policy.default)
    assert received.get_content().replace("\r\n", "\n") == text


async def test_a_reply_of_many_lines_is_one_reply() -> None:
    peer = SmtpPeer(script={"DOT": "250-2.0.0 thank you\r\n250-2.0.0 so much\r\n250 2.0.0 bye"})
    [result] = await send_one(peer)
    assert result.outcome is Outcome.ACCEPTED
    assert result.text == "2.0.0 thank you 2.0.0 so much 2.0.0 bye"


@pytest.mark.parametrize("endless", ["x" * 100_000, "250-more\r\n" * 20_000])
async def test_a_reply_without_end_is_cut_off(endless: str) -> None:
    assert fates(await send_one(SmtpPeer(script={"MAIL": endless}))) == [
        (Outcome.DEFERRED, Cause.PROVIDER)
    ]


# What EHLO rules out


async def test_a_mail_above_the_announced_size_is_not_sent() -> None:
    peer = SmtpPeer(size=200)
    assert fates(await send_one(peer)) == [(Outcome.REJECTED, Cause.TOO_LARGE)]
    assert not any(command.startswith("MAIL") for command in peer.commands)


async def test_the_size_is_announced_where_the_server_asks_for_it() -> None:
    peer = SmtpPeer(size=0)
    await send_one(peer)
    assert peer.taken[0].parameters == f"SIZE={len(peer.taken[0].content)}"


async def test_non_ascii_addresses_need_smtputf8() -> None:
    mail = message("jürgen@example.org", ANN)
    async with SmtpPeer(smtputf8=False) as peer, provider_for(peer) as provider:
        assert (
            fates(await provider.send(call_of(mail))) == [(Outcome.REJECTED, Cause.BAD_ADDRESS)] * 2
        )
    async with SmtpPeer() as peer, provider_for(peer) as provider:
        assert {r.outcome for r in await provider.send(call_of(mail))} == {Outcome.ACCEPTED}
    assert "SMTPUTF8" in peer.taken[0].parameters
    assert peer.taken[0].recipients == ["jürgen@example.org", ANN]


async def test_a_non_ascii_bcc_is_refused_alone() -> None:
    mail = message(recipients=(Recipient(ANN), Recipient("jürgen@example.org", role=Role.BCC)))
    async with SmtpPeer(smtputf8=False) as peer, provider_for(peer) as provider:
        assert fates(await provider.send(call_of(mail))) == [
            (Outcome.ACCEPTED, Cause.UNSPECIFIED),
            (Outcome.REJECTED, Cause.BAD_ADDRESS),
        ]


@pytest.mark.parametrize(
    "address", ["a@b.org\r\nDATA", "a@b.org> NOTIFY=NEVER", "a b@c.org", "\ud800@c.org"]
)
async def test_an_address_cannot_bring_commands_of_its_own(address: str) -> None:
    mail = message(recipients=(Recipient(ANN), Recipient(address, role=Role.BCC)))
    async with SmtpPeer() as peer, provider_for(peer) as provider:
        assert fates(await provider.send(call_of(mail))) == [(Outcome.REJECTED, Cause.CONTENT)] * 2
    assert peer.commands == []


# Connecting


async def test_a_connection_is_reused() -> None:
    async with SmtpPeer() as peer, provider_for(peer) as provider:
        for _ in range(5):
            await provider.send(call_to(ANN))
    assert peer.connections == 1
    assert len(peer.taken) == 5
    assert peer.commands[-1] == "QUIT"


async def test_a_connection_closed_while_idle_is_replaced_unseen() -> None:
    async with SmtpPeer() as peer, provider_for(peer) as provider:
        await provider.send(call_to(ANN))
        await peer.drop_connections()
        assert fates(await provider.send(call_to(BOB))) == [(Outcome.ACCEPTED, Cause.UNSPECIFIED)]
    assert peer.connections == 2


@pytest.mark.parametrize("reply", [DROP, "421 4.4.2 idle for too long"])
async def test_a_reused_connection_found_dead_at_mail_is_replaced_once(reply: str) -> None:
    async with SmtpPeer() as peer, provider_for(peer) as provider:
        await provider.send(call_to(ANN))
        peer.script["MAIL"] = [reply]
        assert fates(await provider.send(call_to(BOB))) == [(Outcome.ACCEPTED, Cause.UNSPECIFIED)]
        assert peer.connections == 2
        peer.script["MAIL"] = [reply, reply]
        [result] = await provider.send(call_to(CAT))
        assert result.outcome is Outcome.DEFERRED
    assert [t.recipients for t in peer.taken] == [[ANN], [BOB]]


async def test_a_connection_serves_so_many_mails_and_no_more() -> None:
    async with SmtpPeer() as peer, provider_for(peer, max_mails=2) as provider:
        for _ in range(5):
            await provider.send(call_to(ANN))
    assert peer.connections == 3


async def test_idle_connections_are_closed_with_quit() -> None:
    async with SmtpPeer() as peer, provider_for(peer, idle_s=0.05) as provider:
        await provider.send(call_to(ANN))
        async with asyncio.timeout(3):
            while peer.open:
                await asyncio.sleep(0.01)
        assert provider.pool.idle == []
    assert peer.commands[-1] == "QUIT"


async def test_no_more_connections_than_asked_for() -> None:
    async with SmtpPeer() as peer, provider_for(peer, concurrency=3) as provider:
        await asyncio.gather(*(provider.send(call_to(ANN)) for _ in range(30)))
    assert peer.connections == 3


async def test_the_whole_attempt_is_bounded_and_waiting_for_a_connection_counts() -> None:
    peer = SmtpPeer(script={"DOT": STALL})
    async with peer, provider_for(peer, concurrency=1, timeout_s=60.0) as provider:
        provider._attempt_timeout_s = 0.5
        first = asyncio.create_task(provider.send(call_to(ANN)))
        while not peer.taken:
            await asyncio.sleep(0)
        provider._attempt_timeout_s = 0.1
        [second] = await provider.send(call_to(BOB))
        assert (second.outcome, second.cause) == (Outcome.DEFERRED, Cause.TIMEOUT)
        assert not second.of_channel  # the others are at work, and tell how it is
        assert fates(await first) == [(Outcome.UNKNOWN, Cause.TIMEOUT)]


@pytest.mark.parametrize(
    ("step", "reply", "cause"),
    [
        ("GREETING", "554 5.3.2 no service", Cause.PROVIDER),
        ("GREETING", "421 4.7.0 too many connections", Cause.RATE_LIMITED),
        ("GREETING", DROP, Cause.CONNECTION),
        ("GREETING", STALL, Cause.TIMEOUT),
        ("EHLO", "502 5.5.2 what?", Cause.PROVIDER),
        ("EHLO", DROP, Cause.CONNECTION),
        ("EHLO", STALL, Cause.TIMEOUT),
    ],
)
async def test_a_failed_handshake_defers(step: str, reply: str, cause: Cause) -> None:
    peer = SmtpPeer(script={step: reply})
    results = await send_one(peer, ANN, BOB, connect_timeout_s=0.25)
    assert fates(results) == [(Outcome.DEFERRED, cause)] * 2


@pytest.mark.parametrize("host", ["no-such-host.invalid", "no..host", "x" * 64 + ".invalid"])
async def test_a_host_that_does_not_resolve_defers(host: str) -> None:
    async with SmtpPeer() as peer, provider_for(peer, host=host) as provider:
        [result] = await provider.send(call_to(ANN))
    assert (result.outcome, result.cause) == (Outcome.DEFERRED, Cause.DNS)
    assert result.of_channel


async def test_roots_that_have_gone_defer_and_are_not_raised(tmp_path: Path) -> None:
    peer = SmtpPeer()
    [result] = await send_one(peer, tls="starttls", ca_file=tmp_path / "gone.pem")
    assert (result.outcome, result.cause) == (Outcome.DEFERRED, Cause.TLS)
    assert result.of_channel


async def test_a_name_of_this_host_that_is_none_defers_and_is_not_raised() -> None:
    [result] = await send_one(SmtpPeer(), helo="ümlaut host")
    assert (result.outcome, result.of_channel) == (Outcome.DEFERRED, True)


async def test_a_log_in() -> None:
    peer = SmtpPeer(login=("shop", "pass%word"))
    results = await send_one(peer, user="shop", password="pass%word")
    assert fates(results) == [(Outcome.ACCEPTED, Cause.UNSPECIFIED)]
    assert peer.taken[0].user == "shop"


async def test_wrong_credentials_defer_and_never_reject() -> None:
    peer = SmtpPeer(login=("shop", "right"))
    results = await send_one(peer, user="shop", password="wrong")
    assert fates(results) == [(Outcome.DEFERRED, Cause.CREDENTIALS)]
    assert results[0].status_code == 535


async def test_missing_credentials_defer_and_never_reject() -> None:
    assert fates(await send_one(SmtpPeer(login=("shop", "right")))) == [
        (Outcome.DEFERRED, Cause.CREDENTIALS)
    ]


async def test_a_server_without_log_in_defers() -> None:
    assert fates(await send_one(SmtpPeer(), user="shop", password="x")) == [
        (Outcome.DEFERRED, Cause.CREDENTIALS)
    ]


# TLS


async def test_starttls(server_tls: ssl.SSLContext, certificate: Path) -> None:
    peer = SmtpPeer(tls=server_tls)
    results = await send_one(peer, tls="starttls", ca_file=certificate, timeout_s=3.0)
    assert fates(results) == [(Outcome.ACCEPTED, Cause.UNSPECIFIED)]
    assert peer.taken[0].encrypted


async def test_tls_from_the_first_byte_and_a_large_mail(
    server_tls: ssl.SSLContext, certificate: Path
) -> None:
    peer = SmtpPeer(tls=server_tls, implicit_tls=True)
    mail = message(ANN, attachments=(Attachment("big.bin", BIG, "application/octet-stream"),))
    async with (
        peer,
        provider_for(peer, tls="implicit", ca_file=certificate, timeout_s=3.0) as provider,
    ):
        for _ in range(2):
            call = call_of(mail)
            assert fates(await provider.send(call)) == [(Outcome.ACCEPTED, Cause.UNSPECIFIED)]
    assert peer.connections == 1
    raw = render(mail, rfc_message_id=call.rfc_message_id, date=call.created_at)
    assert peer.taken[1].content == raw


async def test_starttls_required_but_not_offered_sends_nothing() -> None:
    peer = SmtpPeer(login=("shop", "secret"))
    results = await send_one(peer, tls="starttls", user="shop", password="secret")
    assert fates(results) == [(Outcome.DEFERRED, Cause.TLS)]
    assert not any(command.startswith("AUTH") for command in peer.commands)


@pytest.mark.parametrize("tls", ["starttls", "offered"])
async def test_a_certificate_that_nobody_vouches_for_sends_nothing(
    server_tls: ssl.SSLContext, tls: str
) -> None:
    peer = SmtpPeer(tls=server_tls)
    assert fates(await send_one(peer, tls=tls, timeout_s=3.0)) == [(Outcome.DEFERRED, Cause.TLS)]
    assert peer.taken == []


async def test_tls_where_offered_goes_without_where_it_is_not() -> None:
    peer = SmtpPeer()
    assert fates(await send_one(peer, tls="offered")) == [(Outcome.ACCEPTED, Cause.UNSPECIFIED)]


def test_all_of_it_works_on_uvloop(server_tls: ssl.SSLContext, certificate: Path) -> None:
    async def exchange() -> None:
        peer = SmtpPeer(tls=server_tls, script={"DOT": ["250 2.0.0 ok", DROP]})
        mail = message(ANN, attachments=(Attachment("big.bin", BIG, "application/octet-stream"),))
        async with (
            peer,
            provider_for(peer, tls="starttls", ca_file=certificate, timeout_s=3.0) as provider,
        ):
            assert fates(await provider.send(call_of(mail))) == [
                (Outcome.ACCEPTED, Cause.UNSPECIFIED)
            ]
            assert fates(await provider.send(call_to(ANN))) == [(Outcome.UNKNOWN, Cause.CONNECTION)]
            await provider.send(call_to(ANN))
            await peer.drop_connections()
            assert fates(await provider.send(call_to(ANN))) == [
                (Outcome.ACCEPTED, Cause.UNSPECIFIED)
            ]

    uvloop.run(exchange())


# The probe


async def test_the_probe_tells_what_the_server_offers() -> None:
    peer = SmtpPeer(login=("shop", "secret"))
    async with peer, provider_for(peer, user="shop", password="secret") as provider:
        line = await provider.probe()
    assert "logged in as shop" in line
    assert "PIPELINING" in line
    assert "secret" not in line


async def test_the_probe_names_what_is_wrong() -> None:
    peer = SmtpPeer(login=("shop", "secret"))
    async with peer, provider_for(peer, user="shop", password="wrong") as provider:
        with pytest.raises(ProbeFailed, match="CREDENTIALS: 535"):
            await provider.probe()
