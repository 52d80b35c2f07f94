"""What the tests of the phases share: calls that have to end, and peers that are not there."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mailgrpc.core.delivery import Result
from mailgrpc.core.message import Attachment, MailMessage
from mailgrpc.providers.provider import Provider, SendCall

from .calls import call_of, message
from .sendgrid_lookalike import SendGridLookalike
from .smtp_peer import SmtpPeer

ANN, BOB = "ann@example.org", "bob@example.org"
SHORT_S = 0.25  # a time-out that the test waits for
LONG_S = 10.0  # one that it does not


def told(result: Result) -> str:
    """Outcome and cause in words, with a star where it is the channel as a whole."""
    star = "*" if result.of_channel else ""
    return f"{result.outcome.name} {result.cause.name}{star}"


def big() -> MailMessage:
    """More than the kernel takes for a peer that does not read."""
    return message(ANN, attachments=(Attachment("big.bin", b"x" * 9_000_000, "image/png"),))


async def send(provider: Provider, call: SendCall) -> str:
    """What a call came to, the same for all. A call that does not end fails."""
    async with asyncio.timeout(LONG_S):
        results = await provider.send(call)
    [one] = {told(result) for result in results}
    return one


@contextmanager
def listener(*, full: bool = False) -> Iterator[int]:
    """A port where nobody accepts. `full`: nor does the kernel, as with a host that is gone."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0 if full else 8)
        port = server.getsockname()[1]
        callers = [socket.socket() for _ in range(4 if full else 0)]
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(("127.0.0.1", port))
        try:
            yield port
        finally:
            for caller in callers:
                caller.close()


async def cancel_when_silent(
    provider: Provider, peer: SmtpPeer | SendGridLookalike, mail: MailMessage
) -> None:
    """Begin a call, and cancel it when the peer has left it waiting."""
    task = asyncio.create_task(provider.send(call_of(mail)))
    async with asyncio.timeout(LONG_S):
        while not peer.silences:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
