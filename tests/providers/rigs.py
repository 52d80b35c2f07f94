"""A provider and its test peer, behind one face, for the suite that runs over all providers.

Each rig knows an address for every fate. The names are roles, the peers give them meaning.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email import message_from_bytes, policy
from typing import Protocol

from mailgrpc.providers.capture import CaptureProvider
from mailgrpc.providers.provider import Provider
from mailgrpc.providers.sendgrid import SendGridProvider
from mailgrpc.providers.smtp import SmtpProvider
from mailgrpc.providers.smtp_pool import SmtpServer

from .sendgrid_lookalike import Planned, SendGridLookalike
from .smtp_peer import SmtpPeer

ATTEMPT_S = 3.0
ANSWER_S = 0.25
"""How long the providers under test wait for an answer."""


@dataclass(frozen=True)
class Received:
    """One mail as the peer took it, whether or not it could say so."""

    recipients: tuple[str, ...]
    message_id: str


class Rig(Protocol):
    @property
    def provider(self) -> Provider: ...

    refused: str
    later: str
    silent: str
    drop: str
    has_network: bool

    def received(self) -> list[Received]: ...

    def idle_connections(self) -> int: ...

    async def vanish(self) -> None:
        """Make the peer refuse connections."""

    def lock_out(self) -> None:
        """Make the peer refuse our credentials from now on."""

    def be_busy(self) -> None:
        """Make the peer refuse the next call for being asked too much, whatever the mail."""


class SmtpRig:
    refused, later = "refused@example.org", "later@example.org"
    silent, drop = "silent@example.org", "drop@example.org"
    has_network = True

    def __init__(self, peer: SmtpPeer) -> None:
        self.peer = peer
        self.provider = SmtpProvider(
            SmtpServer(host="127.0.0.1", port=peer.port, tls="none", timeout_s=ANSWER_S),
            concurrency=2,
            attempt_timeout_s=ATTEMPT_S,
        )

    def received(self) -> list[Received]:
        return [Received(tuple(t.recipients), _message_id(t.content)) for t in self.peer.taken]

    def idle_connections(self) -> int:
        return len(self.provider.pool.idle)

    async def vanish(self) -> None:
        await self.peer.stop()

    def lock_out(self) -> None:
        self.peer.login = ("somebody", "else")

    def be_busy(self) -> None:
        self.peer.script["GREETING"] = ["421 4.7.0 too many connections"]


class SendGridRig:
    refused, later = "refused@example.org", "later@example.org"
    silent, drop = "silent@example.org", "drop@example.org"
    has_network = True

    def __init__(self, peer: SendGridLookalike) -> None:
        self.peer = peer
        self.provider = SendGridProvider(
            base_url=f"http://127.0.0.1:{peer.port}",
            api_key=peer.api_key,
            concurrency=2,
            attempt_timeout_s=ATTEMPT_S,
            timeout_s=ANSWER_S,
        )

    def received(self) -> list[Received]:
        return [
            Received(
                tuple(p["to"][0]["email"] for p in mail["personalizations"]),
                mail["headers"]["Message-ID"],
            )
            for mail in self.peer.accepted
        ]

    def idle_connections(self) -> int:
        pool = self.provider._client._transport._pool  # type: ignore[attr-defined]
        return sum(connection.is_idle() for connection in pool.connections)

    async def vanish(self) -> None:
        await self.peer.stop()

    def lock_out(self) -> None:
        self.peer.api_key = "SG.another"

    def be_busy(self) -> None:
        self.peer.plan.append(Planned(429))


class CaptureRig:
    refused, later = "permerror@example.test", "temperror+1@example.test"
    silent, drop = "timeout@example.test", "drop@example.test"
    has_network = False

    def __init__(self) -> None:
        self.provider = CaptureProvider()

    def received(self) -> list[Received]:
        return [
            Received(tuple(r.address for r in kept.recipients), _message_id(kept.raw))
            for kept in self.provider.outbox
        ]

    def idle_connections(self) -> int:
        return 0

    async def vanish(self) -> None:
        raise NotImplementedError

    def lock_out(self) -> None:
        raise NotImplementedError

    def be_busy(self) -> None:
        raise NotImplementedError


@asynccontextmanager
async def open_rig(kind: str) -> AsyncIterator[Rig]:
    """The rig for a provider; `smtp-stepwise` is SMTP to a server that does not pipeline."""
    if kind == "capture":
        yield CaptureRig()
    elif kind == "sendgrid":
        async with SendGridLookalike() as lookalike:
            sendgrid = SendGridRig(lookalike)
            yield sendgrid
            await sendgrid.provider.close()
    else:
        async with SmtpPeer(pipelining=kind == "smtp") as smtp_peer:
            smtp = SmtpRig(smtp_peer)
            yield smtp
            await smtp.provider.close()


def _message_id(raw: bytes) -> str:
    return str(message_from_bytes(raw, policy=policy.default)["Message-ID"])
