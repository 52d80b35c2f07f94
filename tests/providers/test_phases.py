"""SMTP: each phase of a call, broken in each way, by a real peer: what is proven then, what is not.

The tables say, for a phase and what the peer does in it: outcome, cause, and whether it is the
channel as a whole (a star). Every call ends within its own time-outs, keeps no connection that is
out of step, and the next mail goes through.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from mailgrpc.core.message import MailMessage
from mailgrpc.providers import smtp_session
from mailgrpc.providers.smtp import SmtpProvider
from mailgrpc.providers.smtp_pool import SmtpServer
from mailgrpc.providers.smtp_replies import Reply

from .calls import call_of, call_to, message
from .phases import ANN, BOB, LONG_S, SHORT_S, big, cancel_when_silent, listener, send, told
from .smtp_peer import CLOSE, DEAF, DRIP, RESET, STALL, SmtpPeer, then

GARBAGE = "hello there"
TWO_CODES = "250-2.0.0 yes\r\n550 5.0.0 no"
LATER, NEVER, LEAVING = "451 4.3.0 not now", "554 5.3.0 no", "421 4.3.2 leaving"
LOOSE = {CLOSE: "CONNECTION", RESET: "CONNECTION", STALL: "TIMEOUT", DRIP: "TIMEOUT"}


def smtp_to(port: int, *, attempt_timeout_s: float = LONG_S, **server: Any) -> SmtpProvider:
    settings = {"host": "127.0.0.1", "port": port, "tls": "none", "timeout_s": LONG_S, **server}
    return SmtpProvider(SmtpServer(**settings), concurrency=2, attempt_timeout_s=attempt_timeout_s)


@asynccontextmanager
async def smtp(peer: SmtpPeer, **settings: Any) -> AsyncIterator[SmtpProvider]:
    async with peer:
        provider = smtp_to(peer.port, **settings)
        try:
            yield provider
        finally:
            await provider.close()


async def test_smtp_to_a_port_where_nobody_listens() -> None:
    with listener() as port:
        pass
    assert await send(smtp_to(port), call_to(ANN, BOB)) == "DEFERRED CONNECTION*"


@pytest.mark.parametrize("full", [True, False])
async def test_smtp_to_a_host_that_is_silent_from_the_first_packet(full: bool) -> None:
    with listener(full=full) as port:
        provider = smtp_to(port, connect_timeout_s=SHORT_S)
        assert await send(provider, call_to(ANN, BOB)) == "DEFERRED TIMEOUT*"


HANDSHAKE = [
    *[
        (phase, way, f"DEFERRED {cause}*")
        for phase in ("GREETING", "EHLO", "STARTTLS", "AUTH")
        for way, cause in {**LOOSE, GARBAGE: "PROVIDER", LATER: "PROVIDER"}.items()
    ],
    *[
        (phase, way, "DEFERRED PROVIDER*")
        for phase in ("GREETING", "EHLO", "STARTTLS")
        for way in (NEVER, TWO_CODES, LEAVING)
    ],
    ("AUTH", NEVER, "DEFERRED CREDENTIALS*"),
    ("AUTH", LEAVING, "DEFERRED PROVIDER*"),
    ("AUTH", "535 5.7.8 wrong password", "DEFERRED CREDENTIALS*"),
]


@pytest.mark.parametrize(("phase", "way", "expected"), HANDSHAKE)
async def test_smtp_handshake(
    phase: str, way: str, expected: str, server_tls: ssl.SSLContext, certificate: Path
) -> None:
    timeout_s = SHORT_S if way in (STALL, DRIP) else LONG_S
    peer = SmtpPeer(tls=server_tls, login=("shop", "secret"), script={phase: way})
    login = {"tls": "starttls", "ca_file": certificate, "user": "shop", "password": "secret"}
    times = {"timeout_s": timeout_s, "connect_timeout_s": timeout_s}
    if phase == "AUTH":  # the handshake of TLS before it needs its time
        times = {"timeout_s": max(timeout_s, 4 * SHORT_S)}
    async with smtp(peer, **login, **times) as provider:
        assert await send(provider, call_to(ANN, BOB)) == expected
        assert provider.pool.idle == []
        peer.script.clear()
        provider.server = provider.pool.server = smtp_to(peer.port, **login).server
        assert await send(provider, call_to(ANN, BOB)) == "ACCEPTED UNSPECIFIED"
    assert len(peer.taken) == 1


OPENING = [
    (phase, way, f"{outcome}{'*' if way == LEAVING else ''}")
    for phase in ("MAIL", "RCPT", "DATA")
    for way, outcome in {
        **{loose: f"DEFERRED {cause}" for loose, cause in LOOSE.items()},
        GARBAGE: "DEFERRED PROVIDER",
        TWO_CODES: "DEFERRED PROVIDER",
        f"{GARBAGE}\r\n250 ok": "DEFERRED PROVIDER",
        "250 ok" if phase == "DATA" else "354 go on": "DEFERRED PROVIDER",
        LATER: "DEFERRED PROVIDER",
        NEVER: "REJECTED PROVIDER",
        LEAVING: "DEFERRED PROVIDER",
    }.items()
]
REFUSED_AND_LEFT = [
    (phase, then(NEVER, way), "REJECTED PROVIDER")
    for phase in ("MAIL", "DATA")
    for way in (CLOSE, RESET)
]
DOT = [
    *[("DOT", way, f"UNKNOWN {cause}") for way, cause in LOOSE.items()],
    ("DOT", GARBAGE, "UNKNOWN PROVIDER"),
    ("DOT", TWO_CODES, "UNKNOWN PROVIDER"),
    ("DOT", "250-2.0.0 yes\r\n251 2.0.0 and yes", "UNKNOWN PROVIDER"),
    ("DOT", f"{GARBAGE}\r\n250 2.0.0 ok", "UNKNOWN PROVIDER"),
    ("DOT", "354 go on", "UNKNOWN PROVIDER"),
    ("DOT", "250-2.0.0 half of", "UNKNOWN TIMEOUT"),
    ("DOT", then("250-2.0.0 half of", CLOSE), "UNKNOWN CONNECTION"),
    ("DOT", LATER, "DEFERRED PROVIDER"),
    ("DOT", NEVER, "REJECTED PROVIDER"),
    ("DOT", LEAVING, "DEFERRED PROVIDER"),
    ("DOT", then("250 2.0.0 ok", CLOSE), "ACCEPTED UNSPECIFIED"),
    ("DOT", then("250 2.0.0 ok", RESET), "ACCEPTED UNSPECIFIED"),
    ("DOT", "250 2.0.0 ok\r\n421 4.3.2 leaving", "ACCEPTED UNSPECIFIED"),
    ("DOT", then(NEVER, CLOSE), "REJECTED PROVIDER"),
    ("DOT", then(LATER, RESET), "DEFERRED PROVIDER"),
]


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize(("phase", "way", "expected"), [*OPENING, *REFUSED_AND_LEFT, *DOT])
async def test_smtp_transaction(phase: str, way: str, expected: str, pipelining: bool) -> None:
    timeout_s = SHORT_S if "TIMEOUT" in expected else LONG_S
    peer = SmtpPeer(pipelining=pipelining, script={phase: way})
    async with smtp(peer, timeout_s=timeout_s) as provider:
        assert await send(provider, call_to(ANN, BOB)) == expected
        if way not in (LATER, NEVER):
            await asyncio.sleep(0.01)  # what the server says too much arrives
            assert not any(wire.is_usable for wire in provider.pool.idle)
        if phase != "DOT":
            assert peer.taken == []
        peer.script.clear()
        assert await send(provider, call_to(BOB)) == "ACCEPTED UNSPECIFIED"


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize("way", [CLOSE, RESET])
async def test_smtp_a_refused_recipient_stands_when_the_server_leaves_behind_it(
    way: str, pipelining: bool
) -> None:
    peer = SmtpPeer(pipelining=pipelining, script={f"RCPT {ANN}": then(NEVER, way)})
    async with smtp(peer) as provider:
        results = await provider.send(call_to(ANN, BOB))
        assert [told(r) for r in results] == ["REJECTED PROVIDER", "DEFERRED CONNECTION"]


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (CLOSE, "DEFERRED CONNECTION"),
        (RESET, "DEFERRED CONNECTION"),
        (DEAF, "DEFERRED TIMEOUT"),
        (GARBAGE, "DEFERRED PROVIDER"),
        (TWO_CODES, "DEFERRED PROVIDER"),
        ("250 2.0.0 taken before it came", "DEFERRED PROVIDER"),
        (LATER, "DEFERRED PROVIDER"),
        ("552 5.3.4 too big", "REJECTED TOO_LARGE"),
        (LEAVING, "DEFERRED PROVIDER"),
    ],
)
async def test_smtp_in_the_middle_of_the_content(way: str, expected: str) -> None:
    peer = SmtpPeer(early=way)
    async with smtp(peer, timeout_s=2 * SHORT_S if way == DEAF else LONG_S) as provider:
        assert await send(provider, call_of(big())) == expected
        assert provider.pool.idle == []
        peer.early = ""
        assert await send(provider, call_to(BOB)) == "ACCEPTED UNSPECIFIED"
    assert [mail.recipients for mail in peer.taken] == [[BOB]]


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        ("GREETING", "DEFERRED TIMEOUT*"),
        ("EHLO", "DEFERRED TIMEOUT*"),
        ("MAIL", "DEFERRED TIMEOUT"),
        ("RCPT", "DEFERRED TIMEOUT"),
        ("DATA", "DEFERRED TIMEOUT"),
        ("DOT", "UNKNOWN TIMEOUT"),
    ],
)
async def test_smtp_when_the_time_of_the_attempt_ends(phase: str, expected: str) -> None:
    """No single answer is late, as far as the time for each goes."""
    peer = SmtpPeer(pipelining=False, script={phase: DRIP})
    async with smtp(peer, attempt_timeout_s=SHORT_S, connect_timeout_s=LONG_S) as provider:
        assert await send(provider, call_to(ANN)) == expected
    assert len(peer.taken) == (phase == "DOT")


async def test_smtp_when_the_time_of_the_attempt_ends_within_the_content() -> None:
    peer = SmtpPeer(early=DEAF)
    async with smtp(peer, attempt_timeout_s=4 * SHORT_S) as provider:
        assert await send(provider, call_of(big())) == "DEFERRED TIMEOUT"


async def test_smtp_does_not_begin_the_dot_when_no_time_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(content: bytes) -> bytes:
        time.sleep(2 * SHORT_S)
        return content

    peer = SmtpPeer()
    async with smtp(peer, attempt_timeout_s=SHORT_S) as provider:
        monkeypatch.setattr(smtp_session, "_dot_stuffed", slow)
        assert await send(provider, call_to(ANN)) == "DEFERRED TIMEOUT"
    assert peer.taken == []


async def test_smtp_refused_by_all_and_silent_at_the_reset_keeps_the_verdicts() -> None:
    peer = SmtpPeer(script={"RCPT": "550 5.1.1 unknown", "RSET": STALL})
    async with smtp(peer, timeout_s=SHORT_S) as provider:
        assert await send(provider, call_to(ANN, BOB)) == "REJECTED BAD_ADDRESS"
        assert provider.pool.idle == []


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize(
    ("phase", "way", "expected"),
    [
        ("MAIL", CLOSE, "DEFERRED CONNECTION"),
        ("DATA", RESET, "DEFERRED CONNECTION"),
        ("DOT", CLOSE, "UNKNOWN CONNECTION"),  # by a close_notify
        ("DOT", RESET, "UNKNOWN CONNECTION"),
        ("DOT", STALL, "UNKNOWN TIMEOUT"),
        ("DOT", TWO_CODES, "UNKNOWN PROVIDER"),
        ("DOT", then("250 2.0.0 ok", CLOSE), "ACCEPTED UNSPECIFIED"),
        ("DOT", then("250 2.0.0 ok", RESET), "ACCEPTED UNSPECIFIED"),
    ],
)
def test_smtp_under_tls(
    run: Callable[[Any], None],
    phase: str,
    way: str,
    expected: str,
    server_tls: ssl.SSLContext,
    certificate: Path,
) -> None:
    async def exchange() -> None:
        peer = SmtpPeer(tls=server_tls, implicit_tls=True, script={phase: way})
        timeout_s = 4 * SHORT_S if way == STALL else LONG_S
        async with smtp(peer, tls="implicit", ca_file=certificate, timeout_s=timeout_s) as provider:
            assert await send(provider, call_to(ANN)) == expected
            peer.script.clear()
            assert await send(provider, call_to(ANN)) == "ACCEPTED UNSPECIFIED"

    run(exchange())


@pytest.mark.parametrize(
    ("greeting", "expected"),
    [(STALL, "TIMEOUT"), (GARBAGE, "TLS"), (CLOSE, "CONNECTION"), (RESET, "CONNECTION")],
)
async def test_smtp_to_a_peer_that_speaks_no_tls(greeting: str, expected: str) -> None:
    times = {"connect_timeout_s": SHORT_S if greeting == STALL else LONG_S}
    async with smtp(SmtpPeer(script={"GREETING": greeting}), tls="implicit", **times) as provider:
        assert await send(provider, call_to(ANN)) == f"DEFERRED {expected}*"


@pytest.mark.parametrize(
    ("phase", "mail"),
    [
        *[(phase, message(ANN)) for phase in ("GREETING", "EHLO", "MAIL", "RCPT", "DATA", "DOT")],
        ("early", big()),
        ("RSET", message("refused@example.org")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_smtp_cancelled_in_any_phase_drops_its_connection(
    phase: str, mail: MailMessage
) -> None:
    peer = SmtpPeer(script={phase: STALL}, early=DEAF if phase == "early" else "")
    async with smtp(peer) as provider:
        await cancel_when_silent(provider, peer, mail)
        assert provider.pool.idle == []
        async with asyncio.timeout(LONG_S):
            while phase != "early" and peer.open:  # who is deaf does not hear us hang up
                await asyncio.sleep(0.01)
        peer.script.clear()
        peer.early = ""
        assert await send(provider, call_to(ANN)) == "ACCEPTED UNSPECIFIED"


class _OpenWire:
    """One on which a transaction has come to its content; says until when an answer is awaited."""

    has_reply = False
    until = 0.0

    def write(self, data: bytes, replies: int = 1) -> None:
        pass

    def raise_if_broken(self) -> None:
        pass

    async def reply(self, deadline: float) -> Reply:
        self.until = deadline
        return Reply(250, "taken")


@pytest.mark.parametrize("left_s", [5.0, 500.0])
async def test_smtp_gives_the_answer_to_the_dot_a_time_of_its_own(left_s: float) -> None:
    """However much of the attempt the content took: to leave at once would be to be in doubt."""
    wire = _OpenWire()
    deadline = asyncio.get_running_loop().time() + left_s
    await smtp_session._send_content(
        wire, b"x\r\n", lambda: True, deadline, 100.0, smtp_session.nothing
    )  # type: ignore[arg-type]
    assert wire.until >= deadline + 95.0 if left_s == 5.0 else wire.until == deadline
