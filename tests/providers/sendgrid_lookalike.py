"""A server on the loopback that answers POST /v3/mail/send as SendGrid documents it.

It checks each request against the documented rules (recipients, content, attachments, headers,
categories, custom_args, the bearer key) and refuses with SendGrid's form of errors, or keeps it in
a ledger. `plan` makes it misbehave: a status with headers, or SILENT (read, then say nothing),
RESET_UNREAD (close before reading the request), RESET_READ (close after it), DEAF (take nothing
off the wire), or a `Raw` answer. A plan is used up one by one. The addresses refused@, later@, silent@ and drop@ do the same for one request.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import ssl
from dataclasses import dataclass, field
from typing import Any, Self

from .smtp_peer import reset_on_close

SILENT = "silent"
RESET_UNREAD = "reset unread"
RESET_READ = "reset read"
DEAF = "deaf"

RESERVED = re.compile(
    "x-sg-id|x-sg-eid|received|dkim-signature|content-type|content-transfer-encoding"
    "|to|from|subject|reply-to|cc|bcc"
)
_ADDRESS = re.compile(r"[!-?A-~]+@[a-z0-9.-]+", re.ASCII)


@dataclass
class Planned:
    """An answer to give instead of the right one."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"errors":[{"message":"planned","field":null,"help":null}]}'


@dataclass
class Raw:
    """Bytes to say when the request has been read, what to repeat, and how to end."""

    said: bytes = b""
    repeated: bytes = b""  # every few milliseconds, as long as there is somebody
    resets: bool = False
    stays: bool = False  # neither closes nor resets
    beneath_tls: bytes = b""  # put on the socket as they are
    unread: bool = False  # say it when only the first byte has been read


class Refused(Exception):
    def __init__(self, field_path: str | None, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.field_path = field_path
        self.status = status


@dataclass
class SendGridLookalike:
    api_key: str = "SG.key"
    scopes: tuple[str, ...] = ("mail.send",)
    plan: list[Planned | Raw | str] = field(default_factory=list)
    accepted: list[dict[str, Any]] = field(default_factory=list)
    requests: int = 0
    connections: int = 0
    silences: int = 0  # how often it has begun to say nothing more
    port: int = 0
    tls: ssl.SSLContext | None = None
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stop listening and drop every connection."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False where the connection is to be closed."""
        first = await reader.readexactly(1)
        action = self.plan.pop(0) if self.plan else None
        if action == RESET_UNREAD:
            return False
        if action == DEAF:
            self.silences += 1
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(3600)
        if isinstance(action, Raw) and action.unread:
            await self._say_raw(action, writer)
            return False
        head = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request_line, *lines = head.split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.requests += 1
        if action is None and b"silent@" in body:
            action = SILENT
        if action is None and b"drop@" in body:
            action = RESET_READ
        if action is None and b"later@" in body:
            action = Planned(429, {"Retry-After": "7"})
        if action in (SILENT, RESET_READ):
            self.accepted.append(json.loads(body))
            if action == SILENT:
                self.silences += 1
                await asyncio.sleep(3600)
            return False
        if isinstance(action, Raw):
            await self._say_raw(action, writer)
            return False
        answer = (
            action if isinstance(action, Planned) else self._answer(request_line, headers, body)
        )
        answer_headers = {"Content-Length": str(len(answer.body)), **answer.headers}
        lines = [f"HTTP/1.1 {answer.status} Status"]
        lines += [f"{k}: {v}" for k, v in answer_headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + answer.body)
        await writer.drain()
        return int(answer_headers["Content-Length"]) == len(answer.body)

    async def _say_raw(self, raw: Raw, writer: asyncio.StreamWriter) -> None:
        writer.write(raw.said)
        await writer.drain()
        socket = writer.get_extra_info("socket")
        if raw.beneath_tls:
            os.write(socket.fileno(), raw.beneath_tls)
        self.silences += raw.stays
        while raw.repeated and not writer.is_closing():
            writer.write(raw.repeated)
            await asyncio.sleep(0.01)
        if raw.stays:
            await asyncio.sleep(3600)
        if raw.resets:
            reset_on_close(writer)
        else:
            writer.close()

    def _answer(self, request_line: str, headers: dict[str, str], body: bytes) -> Planned:
        try:
            if headers.get("authorization") != f"Bearer {self.api_key}":
                raise Refused(None, "The provided authorization grant is invalid", 401)
            if request_line.startswith("GET /v3/scopes "):
                return Planned(200, body=json.dumps({"scopes": self.scopes}).encode())
            if not request_line.startswith("POST /v3/mail/send "):
                raise Refused(None, "not found", 404)
            if len(body) > 31_000_000:
                raise Refused(None, "too large", 413)
            mail = json.loads(body)
            check_mail(mail)
        except Refused as refused:
            error = {"message": str(refused), "field": refused.field_path, "help": None}
            return Planned(refused.status, body=json.dumps({"errors": [error]}).encode())
        self.accepted.append(mail)
        return Planned(202, {"X-Message-Id": f"sg-{len(self.accepted)}"}, b"")


def check_mail(mail: dict[str, Any]) -> None:
    """The documented rules. Raises Refused with the path of the first field that breaks one."""
    _address("from", mail.get("from"))
    _personalizations(mail)
    if not mail.get("subject"):
        raise Refused("subject", "The subject is required.")
    _content(mail.get("content"))
    _attachments(mail.get("attachments", []))
    for name in mail.get("headers", {}):
        if not name.isascii() or RESERVED.fullmatch(name.lower()):
            raise Refused(f"headers.{name}", "The header is reserved.")
    categories = mail.get("categories", [])
    if len(categories) > 10 or len(set(categories)) < len(categories):
        raise Refused("categories", "At most 10 unique categories.")
    if any(len(category) > 255 for category in categories):
        raise Refused("categories", "A category has at most 255 characters.")
    if "reply_to" in mail and "reply_to_list" in mail:
        raise Refused("reply_to", "Either reply_to or reply_to_list.")


def _personalizations(mail: dict[str, Any]) -> None:
    personalizations = mail.get("personalizations", [])
    if not 1 <= len(personalizations) <= 1000:
        raise Refused("personalizations", "1 to 1000 personalizations.")
    seen: set[str] = set()
    for n, personalization in enumerate(personalizations):
        args = {**mail.get("custom_args", {}), **personalization.get("custom_args", {})}
        if any(not isinstance(value, str) for value in args.values()):
            raise Refused("custom_args", "Values are strings.")
        if len(json.dumps(args, ensure_ascii=False).encode()) >= 10_000:
            raise Refused("custom_args", "Less than 10000 bytes.")
        if not personalization.get("to"):
            raise Refused(f"personalizations.{n}.to", "The to array is required.")
        for m, to in enumerate(personalization["to"]):
            path = f"personalizations.{n}.to.{m}.email"
            address = _address(path, to).lower()
            if address in seen or address.startswith("refused@"):
                raise Refused(path, "Does not contain a valid address, or twice.")
            seen.add(address)


def _address(path: str, mailbox: Any) -> str:
    address = mailbox.get("email") if isinstance(mailbox, dict) else None
    if not isinstance(address, str) or not _ADDRESS.fullmatch(address):
        raise Refused(path, "Does not contain a valid address.")
    return address


def _content(content: Any) -> None:
    if not content:
        raise Refused("content", "At least one content is required.")
    types = [part["type"] for part in content]
    if types not in (["text/plain"], ["text/html"], ["text/plain", "text/html"]):
        raise Refused("content", "text/plain comes first, then text/html.")
    for n, part in enumerate(content):
        if not part["value"]:
            raise Refused(f"content.{n}.value", "At least one character in length.")


def _attachments(attachments: list[dict[str, Any]]) -> None:
    for n, attachment in enumerate(attachments):
        try:
            base64.b64decode(attachment["content"], validate=True)
        except ValueError:
            raise Refused(f"attachments.{n}.content", "Must be base64.") from None
        if not attachment.get("filename"):
            raise Refused(f"attachments.{n}.filename", "The filename is required.")
        if attachment.get("disposition") not in ("inline", "attachment"):
            raise Refused(f"attachments.{n}.disposition", "inline or attachment.")
