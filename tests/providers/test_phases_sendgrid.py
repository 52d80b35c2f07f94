"""SendGrid: each phase of a request, broken in each way, by a real peer. See `test_phases.py`."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from mailgrpc.core.message import MailMessage
from mailgrpc.providers.sendgrid import SendGridProvider

from .calls import call_of, call_to, message
from .phases import ANN, BOB, LONG_S, SHORT_S, big, cancel_when_silent, listener, send
from .sendgrid_lookalike import DEAF, RESET_UNREAD, SILENT, Planned, Raw, SendGridLookalike
from .smtp_peer import CLOSE, RESET, STALL, SmtpPeer

TAKEN = b"HTTP/1.1 202 Accepted\r\nX-Message-Id: m1\r\n"
CUT = TAKEN + b"Content-Length: 900\r\n\r\n"  # a body that will not come
GONE = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 900\r\n\r\n"
WRONG = b"HTTP/1.1 413 Too Large\r\nContent-Length: 900\r\n\r\n"
BUSY = b"HTTP/1.1 429 Too Many\r\nRetry-After: 7\r\nContent-Length: 900\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def sendgrid_to(port: int, scheme: str = "http", **settings: Any) -> SendGridProvider:
    defaults = {
        "base_url": f"{scheme}://127.0.0.1:{port}",
        "api_key": "SG.key",
        "concurrency": 2,
        "attempt_timeout_s": LONG_S,
        "timeout_s": LONG_S,
        "connect_timeout_s": LONG_S,
    }
    return SendGridProvider(**{**defaults, **settings})


@asynccontextmanager
async def sendgrid(
    peer: SendGridLookalike | SmtpPeer, scheme: str = "http", **settings: Any
) -> AsyncIterator[SendGridProvider]:
    async with peer:
        provider = sendgrid_to(peer.port, scheme, **settings)
        try:
            yield provider
        finally:
            await provider.close()


# Before the first byte


async def test_sendgrid_at_a_port_where_nobody_listens() -> None:
    with listener() as port:
        pass
    assert await send(sendgrid_to(port), call_to(ANN, BOB)) == "DEFERRED CONNECTION*"


@pytest.mark.parametrize("limit", ["connect_timeout_s", "attempt_timeout_s"])
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_sendgrid_at_a_host_that_is_silent_from_the_first_packet(
    scheme: str, limit: str
) -> None:
    with listener(full=True) as port:
        provider = sendgrid_to(port, scheme, **{limit: SHORT_S})
        assert await send(provider, call_to(ANN, BOB)) == "DEFERRED TIMEOUT*"


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 64 + ".invalid"])
async def test_sendgrid_at_a_host_without_an_address(host: str) -> None:
    provider = sendgrid_to(0, base_url=f"https://{host}")
    assert await send(provider, call_to(ANN, BOB)) == "DEFERRED DNS*"


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (STALL, ["TIMEOUT"]),
        (CLOSE, ["TLS", "CONNECTION"]),
        (RESET, ["TLS", "CONNECTION"]),
        ("hello there", ["TLS"]),
    ],
)
async def test_sendgrid_at_a_peer_that_speaks_no_tls(way: str, expected: list[str]) -> None:
    times = {"connect_timeout_s": SHORT_S if way == STALL else LONG_S}
    async with sendgrid(SmtpPeer(script={"GREETING": way}), "https", **times) as provider:
        fate = await send(provider, call_to(ANN, BOB))
    assert fate in [f"DEFERRED {cause}*" for cause in expected]


# After it


AFTER: list[tuple[Planned | Raw | str, str]] = [
    (DEAF, "UNKNOWN TIMEOUT"),
    (SILENT, "UNKNOWN TIMEOUT"),
    (RESET_UNREAD, "UNKNOWN CONNECTION"),
    (Raw(), "UNKNOWN CONNECTION"),
    (Raw(resets=True), "UNKNOWN CONNECTION"),
    (Raw(b"hello there\r\n\r\n", stays=True), "UNKNOWN PROVIDER"),
    (Raw(b"250 2.0.0 ok\r\n", stays=True), "UNKNOWN TIMEOUT"),  # may become a header yet
    (Raw(b"x" * 200_000, stays=True), "UNKNOWN PROVIDER"),
    # Within the header
    (Raw(TAKEN), "UNKNOWN CONNECTION"),
    (Raw(TAKEN, resets=True), "UNKNOWN CONNECTION"),
    (Raw(TAKEN, stays=True), "UNKNOWN TIMEOUT"),
    (Raw(TAKEN, repeated=b"X-More: 1\r\n"), "UNKNOWN TIMEOUT"),
    # 1xx
    (Raw(CONTINUE + TAKEN + b"Content-Length: 0\r\n\r\n"), "ACCEPTED UNSPECIFIED"),
    (Raw(CONTINUE), "UNKNOWN CONNECTION"),
    (Raw(CONTINUE, stays=True), "UNKNOWN TIMEOUT"),
    (Raw(repeated=CONTINUE), "UNKNOWN TIMEOUT"),
    (Raw(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), "UNKNOWN PROVIDER"),
    # Behind the header
    *[(Raw(CUT, resets=resets), "ACCEPTED UNSPECIFIED") for resets in (True, False)],
    *[(Raw(GONE, resets=resets), "DEFERRED CREDENTIALS*") for resets in (True, False)],
    *[(Raw(WRONG, resets=resets), "REJECTED TOO_LARGE") for resets in (True, False)],
    *[(Raw(BUSY, resets=resets), "DEFERRED RATE_LIMITED*") for resets in (True, False)],
    (Raw(CUT, stays=True), "ACCEPTED UNSPECIFIED"),
    (Raw(GONE, stays=True), "DEFERRED CREDENTIALS*"),
    (Raw(CUT, repeated=b"."), "ACCEPTED UNSPECIFIED"),
    (Raw(TAKEN + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), "ACCEPTED UNSPECIFIED"),
    (
        Raw(TAKEN + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope"),
        "ACCEPTED UNSPECIFIED",
    ),
]


def limits(way: Planned | Raw | str) -> list[str]:
    """Which times end the waiting: for one answer, for the whole attempt."""
    if isinstance(way, Raw) and way.repeated:
        return ["attempt_timeout_s"]  # no single read waits for long
    if way in (DEAF, SILENT) or (isinstance(way, Raw) and way.stays):
        return ["timeout_s", "attempt_timeout_s"]
    return ["none"]


@pytest.mark.parametrize(
    ("way", "expected", "limit"),
    [(way, expected, limit) for way, expected in AFTER for limit in limits(way)],
    ids=lambda value: str(value)[:60],
)
async def test_sendgrid_request(way: Planned | Raw | str, expected: str, limit: str) -> None:
    times = {limit: 2 * SHORT_S} if limit != "none" else {}
    mail = message(ANN)
    if way == DEAF:
        mail = big()
        times[limit] *= 4  # building such a request takes its time too
    peer = SendGridLookalike(plan=[way])
    async with sendgrid(peer, **times) as provider:
        assert await send(provider, call_of(mail)) == expected
        assert await send(provider, call_to(BOB)) == "ACCEPTED UNSPECIFIED"
    assert peer.connections == 2


@pytest.mark.parametrize("resets", [True, False])
async def test_sendgrid_refusing_a_large_request_before_its_end(resets: bool) -> None:
    """Its answer may be lost in the reset; never is it taken for proof that there was none."""
    peer = SendGridLookalike(plan=[Raw(WRONG, resets=resets, unread=True)])
    async with sendgrid(peer) as provider:
        fate = await send(provider, call_of(big()))
    assert fate in ("REJECTED TOO_LARGE", "UNKNOWN CONNECTION")


async def test_sendgrid_on_a_kept_connection_that_dies_with_the_request_on_it() -> None:
    """Whether the request was read nobody knows here, however likely it is that it was not."""
    peer = SendGridLookalike()
    async with sendgrid(peer) as provider:
        assert await send(provider, call_to(ANN)) == "ACCEPTED UNSPECIFIED"
        peer.plan.append(RESET_UNREAD)
        assert await send(provider, call_to(ANN)) == "UNKNOWN CONNECTION"


async def test_sendgrid_does_not_begin_a_request_when_no_time_is_left() -> None:
    """After a 400 for all, one by one: what was not begun in time is provably not sent."""
    peer = SendGridLookalike(plan=[Planned(400), SILENT])
    async with sendgrid(peer, attempt_timeout_s=2 * SHORT_S) as provider:
        async with asyncio.timeout(LONG_S):
            results = await provider.send(call_to(ANN, BOB, "cat@example.org"))
    assert [(r.outcome.name, r.cause.name) for r in results] == [
        ("UNKNOWN", "TIMEOUT"),
        ("DEFERRED", "TIMEOUT"),
        ("DEFERRED", "TIMEOUT"),
    ]
    assert not any(r.of_channel for r in results)
    assert peer.requests == 2


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (Raw(), "UNKNOWN CONNECTION"),  # a close_notify and no answer
        (Raw(resets=True), "UNKNOWN CONNECTION"),
        (Raw(beneath_tls=b"hello there" * 20, stays=True), "UNKNOWN TLS"),
        (Raw(CUT), "ACCEPTED UNSPECIFIED"),
        (Raw(CUT, resets=True), "ACCEPTED UNSPECIFIED"),
        (Raw(CUT, beneath_tls=b"hello there" * 20, stays=True), "ACCEPTED UNSPECIFIED"),
    ],
)
def test_sendgrid_under_tls(
    run: Callable[[Any], None],
    way: Raw,
    expected: str,
    server_tls: ssl.SSLContext,
    certificate: Path,
) -> None:
    async def exchange() -> None:
        peer = SendGridLookalike(plan=[way], tls=server_tls)
        async with sendgrid(peer, "https", ca_file=str(certificate)) as provider:
            assert await send(provider, call_to(ANN)) == expected
            assert await send(provider, call_to(ANN)) == "ACCEPTED UNSPECIFIED"

    run(exchange())


@pytest.mark.parametrize(
    ("way", "mail"),
    [(SILENT, message(ANN)), (DEAF, big()), (Raw(CUT, stays=True), message(ANN))],
    ids=["silent", "deaf", "body"],
)
async def test_sendgrid_cancelled_in_any_phase_drops_its_connection(
    way: Raw | str, mail: MailMessage
) -> None:
    peer = SendGridLookalike(plan=[way])
    async with sendgrid(peer) as provider:
        await cancel_when_silent(provider, peer, mail)
        assert await send(provider, call_to(BOB)) == "ACCEPTED UNSPECIFIED"
    assert peer.connections == 2
