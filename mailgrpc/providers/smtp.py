"""Mail by SMTP, to a relay that takes it from here (a submission server, a smarthost).

    smtp://user:password@host:587?tls=starttls
    smtps://user:password@host

What is promised. A call is one transaction on one connection of a pool: one MAIL FROM, a RCPT TO
for each addressee, one DATA. Recipients refused alone are REJECTED or DEFERRED alone, the others
get the mail. Every failure before the final dot is proof that nothing was sent; after it only the
server's answer is (`smtp_session.py`). The server's words become outcome and cause by one table
(`smtp_replies.py`). Connecting and logging in never end a mail: they defer it, as a failure of the
channel as a whole (`smtp_pool.py`).

What can go wrong, beyond that:

    announced SIZE smaller than the mail               REJECTED   TOO_LARGE    nothing was sent
    non-ASCII address, the server has no SMTPUTF8      REJECTED   BAD_ADDRESS  (sender: SENDER)
    a message that cannot be rendered                  REJECTED   CONTENT
    an idle connection turns out dead at MAIL FROM     a fresh one, once
    no free connection within the time of the attempt  DEFERRED   TIMEOUT
    the task is cancelled                              the connection is dropped

That no connection was free is not of the channel: all of them are at work on other mails, whose own
results tell how it is. It says how much is asked of us, and a pause would not make that less.

Where the worker has another call waiting, its mail is begun behind this one's dot (`SendCall.following`):
one write and one answer less for each mail, which is what a small one costs most. It is done on connections
whose last answer came quickly, and for a while no more where a server does not bear it.

SMTPUTF8 (RFC 6531): where an address in the header or the sender's is not ASCII, nobody can get
this mail here, since changing the header is not ours. Where only a recipient in Bcc is not, that
one is refused and the others get the mail. There is no down-grade of a mailbox name.

Why this way. aiosmtplib opens connections well but sends step by step, and does not tell on which
side of the final dot a failure was; see docs/decisions/0003-smtp-transaction.md.

The URL

    smtp://     port 25, or 587 with a user. TLS by `tls`:
                  starttls   required, else DEFERRED TLS
                  none       never; the password goes in the clear, because you said so
                  not given  with a user as `starttls`, without one STARTTLS where offered;
                             to the loopback as `none`
    smtps://    TLS from the first byte, port 465
    ca_file     PEM roots to trust instead of the system's; certificates are always verified
    helo        the name to greet with; default: this host's, or its address where that has no dot
    timeout     seconds for the answer to each command (60; RFC 5321, 4.5.3.2 would have minutes)
    connect_timeout   seconds to connect and be greeted (10)
"""

from __future__ import annotations

import asyncio
import functools
import logging
import uuid
from collections.abc import Sequence

from mailgrpc.core.delivery import Cause, Outcome, Result
from mailgrpc.core.message import MailMessage
from mailgrpc.core.mime import needs_smtputf8, render
from mailgrpc.core.value import value
from mailgrpc.errors import Violation
from mailgrpc.providers.channel_url import (
    ChannelUrl,
    choice,
    existing_file,
    is_loopback,
    seconds,
)
from mailgrpc.providers.provider import Grouping, ProbeFailed, SendCall, everyone
from mailgrpc.providers.smtp_pool import (
    DEFAULT_CONNECT_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    HandshakeFailed,
    SmtpPool,
    SmtpServer,
)
from mailgrpc.providers.smtp_session import Envelope, Mail, Stale, transact
from mailgrpc.providers.smtp_wire import SmtpWire

log = logging.getLogger(__name__)

_QUICK_S = 0.1
"""Where the last answer to a dot took longer, no other mail is begun behind the next one."""
_BEGIN_NONE_S = 600.0
_ANSWER_SHARE = 0.25
"""Of the attempt's time, for the answer to the dot at the least (RFC 5321, 4.5.3.2.6, has ten
minutes): who leaves before it is in doubt."""


class SmtpProvider:
    """A pool of connections to one server. Serves one event loop."""

    name = "smtp"
    grouping = Grouping.ENVELOPE
    group_max = 100  # RFC 5321, 4.5.3.1.8: every server takes as many

    def __init__(self, server: SmtpServer, *, concurrency: int, attempt_timeout_s: float) -> None:
        self.server = server
        self.pool = SmtpPool(server)
        self._slots = asyncio.Semaphore(concurrency)
        self._attempt_timeout_s = attempt_timeout_s
        self._begun: dict[uuid.UUID, _Begun] = {}  # by the call_id
        self._begins_at = float("-inf")

    @classmethod
    def from_url(cls, url: ChannelUrl, concurrency: int, attempt_timeout_s: float) -> SmtpProvider:
        """The provider for an smtp:// or smtps:// URL. Raises SettingsError."""
        if not url.host:
            raise url.fault(f"{url.scheme}:// needs a host")
        if url.password and not url.user:
            raise url.fault("a password without a user")
        server = SmtpServer(
            host=url.host,
            port=url.port or _default_port(url),
            tls=_tls(url),
            user=url.user,
            password=url.password,
            ca_file=url.parameter("ca_file", existing_file, None),
            helo=url.parameter("helo", _host_name, ""),
            timeout_s=url.parameter("timeout", seconds, DEFAULT_TIMEOUT_S),
            connect_timeout_s=url.parameter("connect_timeout", seconds, DEFAULT_CONNECT_TIMEOUT_S),
        )
        url.finish()
        return cls(server, concurrency=concurrency, attempt_timeout_s=attempt_timeout_s)

    def check(self, message: MailMessage) -> list[Violation]:  # noqa: ARG002  as Provider
        """Nothing: what a server cannot carry is known when it has greeted."""
        return []

    async def send(self, call: SendCall) -> list[Result]:
        """One transaction. See the module for what each failure becomes."""
        deadline = asyncio.get_running_loop().time() + self._attempt_timeout_s
        begun = self._begun.pop(call.call_id, None)
        if begun is not None and begun.is_ready:  # the slot of the mail before is its slot
            return await self._send(begun.mail, deadline, begun)
        if begun is not None:
            self._begin_again(begun)
        try:
            mail = begun.mail if begun else _rendered(call)
        except ValueError as error:
            return everyone(call, Result(Outcome.REJECTED, Cause.CONTENT, text=str(error)))
        try:
            if self._slots.locked():
                async with asyncio.timeout_at(deadline):
                    await self._slots.acquire()
            else:
                await self._slots.acquire()  # waits for nothing that would have to be timed
        except TimeoutError:
            text = "no connection was free within the time of the attempt"
            return everyone(call, Result(Outcome.DEFERRED, Cause.TIMEOUT, text=text))
        return await self._send(mail, deadline)

    async def _send(
        self, mail: _Rendered, deadline: float, begun: _Begun | None = None
    ) -> list[Result]:
        """Send it in a slot, which is free afterwards, or that of the mail begun behind this one."""
        passed_on = False
        try:
            wire = begun.wire if begun else await self.pool.take(deadline)
            stale: Stale | None = None
            try:
                try:
                    results = await self._transact(wire, mail, deadline, begun)
                except Stale as error:
                    stale = error
                    wire = await self.pool.connect(deadline)
                    results = await self._transact(wire, mail, deadline)
            except BaseException:
                wire.begun = None  # the slot is given back here
                wire.abort()
                raise
            if begun is not None and _is_blamed(stale, results):
                self._begin_none()
            passed_on = self._pass_on(wire, results)
            if not passed_on:
                self.pool.give_back(wire)
        except HandshakeFailed as failed:
            return everyone(mail.call, failed.result)
        finally:
            if not passed_on:
                self._slots.release()
        return results

    async def _transact(
        self, wire: SmtpWire, mail: _Rendered, deadline: float, begun: _Begun | None = None
    ) -> list[Result]:
        """The transaction, for those recipients to whom this server can carry this mail."""
        refusals, fitted = ([], begun.fitted) if begun else _fitted(wire, mail)
        if fitted is None:
            return [refusal for refusal in refusals if refusal is not None]
        wire.is_held = True
        results = await transact(
            wire,
            fitted,
            mail.call.last_look,
            deadline,
            self._attempt_timeout_s * _ANSWER_SHARE,
            functools.partial(self._begin, wire, mail.call),
        )
        if not any(refusals):
            return results
        rest = iter(results)
        return [refusal or next(rest) for refusal in refusals]

    def _begin(self, wire: SmtpWire, call: SendCall) -> Mail | None:
        """The mail to begin behind that of `call`, if there is one for which it is worth it."""
        if not wire.pipelines or wire.answer_s > _QUICK_S or wire.mails >= self.server.max_mails:
            return None
        if asyncio.get_running_loop().time() < self._begins_at:
            return None
        try:
            following = call.following()
            if following is None:
                return None
            mail = _rendered(following)
            refusals, fitted = _fitted(wire, mail)
        except Exception:  # noqa: BLE001  its own turn tells; the mail before has nothing to do with it
            return None
        if fitted is None or any(refusals):
            return None
        self._begun[following.call_id] = _Begun(mail, wire, fitted)
        return fitted

    def _pass_on(self, wire: SmtpWire, results: Sequence[Result]) -> bool:
        """Leave the wire, and the slot, to the mail that was begun behind the one with these results.

        Whether there is one, and the connection still stands.
        """
        if wire.begun is None:
            return False
        if not wire.is_alive:
            wire.begun = None
            if any(result.outcome is Outcome.UNKNOWN for result in results):
                self._begin_none()
            return False
        wire.is_held = False
        return True

    def _begin_again(self, begun: _Begun) -> None:
        """Have a mail that was to be begun behind another begin by itself."""
        if begun.wire.begun is begun.fitted:  # its turn came before the other has its answer
            begun.wire.begun = None  # the connection ends with that one
            self._begin_none()

    def _begin_none(self) -> None:
        """Let mails wait for their turn for a while."""
        self._begins_at = asyncio.get_running_loop().time() + _BEGIN_NONE_S
        log.info("%s does not bear mails that are begun behind others, or not now", self.server)

    async def probe(self) -> str:
        """Connect and log in, without a mail."""
        deadline = asyncio.get_running_loop().time() + self._attempt_timeout_s
        try:
            wire = await self.pool.connect(deadline)
        except HandshakeFailed as failed:
            result = failed.result
            code = f"{result.status_code} " if result.status_code else ""
            raise ProbeFailed(f"{self.server}: {result.cause.name}: {code}{result.text}") from None
        self.pool.give_back(wire)
        user = f", logged in as {self.server.user}" if self.server.user else ""
        offers = " ".join(sorted(wire.extensions)).upper()
        return f"{self.server}: ready, {wire.security}{user}; offers {offers}"

    async def close(self) -> None:
        """QUIT on the idle connections; those in use are the business of their tasks."""
        for begun in self._begun.values():  # its task will not come any more
            begun.wire.abort()
        await self.pool.close()


@value
class _Rendered:
    """The mail of a call, as any server might be given it."""

    call: SendCall
    envelope: Envelope
    content: bytes


@value
class _Begun:
    """A mail whose envelope was to go out behind the dot of another."""

    mail: _Rendered
    wire: SmtpWire
    fitted: Mail

    @property
    def is_ready(self) -> bool:
        """Whether it did, and nobody else is at work on the connection any more."""
        return self.wire.begun is self.fitted and not self.wire.is_held


def _is_blamed(stale: Stale | None, results: Sequence[Result]) -> bool:
    """Whether it was for being begun behind another that a mail came to this.

    Not where the server limits the mails of a connection (421), nor where it refuses this mail alone too.
    """
    if stale is None:
        return any(r.outcome is Outcome.DEFERRED and r.cause is Cause.TIMEOUT for r in results)
    if stale.reply is None:
        return True
    return stale.reply.code != 421 and any(r.outcome is Outcome.ACCEPTED for r in results)


def _rendered(call: SendCall) -> _Rendered:
    """Raises ValueError for what cannot be said in MIME or SMTP."""
    content = render(call.message, rfc_message_id=call.rfc_message_id, date=call.created_at)
    if call.message.sender is None:
        raise ValueError("a mail needs a sender")
    recipients = [a.recipient.address for a in call.addressees]
    return _Rendered(call, Envelope(call.message.sender.address, recipients), content)


def _fitted(wire: SmtpWire, mail: _Rendered) -> tuple[Sequence[Result | None], Mail | None]:
    """A refusal or None for each addressee, and the mail to the others as this server takes it."""
    refusals = _refusals(wire, mail.call, len(mail.content))
    envelope = mail.envelope
    if any(refusals):
        recipients = [r for r, no in zip(envelope.recipients, refusals, strict=True) if no is None]
        if not recipients:
            return refusals, None
        envelope = Envelope(envelope.sender, recipients)
    parameters = f" SIZE={len(mail.content)}" if "size" in wire.extensions else ""
    if needs_smtputf8(mail.call.message) or not all(map(str.isascii, envelope.recipients)):
        parameters += " BODY=8BITMIME SMTPUTF8"
    return refusals, Mail(envelope.commands(parameters), mail.content)


def _refusals(wire: SmtpWire, call: SendCall, size: int) -> list[Result | None]:
    """What this server's EHLO rules out, for each addressee."""
    if 0 < wire.most_bytes < size:
        text = f"the mail has {size} bytes, the server takes {wire.most_bytes}"
        return [Result(Outcome.REJECTED, Cause.TOO_LARGE, text=text)] * len(call.addressees)
    if "smtputf8" in wire.extensions:
        return [None] * len(call.addressees)
    sender = call.message.sender
    text = "the server does not offer SMTPUTF8, which a non-ASCII address needs"
    if sender is not None and not sender.address.isascii():
        return [Result(Outcome.REJECTED, Cause.SENDER, text=text)] * len(call.addressees)
    refusal = Result(Outcome.REJECTED, Cause.BAD_ADDRESS, text=text)
    if needs_smtputf8(call.message):
        return [refusal] * len(call.addressees)
    return [
        None if addressee.recipient.address.isascii() else refusal for addressee in call.addressees
    ]


def _default_port(url: ChannelUrl) -> int:
    if url.scheme == "smtps":
        return 465
    return 587 if url.user else 25


def _tls(url: ChannelUrl) -> str:
    """How the connection is secured. A password never goes in the clear unasked."""
    if url.scheme == "smtps":
        return "implicit"
    given = url.parameter("tls", choice("starttls", "none"), "")
    if given:
        return given
    if is_loopback(url.host):
        return "none"
    return "starttls" if url.user else "offered"


def _host_name(text: str) -> str:
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("expected a host name")
    return text
