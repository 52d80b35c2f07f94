"""The local inbox: an SMTP server that keeps what it is given and sends nothing on.

It takes any sender and any recipient and stores each mail once, in `mailbox`. Addresses of
`core.magic` make it misbehave, so that retries and doubts can be tried without a bad network:

    permerror    550 5.1.1 to the RCPT command
    temperror+N  451 4.3.0 to the first N tries of a mail, told by its Message-ID
    timeout      the mail is stored, and the answer never comes
    drop         the mail is stored, and the connection is closed instead of an answer

SMTP answers for a whole mail after the final dot, and the Message-ID is not known before. So a
`temperror` address defers the recipients that share its transaction too; and `timeout` and `drop`
leave all of them in doubt. That those two store the mail is the point: the sender cannot know,
and who sends again sends twice, visibly (`Envelope.answered` is false).

The tries are counted in memory and forgotten with the process; the count of one mail and address
at a time, oldest forgotten first when there are very many.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiosmtpd.smtp import SMTP, Session
from aiosmtpd.smtp import Envelope as Transaction

from mailgrpc.config import HostPort, load_settings
from mailgrpc.core.magic import Magic, MagicKind, magic_of
from mailgrpc.embedded.mailbox import Envelope, Mailbox, headers_of
from mailgrpc.errors import EmbeddedError, MailgrpcError
from mailgrpc.telemetry import notify_ready, start_logging

logger = logging.getLogger(__name__)

MAX_SIZE = 64 * 1024 * 1024
"""Bytes of a mail that SIZE announces: larger than anything a gateway with its limits makes."""

_MAX_COUNTED = 100_000
_MAX_SILENT = 200
_IDLE_S = 300.0
"""RFC 5321, 4.5.3.2: what a server owes to a silent client; and the longest `timeout`."""


class LocalInbox:
    """The server, within the running event loop: `async with LocalInbox(…) as inbox`."""

    def __init__(self, directory: Path, listen: HostPort, *, any_port: bool = False) -> None:
        """Take a directory for the mails and an address; port 0 is a free one.

        With `any_port`, a taken port means another one.
        """
        self.directory = directory
        self._listen = listen
        self._any_port = any_port
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()

    @property
    def address(self) -> HostPort:
        """Where it listens: the port that it got."""
        assert self._server is not None, "the inbox has not been started"
        return HostPort(self._listen.host, self._server.sockets[0].getsockname()[1])

    @property
    def open_connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    async def start(self) -> None:
        """Listen. Raises EmbeddedError when the address cannot be had."""
        try:
            handler = _Handler(Mailbox(self.directory))
        except OSError as error:
            raise EmbeddedError(
                f"cannot use {self.directory} for the inbox: {error.strerror};"
                " choose another --data-dir"
            ) from error
        try:
            self._server = await self._bind(handler, self._listen.port)
        except OSError as error:
            number = error.errno or 0  # negative where a host's name was not found
            why = os.strerror(number) if number > 0 else str(error)
            if not self._any_port:
                raise EmbeddedError(
                    f"the inbox cannot listen on {self._listen}: {why}; set"
                    " MAILGRPC_INBOX_SMTP_LISTEN to another address"
                ) from error
            self._server = await self._bind(handler, 0)
            logger.warning("%s: %s; listening on %s", self._listen, why, self.address)

    async def stop(self) -> None:
        """Close the port and all connections."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._connections):
            connection.hang_up()
        await self._server.wait_closed()
        self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def _bind(self, handler: _Handler, port: int) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(
            lambda: _Connection(handler, self._connections, loop), self._listen.host, port
        )


class _Connection(SMTP):
    """One client. Knows its siblings, so that the server can hang up on all of them."""

    def __init__(
        self, handler: _Handler, siblings: set[_Connection], loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(
            handler,
            data_size_limit=MAX_SIZE,
            enable_SMTPUTF8=True,
            hostname="inbox.mailgrpc",  # else a look-up of our own name, which may block
            ident="mailgrpc local inbox",
            timeout=_IDLE_S,
            loop=loop,
        )
        self._siblings = siblings

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._siblings.add(self)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._siblings.discard(self)
        super().connection_lost(error)

    def hang_up(self) -> None:
        if self.transport is not None:
            self.transport.close()


class _Handler:
    """What aiosmtpd asks: one handler for all connections."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._tries: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._silent = 0

    async def handle_EHLO(  # noqa: N802  aiosmtpd finds it by its name
        self,
        _server: _Connection,
        session: Session,
        _envelope: Transaction,
        hostname: str,
        responses: list[str],
    ) -> list[str]:
        session.host_name = hostname
        # Commands are read one by one from a buffer, which is all that pipelining asks (RFC 2920).
        return [*responses[:-1], "250-ENHANCEDSTATUSCODES", "250-PIPELINING", responses[-1]]

    async def handle_RCPT(  # noqa: N802
        self,
        _server: _Connection,
        _session: Session,
        envelope: Transaction,
        address: str,
        _options: list[str],
    ) -> str:
        magic = magic_of(address)
        if magic is not None and magic.kind is MagicKind.PERMERROR:
            return "550 5.1.1 No such mailbox here (permerror)"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 OK"

    async def handle_DATA(  # noqa: N802
        self, server: _Connection, session: Session, envelope: Transaction
    ) -> str:
        content = envelope.content
        assert isinstance(content, bytes)
        magics = [magic for magic in map(magic_of, envelope.rcpt_tos) if magic]
        if self._refuses_for_now(content, envelope.rcpt_tos):
            return "451 4.3.0 Not now (temperror)"
        kinds = {magic.kind for magic in magics}
        misbehaves = bool(kinds & {MagicKind.TIMEOUT, MagicKind.DROP})
        stored = Envelope(
            mail_from="" if envelope.mail_from == "<>" else envelope.mail_from or "",
            rcpt_tos=tuple(envelope.rcpt_tos),
            helo=session.host_name or "",
            smtputf8=bool(envelope.smtp_utf8),
            answered=not misbehaves,
        )
        try:
            mail_id = await asyncio.to_thread(self._mailbox.add, content, stored)
        except OSError as error:
            logger.error("a mail could not be stored: %s", error)
            return "452 4.3.1 The inbox cannot store the mail"
        if misbehaves:
            envelope.content = envelope.original_content = None
            await self._never_answer(server, hang_up=MagicKind.DROP in kinds)
        return f"250 2.0.0 Stored as {mail_id}"

    def _refuses_for_now(self, content: bytes, rcpt_tos: list[str]) -> bool:
        """Count this try of each `temperror` address, and say whether one of them still fails."""
        wanted = {
            address.lower(): magic
            for address in rcpt_tos
            if (magic := magic_of(address)) and magic.kind is MagicKind.TEMPERROR
        }
        if not wanted:
            return False
        message_id = headers_of(content).get("message-id", "")
        failing = [self._fails(message_id, *item) for item in wanted.items()]  # counts each
        return any(failing)

    def _fails(self, message_id: str, address: str, magic: Magic) -> bool:
        key = (message_id, address)
        tries = self._tries.pop(key, 0) + 1
        self._tries[key] = tries
        if len(self._tries) > _MAX_COUNTED:
            self._tries.popitem(last=False)
        return magic.times is None or tries <= magic.times

    async def _never_answer(self, server: _Connection, *, hang_up: bool) -> None:
        """Wait for the end of the connection, which cancels this.

        The client ends it when it gives up; aiosmtpd does after `_IDLE_S`; and when very many
        wait, the next does not.
        """
        self._silent += 1
        try:
            if hang_up or self._silent > _MAX_SILENT:
                server.hang_up()
            await asyncio.Event().wait()
        finally:
            self._silent -= 1


async def _serve(any_port: bool) -> None:
    settings = load_settings()
    start_logging(settings.log_format, settings.log_level, for_people=settings.under_up)
    logging.getLogger("mail.log").setLevel(logging.WARNING)  # aiosmtpd, a line a command
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    directory = settings.data_dir / "inbox"
    async with LocalInbox(directory, settings.inbox_smtp_listen, any_port=any_port) as inbox:
        notify_ready(settings.ready_fd, str(inbox.address))
        await ended.wait()


def main(arguments: list[str] | None = None) -> None:
    """`python -m mailgrpc.embedded.inbox`: the inbox as a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m mailgrpc.embedded.inbox", description=__doc__)
    parser.add_argument("--any-port", action="store_true", help="take another port if it is taken")
    options: Any = parser.parse_args(arguments)
    try:
        asyncio.run(_serve(options.any_port))
    except MailgrpcError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
