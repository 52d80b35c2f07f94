"""What an SMTP reply means: outcome and cause.

The first digit decides the outcome (RFC 5321, 4.2.1): 2yz accepted, 4yz may be tried again, 5yz
pointless. The cause comes from the enhanced code (RFC 3463 and the IANA registry "SMTP Enhanced
Status Codes"), where there is one, else from the basic code and the command that it answers.

    x.1.1-4, x.1.6, x.1.10     BAD_ADDRESS   destination mailbox or system
    x.1.7, x.1.8               SENDER        the sender's address
    5.2.0, 5.2.1               BAD_ADDRESS   mailbox disabled
    x.2.2                      MAILBOX_FULL
    x.2.3, x.3.4               TOO_LARGE
    x.3.*, x.5.*, x.2.4        PROVIDER      their system, or the protocol
    x.4.1, x.4.2               CONNECTION    the server's own next hop
    x.4.3, x.4.4, x.4.6        DNS           routing
    x.4.5, x.5.3               RATE_LIMITED  congestion; too many recipients at once
    x.6.*                      CONTENT       x.6.7, x.6.9, x.6.10 (RFC 6531): BAD_ADDRESS
    4.7.*, 4.2.0, 4.2.1        RATE_LIMITED  greylisting and rates: waiting helps
    5.7.*                      POLICY        to MAIL FROM: SENDER
    x.7.8, x.7.9, x.7.11-13    CREDENTIALS   always DEFERRED: the channel is wrong, not the mail
    x.7.10                     TLS           likewise
    x.7.20-27                  SENDER        DKIM, SPF, DMARC, reverse DNS (RFC 7372), null MX
    x.7.28                     RATE_LIMITED

Three replies are not what their first digit says. 530, 534, 535 and 538 (RFC 4954, 3207) are about
our log-in or TLS, whatever the mail: DEFERRED. 552 to RCPT TO without an enhanced code is to be
read as 452 (RFC 5321, 4.5.3.1.10). A positive reply of the wrong kind after the final dot is no
proof of anything: UNKNOWN.

A reply is about the channel as a whole (`of_channel`, always with DEFERRED) where it comes before
any mail was spoken of, or says that no mail would fare better:

    any refusal of greeting, EHLO or AUTH
    MAIL FROM refused for our log-in or TLS    not RCPT TO: some servers ask it for some domains only
    421 before the content                     the service is leaving (RFC 5321, 3.8), unless its
                                               enhanced code is about an address, the sender, the
                                               content, or too many recipients (4.5.3)

After the content has begun no reply is: it may be about this mail. What else speaks against it is
known to the transaction alone (`smtp_session.py`).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping

from mailgrpc.core.delivery import Cause, Outcome, Result, result_text
from mailgrpc.core.value import value

_ENHANCED = re.compile(r"([245])\.(\d{1,3})\.(\d{1,3})(?= |$)")  # RFC 2034
_QUEUED_AS = re.compile(r"\b(?:queued as |id=)([!-~]{1,128})", re.IGNORECASE)  # Postfix; Exim


class Stage(enum.Enum):
    """The command that a reply answers."""

    HANDSHAKE = "greeting or EHLO"
    LOG_IN = "AUTH"
    MAIL = "MAIL FROM"
    RCPT = "RCPT TO"
    DATA = "DATA"
    CONTENT = "the final dot"


@value
class Reply:
    """One reply, its lines joined by blanks."""

    code: int
    text: str

    @property
    def is_positive(self) -> bool:
        """Whether the command was carried out."""
        return 200 <= self.code < 300

    @property
    def enhanced_code(self) -> str:
        """The RFC 3463 code that the text begins with, or nothing."""
        match = _ENHANCED.match(self.text)
        return match[0] if match and match[1] == str(self.code)[0] else ""


_BY_ENHANCED: Mapping[tuple[int, int | None], Cause] = {
    (1, None): Cause.BAD_ADDRESS,
    (1, 7): Cause.SENDER,
    (1, 8): Cause.SENDER,
    (1, 9): Cause.PROVIDER,
    (2, None): Cause.BAD_ADDRESS,
    (2, 2): Cause.MAILBOX_FULL,
    (2, 3): Cause.TOO_LARGE,
    (2, 4): Cause.PROVIDER,
    (3, None): Cause.PROVIDER,
    (3, 4): Cause.TOO_LARGE,
    (4, None): Cause.CONNECTION,
    (4, 3): Cause.DNS,
    (4, 4): Cause.DNS,
    (4, 5): Cause.RATE_LIMITED,
    (4, 6): Cause.DNS,
    (5, None): Cause.PROVIDER,
    (5, 3): Cause.RATE_LIMITED,
    (6, None): Cause.CONTENT,
    (6, 7): Cause.BAD_ADDRESS,
    (6, 9): Cause.BAD_ADDRESS,
    (6, 10): Cause.BAD_ADDRESS,
    (7, None): Cause.POLICY,
    (7, 8): Cause.CREDENTIALS,
    (7, 9): Cause.CREDENTIALS,
    (7, 10): Cause.TLS,
    (7, 11): Cause.CREDENTIALS,
    (7, 12): Cause.CREDENTIALS,
    (7, 13): Cause.CREDENTIALS,
    **{(7, detail): Cause.SENDER for detail in range(20, 28)},
    (7, 28): Cause.RATE_LIMITED,
}

_BY_CODE: Mapping[tuple[int, Stage | None], Cause] = {
    (421, None): Cause.RATE_LIMITED,  # shutting down, or too many connections: waiting helps
    (450, None): Cause.RATE_LIMITED,  # how greylisting answers
    (451, None): Cause.PROVIDER,
    (452, None): Cause.PROVIDER,  # insufficient storage
    (452, Stage.RCPT): Cause.RATE_LIMITED,  # too many recipients (RFC 5321, 4.5.3.1.10)
    (550, Stage.RCPT): Cause.BAD_ADDRESS,
    (551, Stage.RCPT): Cause.BAD_ADDRESS,
    (553, Stage.RCPT): Cause.BAD_ADDRESS,
    (501, Stage.RCPT): Cause.BAD_ADDRESS,
    (556, Stage.RCPT): Cause.BAD_ADDRESS,  # RFC 7504
    (552, Stage.RCPT): Cause.MAILBOX_FULL,
    (554, Stage.RCPT): Cause.POLICY,
    (552, Stage.MAIL): Cause.TOO_LARGE,
    (501, Stage.MAIL): Cause.SENDER,
    (550, Stage.MAIL): Cause.SENDER,
    (553, Stage.MAIL): Cause.SENDER,
    (554, Stage.MAIL): Cause.POLICY,
    (552, None): Cause.TOO_LARGE,
    (550, Stage.CONTENT): Cause.CONTENT,
    (554, Stage.CONTENT): Cause.CONTENT,
    (554, Stage.DATA): Cause.POLICY,
}

_LOG_IN_CODES = frozenset({530, 534, 535, 538})

_ABOUT_THE_MAIL = re.compile(r"4\.(?:[126]\.\d+|3\.4|5\.3|7\.2[0-7])")
"""Enhanced codes about an address, a mailbox, the content, its size, how many recipients it has, or
who its sender says to be."""


def result_of(reply: Reply, stage: Stage) -> Result:
    """What `reply` means for the recipients that it is about."""
    if stage is Stage.CONTENT and reply.is_positive:
        return Result(
            Outcome.ACCEPTED,
            status_code=reply.code,
            enhanced_code=reply.enhanced_code,
            text=result_text(reply.text),
            provider_message_id=queue_id(reply),
        )
    cause = _cause(reply, stage)
    return Result(
        _outcome(reply, stage, cause),
        cause,
        status_code=reply.code,
        enhanced_code=reply.enhanced_code,
        text=result_text(reply.text),
        of_channel=_is_of_channel(reply, stage, cause),
    )


def queue_id(reply: Reply) -> str:
    """The id that the server gave the mail, where it tells one the usual way."""
    match = _QUEUED_AS.search(reply.text)
    return match[1].rstrip(".,;)") if match else ""


def _outcome(reply: Reply, stage: Stage, cause: Cause) -> Outcome:
    if reply.code < 400:
        return Outcome.UNKNOWN if stage is Stage.CONTENT else Outcome.DEFERRED
    if reply.code < 500 or cause in (Cause.CREDENTIALS, Cause.TLS):
        return Outcome.DEFERRED
    if stage in (Stage.HANDSHAKE, Stage.LOG_IN):
        return Outcome.DEFERRED  # the channel is refused, not this mail
    if stage is Stage.RCPT and (reply.code == 552 and not reply.enhanced_code):
        return Outcome.DEFERRED
    if cause is Cause.RATE_LIMITED:  # 5.5.3: the same recipients in smaller groups may pass
        return Outcome.DEFERRED
    return Outcome.REJECTED


def _is_of_channel(reply: Reply, stage: Stage, cause: Cause) -> bool:
    """Whether no other mail would fare better now. See the module."""
    if stage in (Stage.HANDSHAKE, Stage.LOG_IN):
        return True
    if stage is Stage.MAIL and cause in (Cause.CREDENTIALS, Cause.TLS):
        return True
    if reply.code != 421 or stage is Stage.CONTENT:
        return False
    return not _ABOUT_THE_MAIL.fullmatch(reply.enhanced_code)


def _cause(reply: Reply, stage: Stage) -> Cause:
    if reply.code < 400:
        return Cause.PROVIDER
    if stage is Stage.LOG_IN:
        return Cause.CREDENTIALS if reply.code >= 500 else Cause.PROVIDER
    if reply.code in _LOG_IN_CODES:
        return Cause.TLS if "STARTTLS" in reply.text.upper() else Cause.CREDENTIALS
    return (
        _cause_by_enhanced_code(reply, stage)
        or _BY_CODE.get((reply.code, stage))
        or _BY_CODE.get((reply.code, None))
        or Cause.PROVIDER
    )


def _cause_by_enhanced_code(reply: Reply, stage: Stage) -> Cause | None:
    if not reply.enhanced_code:
        return None
    _class, subject, detail = map(int, reply.enhanced_code.split("."))
    cause = _BY_ENHANCED.get((subject, detail)) or _BY_ENHANCED.get((subject, None))
    if reply.code < 500 and (cause is Cause.POLICY or (subject, detail) in ((2, 0), (2, 1))):
        return Cause.RATE_LIMITED
    if cause is Cause.POLICY and stage is Stage.MAIL:
        return Cause.SENDER
    return cause
