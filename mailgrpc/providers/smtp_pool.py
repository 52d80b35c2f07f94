"""Connections to one SMTP server: opened by aiosmtplib, kept for reuse, closed with QUIT.

aiosmtplib does what comes before the first mail: connect, greeting, EHLO, STARTTLS, AUTH. Then its
transport changes hands (`SmtpWire.take_over`), at a moment when no reply is due. Everything that
fails until then proves that nothing was sent and says nothing about the mail: DEFERRED, and of the
channel as a whole (`of_channel`), since every mail begins here.

    cannot be resolved                                    DNS
    refused, reset, no route                              CONNECTION
    no connection, greeting or answer in time             TIMEOUT
    certificate or handshake fails, STARTTLS not offered  TLS, also where `ca_file` cannot be read
    log-in refused or not offered                         CREDENTIALS
    greeting or EHLO refused                              by the reply (smtp_replies)

A connection serves one mail at a time and at most 1,000 in all (some servers and balancers wish
for an end), and is closed after 30 s without one, before servers lose patience: RFC 5321 asks
them for five minutes, many give less.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import aiosmtplib

from mailgrpc.core.delivery import Cause, Outcome, Result, result_text
from mailgrpc.providers.smtp_replies import Reply, Stage, result_of
from mailgrpc.providers.smtp_wire import SmtpWire, WireBroken

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_CONNECT_TIMEOUT_S = 10.0
_QUIT_S = 2.0
"""How long a goodbye may take; RFC 5321, 4.1.1.10 wants its answer awaited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmtpServer:
    """Where to connect and how. Times are in seconds."""

    host: str
    port: int
    tls: str = "offered"  # implicit, starttls (required), offered (STARTTLS if it is), none
    user: str = ""
    password: str = field(default="", repr=False)
    ca_file: Path | None = None
    helo: str = ""  # empty: this host's name, or its address where the name has no dot
    timeout_s: float = DEFAULT_TIMEOUT_S
    connect_timeout_s: float = DEFAULT_CONNECT_TIMEOUT_S
    idle_s: float = 30.0
    max_mails: int = 1000

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class HandshakeFailed(Exception):
    """No connection could be made; `result` is what that means for a delivery."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.text)
        self.result = result


class SmtpPool:
    """Idle connections, the last used on top. How many are in use is the provider's business."""

    def __init__(self, server: SmtpServer) -> None:
        self.server = server
        self.idle: list[SmtpWire] = []
        self._tls_context: ssl.SSLContext | None = None
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._goodbyes: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def take(self, deadline: float) -> SmtpWire:
        """An idle connection, or a fresh one. Raises HandshakeFailed."""
        while self.idle:
            wire = self.idle.pop()
            if wire.is_usable:
                return wire
            wire.abort()
        return await self.connect(deadline)

    def give_back(self, wire: SmtpWire) -> None:
        """Keep a connection whose transaction has ended, if it can serve another."""
        if self._is_closed or not wire.is_usable:
            wire.abort()
        elif wire.mails >= self.server.max_mails:
            self._say_goodbye(wire)
        else:
            wire.idle_since = asyncio.get_running_loop().time()
            self.idle.append(wire)
            self._plan_sweep()

    async def close(self) -> None:
        """End every idle connection, politely but not for long, and keep none from now on."""
        self._is_closed = True
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        while self.idle:
            self._say_goodbye(self.idle.pop())
        if self._goodbyes:
            await asyncio.wait(set(self._goodbyes))

    def _plan_sweep(self) -> None:
        if self._sweep_timer is None and self.idle:
            at = self.idle[0].idle_since + self.server.idle_s
            self._sweep_timer = asyncio.get_running_loop().call_at(at, self._sweep)

    def _sweep(self) -> None:
        """Close what has been idle for long. The bottom of the stack has waited longest."""
        self._sweep_timer = None
        expired = asyncio.get_running_loop().time() - self.server.idle_s
        while self.idle and self.idle[0].idle_since <= expired:
            self._say_goodbye(self.idle.pop(0))
        self._plan_sweep()

    def _say_goodbye(self, wire: SmtpWire) -> None:
        task = asyncio.create_task(_quit(wire))
        self._goodbyes.add(task)
        task.add_done_callback(self._goodbyes.discard)

    async def connect(self, deadline: float) -> SmtpWire:
        """A fresh connection, logged in. Raises HandshakeFailed."""
        client = None
        try:
            client = self._client()
            async with asyncio.timeout_at(deadline):
                await self._handshake(client)
            if client.transport is None:
                raise aiosmtplib.SMTPServerDisconnected("closed after the handshake")
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            _drop(client)
            raise HandshakeFailed(_failure(error)) from error
        except BaseException:
            _drop(client)
            raise
        return SmtpWire.take_over(client.transport, client.esmtp_extensions, self.server.timeout_s)

    def _client(self) -> aiosmtplib.SMTP:
        """Raises OSError where `ca_file` has gone, ValueError where this host's name is no name."""
        return aiosmtplib.SMTP(
            hostname=self.server.host,
            port=self.server.port,
            local_hostname=self.server.helo or socket.gethostname(),
            timeout=self.server.timeout_s,
            use_tls=self.server.tls == "implicit",
            start_tls=False,
            tls_context=None if self.server.tls == "none" else self._context(),
        )

    async def _handshake(self, client: aiosmtplib.SMTP) -> None:
        server = self.server
        await client.connect(timeout=server.connect_timeout_s)
        if not server.helo and "." not in socket.gethostname():
            # RFC 5321, 4.1.1.1: without a meaningful name, the address as a literal.
            sockname = client.get_transport_info("sockname")
            if not sockname:
                raise aiosmtplib.SMTPServerDisconnected("closed after the greeting")
            client.local_hostname = _address_literal(sockname)
        await client.ehlo()
        if server.tls in ("starttls", "offered"):
            if client.supports_extension("starttls"):
                await client.starttls()
                await client.ehlo()
            elif server.tls == "starttls":
                raise ssl.SSLError("STARTTLS is required and the server does not offer it")
        if server.user:
            try:
                await client.login(server.user, server.password)
            except aiosmtplib.SMTPResponseException:
                raise
            except (aiosmtplib.SMTPServerDisconnected, aiosmtplib.SMTPTimeoutError):
                raise
            except aiosmtplib.SMTPException as error:
                raise aiosmtplib.SMTPAuthenticationError(535, error.message) from error

    def _context(self) -> ssl.SSLContext:
        """Verifies certificate and name; made once, which takes 20 ms."""
        if self._tls_context is None:
            try:
                self._tls_context = ssl.create_default_context(cafile=self.server.ca_file)
            except OSError as error:
                raise ssl.SSLError(f"cannot use {self.server.ca_file}: {error}") from error
        return self._tls_context


async def _quit(wire: SmtpWire) -> None:
    try:
        wire.write(b"QUIT\r\n")
        await wire.reply(asyncio.get_running_loop().time() + _QUIT_S)
    except WireBroken:
        pass  # it is gone either way
    finally:
        wire.abort()


def _drop(client: aiosmtplib.SMTP | None) -> None:
    """End a connection at once: a goodbye by TLS would wait for a peer that may be silent."""
    if client is not None:
        if client.transport is not None:
            cast(asyncio.Transport, client.transport).abort()
        client.close()


def _address_literal(sockname: tuple[str, int]) -> str:
    address = sockname[0]
    return f"[IPv6:{address}]" if ":" in address else f"[{address}]"


def _failure(error: Exception) -> Result:
    """What a handshake that failed means; aiosmtplib keeps the root as the cause of its error."""

    def is_a(*kinds: type[BaseException]) -> bool:
        return isinstance(error, kinds) or isinstance(error.__cause__, kinds)

    if isinstance(error, aiosmtplib.SMTPAuthenticationError):
        return result_of(_reply(error), Stage.LOG_IN)
    if isinstance(error, aiosmtplib.SMTPResponseException):
        return result_of(_reply(error), Stage.HANDSHAKE)
    if is_a(ssl.SSLError):
        cause = Cause.TLS
    elif is_a(socket.gaierror, UnicodeError):  # the latter: no host has such a name
        cause = Cause.DNS
    elif is_a(TimeoutError, ConnectionAbortedError):
        cause = Cause.TIMEOUT  # the latter: how asyncio ends a handshake of TLS that takes too long
    elif is_a(OSError):
        cause = Cause.CONNECTION
    else:
        cause = Cause.PROVIDER
    text = str(error) or "no connection within the time given"
    return Result(Outcome.DEFERRED, cause, text=result_text(text), of_channel=True)


def _reply(error: aiosmtplib.SMTPResponseException) -> Reply:
    return Reply(max(error.code, 0), " ".join(error.message.split("\n")))
