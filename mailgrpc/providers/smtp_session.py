"""One mail over one SMTP connection: the transaction.

What is promised. Each recipient gets one Result, and it is right about the one question that
matters: could the mail have been taken? The final dot (RFC 5321, 4.1.1.4) divides the two halves.

    until the dot is written   every failure proves that nothing was taken: DEFERRED or REJECTED
    after it                   only the server's own answer proves anything; silence is UNKNOWN

The last look is asked right before the write that holds the dot. A small mail goes out whole in
that write. Of a large one all but the end goes first, and is flushed before the look, so that no
buffer of ours keeps the dot back after it (under TLS the socket's own 64 KiB may).

The envelope of the next mail may go out behind the dot, in the same write (RFC 2920, 3.1, names this
very case), where somebody has one ready and the server pipelines. It gives nothing of the next mail
away: until that one's own dot nothing was taken of it, and where its MAIL is refused, or the connection
lost over it, it begins again on another connection. A server that refuses content before it has read it
may take the rest for commands: the first it would answer is a line of a header, and that is no MAIL. What
nobody can tell is whether a server leaves out its answer to the dot altogether: the answer to the next
MAIL is taken for it then.

What can go wrong.
- Recipients are refused one by one: the mail goes on to the others.
- The server pipelines (RFC 2920), so DATA has been said before the answers to RCPT TO are read,
  and is accepted although no recipient is left. RFC 2920 lets the client send a lone dot then; we
  drop the connection instead. A dot could deliver an empty mail on a server that is out of step.
- The server answers while the content is still being written (too large, shutting down): before
  the dot that is a refusal, and the connection is dropped.
- 421 at any time: the server is leaving. Who has no answer yet is deferred; what has been answered
  stands, a refused MAIL FROM for all.
- The server talks out of turn, endlessly, or not SMTP: the connection is broken, nothing else. A
  3yz where none belongs, or a 2yz to DATA: it is out of step, and what it would take the next line
  for is anybody's guess. The connection is dropped.
- An idle connection was closed by the server, or its log-in has lapsed: seen at the answer to MAIL
  FROM, as Stale. Nothing was given yet, so the caller takes a fresh connection and begins again,
  once.
- The time of the attempt is over when the dot would be due: it is not written any more. Once it is
  written, its answer has a time of its own.

421 is about the channel as a whole on a fresh connection only, and only while nobody was refused
here. Servers end connections that have served for long with it, and those of clients with too many
errors (Postfix: `421 4.7.0 too many errors`): a mail with many bad recipients would stop all
others. A connection that is lost, or silent, after the handshake is no such sign either, since
a mail may be what breaks the server. If it is the channel, the next connection tells.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from mailgrpc import failpoints
from mailgrpc.core.delivery import Cause, Outcome, Result
from mailgrpc.core.value import value
from mailgrpc.providers.provider import worker_lost
from mailgrpc.providers.smtp_replies import Reply, Stage, result_of
from mailgrpc.providers.smtp_wire import SmtpWire, WireBroken

_WHOLE = 64 * 1024  # content up to this size goes out in one write, after the look
_TAIL = 1024  # of larger content, what is kept back for the write with the dot

_PATH = re.compile(r"""(?:"[^\x00-\x1f\x7f]*"|[^\x00-\x20\x7f<>"]+)@[^\x00-\x20\x7f<>"]+""")
"""No line breaks, and no `>` that would let an address bring parameters of its own."""


class Stale(Exception):
    """A connection used before is of no use for this mail, of which the server took in nothing.

    `reply` is what it said to MAIL; None: the connection was lost.
    """

    def __init__(self, reply: Reply | None = None) -> None:
        super().__init__("the connection was lost" if reply is None else reply.text)
        self.reply = reply


@value
class Mail:
    """A mail as one server is given it: MAIL, its RCPTs and DATA as lines, and the content.

    `content` ends in CRLF, without the dot.
    """

    commands: Sequence[bytes]
    content: bytes


def nothing() -> Mail | None:
    """That no mail is ready."""
    return None


@value
class Envelope:
    """Who sends to whom."""

    sender: str
    recipients: Sequence[str]

    def __post_init__(self) -> None:
        for address in (self.sender, *self.recipients):
            if not _PATH.fullmatch(address):
                raise ValueError("an address holds what cannot stand in an SMTP command")
            address.encode()  # a lone surrogate cannot: UnicodeEncodeError, a ValueError

    def commands(self, parameters: str) -> list[bytes]:
        """The lines from MAIL to DATA. Parameters (" SIZE=…") have their blank before."""
        lines = [f"MAIL FROM:<{self.sender}>{parameters}\r\n".encode()]
        lines += [f"RCPT TO:<{address}>\r\n".encode() for address in self.recipients]
        lines.append(b"DATA\r\n")
        return lines


class _Ended(Exception):
    """The transaction is over before the dot: `result` is for all that have none of their own."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.text)
        self.result = result


async def transact(
    wire: SmtpWire,
    mail: Mail,
    last_look: Callable[[], bool],
    deadline: float,
    answer_s: float,
    following: Callable[[], Mail | None] = nothing,
) -> list[Result]:
    """Send one mail. One Result a recipient, in their order.

    `deadline` (a time of the loop) bounds the whole, but for the answer to the dot, which is awaited
    for `answer_s` at the least. `following` is asked right before the dot for the mail to begin
    behind it, and must not raise. Raises Stale alone. Afterwards the wire is ready for the next mail, or for that which
    was begun and no other (`wire.begun`), or no longer usable.
    """
    verdicts: list[Result | None] = [None] * (len(mail.commands) - 2)
    is_reused = wire.mails > 0
    wire.mails += 1
    try:
        await _open(wire, mail, verdicts, is_reused, deadline)
        result = await _send_content(wire, mail.content, last_look, deadline, answer_s, following)
    except _Ended as ended:
        result = ended.result
        if is_reused or any(verdicts):
            result = replace(result, of_channel=False)  # see the module
    except WireBroken as broken:
        result = Result(Outcome.DEFERRED, broken.cause, text=broken.text)
    return [verdict or result for verdict in verdicts]


async def _open(
    wire: SmtpWire,
    mail: Mail,
    verdicts: list[Result | None],
    is_reused: bool,
    deadline: float,
) -> None:
    """MAIL, RCPT and DATA, until the server waits for content. Raises _Ended, WireBroken, Stale."""
    pipelines = wire.pipelines
    first = await _first_reply(wire, mail, is_reused, deadline)
    commands = [b""] * len(mail.commands) if pipelines else mail.commands
    if not first.is_positive:
        for_all = result_of(first, Stage.MAIL)
        verdicts[:] = [for_all] * len(verdicts)
        if for_all.of_channel:
            wire.abort()  # a later log-in may fare better, this one will not
        if for_all.of_channel or not pipelines:
            await _end(wire, for_all, deadline)
    for index, command in enumerate(commands[1:-1]):
        reply = await _ask(wire, command, Stage.RCPT, deadline)
        if not reply.is_positive:
            verdicts[index] = verdicts[index] or result_of(reply, Stage.RCPT)
    refusal = verdicts[-1] if all(verdicts) else None
    if refusal is not None and not pipelines:
        await _end(wire, refusal, deadline)
    data = await _ask(wire, commands[-1], Stage.DATA, deadline)
    if data.code == 354 and refusal is None:
        return
    if data.code < 400:
        wire.abort()  # see the module: a lone dot might deliver an empty mail
    await _end(wire, refusal or result_of(data, Stage.DATA), deadline)


async def _first_reply(wire: SmtpWire, mail: Mail, is_reused: bool, deadline: float) -> Reply:
    """The answer to MAIL, which goes out now if it was not begun before. Raises Stale too."""
    is_begun, wire.begun = wire.begun is mail, None
    try:
        if is_begun:
            wire.raise_if_broken()
        elif wire.pipelines:
            wire.write(b"".join(mail.commands), len(mail.commands))
        else:
            wire.write(mail.commands[0])
        reply = await wire.reply(deadline)
    except WireBroken as broken:
        lost = broken.cause is Cause.CONNECTION or (is_begun and broken.cause is Cause.PROVIDER)
        if is_reused and lost:
            raise Stale from broken
        raise
    if not reply.is_positive and (
        is_begun or (is_reused and (reply.code == 421 or result_of(reply, Stage.MAIL).of_channel))
    ):
        wire.abort()
        raise Stale(reply)
    return _unless_leaving(wire, reply, Stage.MAIL)


async def _ask(wire: SmtpWire, command: bytes, stage: Stage, deadline: float) -> Reply:
    """The answer to a command; an empty one has been written before."""
    if command:
        wire.write(command)
    return _unless_leaving(wire, await wire.reply(deadline), stage)


def _unless_leaving(wire: SmtpWire, reply: Reply, stage: Stage) -> Reply:
    """The reply; but 421 and what is out of step end it for all that have no answer yet."""
    if reply.code == 421 or (300 <= reply.code < 400 and stage is not Stage.DATA):
        wire.abort()
        raise _Ended(result_of(reply, stage))
    return reply


async def _end(wire: SmtpWire, result: Result, deadline: float) -> None:
    """End a transaction before its content, and make the wire fit for the next one."""
    try:
        wire.write(b"RSET\r\n")
        if (await wire.reply(deadline)).code != 250:
            wire.abort()
    except WireBroken:
        pass  # the verdicts stand; the pool sees that the wire is of no use
    raise _Ended(result)


async def _send_content(
    wire: SmtpWire,
    content: bytes,
    last_look: Callable[[], bool],
    deadline: float,
    answer_s: float,
    following: Callable[[], Mail | None],
) -> Result:
    """The content, the look, the dot, the answer. Raises _Ended and WireBroken before the dot."""
    failpoints.reach("smtp.content")
    stuffed = _dot_stuffed(content)
    wire.write(b"", replies=1)  # from here on the server may refuse at any time
    if len(stuffed) > _WHOLE:
        await wire.flush(memoryview(stuffed)[:-_TAIL], deadline)
        stuffed = stuffed[-_TAIL:]
    if wire.has_reply:
        early = await wire.reply(deadline)
        wire.abort()
        # With the content under way it may be about this mail: never the channel's.
        raise _Ended(replace(result_of(early, Stage.DATA), of_channel=False))
    wire.raise_if_broken()
    upcoming = following()
    clock = asyncio.get_running_loop().time
    dotted_at = clock()
    if dotted_at >= deadline:
        wire.abort()
        text = "the time of the attempt was over before the mail could be ended"
        raise _Ended(Result(Outcome.DEFERRED, Cause.TIMEOUT, text=text))
    if not last_look():
        wire.abort()  # ends the mail without the dot, which is the only way to take it back
        raise _Ended(worker_lost())

    failpoints.reach("smtp.dot")
    if upcoming is None:
        wire.write(stuffed + b".\r\n", replies=0)
    else:
        wire.write(b"".join((stuffed, b".\r\n", *upcoming.commands)), len(upcoming.commands))
        wire.begun = upcoming
    failpoints.reach("smtp.dotted")
    try:
        # However little of the attempt is left: to hang up now would be to be in doubt.
        reply = await wire.reply(max(deadline, dotted_at + answer_s))
    except WireBroken as broken:
        return Result(Outcome.UNKNOWN, broken.cause, text=broken.text)
    failpoints.reach("smtp.answered")
    wire.answer_s = clock() - dotted_at
    if reply.code == 421 or 300 <= reply.code < 400:
        wire.abort()
    return result_of(reply, Stage.CONTENT)


def _dot_stuffed(content: bytes) -> bytes:
    """RFC 5321, 4.5.2: a dot that begins a line is doubled."""
    if content.startswith(b"."):
        content = b"." + content
    if b"\r\n." in content:
        return content.replace(b"\r\n.", b"\r\n..")
    return content
