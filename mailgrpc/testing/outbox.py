"""What the gateway sent: the provider that keeps it, and a test's view of it."""

from __future__ import annotations

import email
import email.policy
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.message import EmailMessage

from mailgrpc.core import ids
from mailgrpc.core.delivery import Result, Role
from mailgrpc.core.event import created_at_of
from mailgrpc.core.message import Attachment
from mailgrpc.providers.capture import Captured, CaptureProvider
from mailgrpc.providers.provider import SendCall

DEFAULT_TIMEOUT_S = 10.0
_KEPT = 10_000


@dataclass(frozen=True, slots=True)
class SentMail:
    """One mail as it left, to those recipients that this sending reached.

    Addresses are bare. A message to several recipients is one mail, or several where some of them
    were tried again later.
    """

    message_id: str
    created_at: datetime  # when it was enqueued, to the millisecond
    sender: str
    to: tuple[str, ...]
    cc: tuple[str, ...]
    bcc: tuple[str, ...]
    subject: str
    text: str
    html: str
    attachments: tuple[Attachment, ...]  # with filename, data, content_type, content_id
    tags: tuple[str, ...]
    categories: tuple[str, ...]
    custom_args: Mapping[str, str]
    correlation_id: str
    raw: bytes

    @property
    def recipients(self) -> tuple[str, ...]:
        """All that it went to."""
        return self.to + self.cc + self.bcc

    @property
    def parsed(self) -> EmailMessage:
        """`raw` as the standard library reads it, for headers and MIME structure."""
        parsed = email.message_from_bytes(self.raw, policy=email.policy.default)
        assert isinstance(parsed, EmailMessage)
        return parsed


class Tray:
    """All that was sent lately. Filled by the gateway's thread, read by the tests'."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.mails: deque[SentMail] = deque(maxlen=_KEPT)

    def add(self, captured: Captured) -> None:
        """Put a mail in and tell whoever waits."""
        mail = _sent_mail(captured)
        with self.changed:
            self.mails.append(mail)
            self.changed.notify_all()


class TrayProvider(CaptureProvider):
    """The provider `capture`, which also tells of every mail as it is sent."""

    def __init__(self, tray: Tray) -> None:
        super().__init__(keep=1)
        self._tray = tray

    async def send(self, call: SendCall) -> list[Result]:
        """Keep it, and tell."""
        self.outbox.clear()
        results = await super().send(call)
        for captured in self.outbox:
            self._tray.add(captured)
        return results


class Outbox:
    """The mails that were enqueued since the outbox was made, the first sent first.

    Mail of earlier tests that comes late, such as a retry, is not in it.
    """

    def __init__(self, tray: Tray, since: datetime, settle: Callable[[float], None]) -> None:
        self._tray = tray
        self._since = since
        self._settle = settle

    @property
    def mails(self) -> list[SentMail]:
        """What was sent by now."""
        with self._tray.changed:
            return self._mails()

    def wait_for(self, count: int = 1, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[SentMail]:
        """Wait until at least `count` mails were sent, and return all. Blocks.

        Raises AssertionError after the time-out, with what was sent.
        """
        with self._tray.changed:
            enough = self._tray.changed.wait_for(lambda: len(self._mails()) >= count, timeout_s)
            mails = self._mails()
        if not enough:
            sent = "".join(
                f"\n  {mail.subject!r} to {', '.join(mail.recipients)}" for mail in mails
            )
            raise AssertionError(
                f"{count} mails were expected within {timeout_s:g} s, {len(mails)} were sent{sent}"
            )
        return mails

    def settle(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Wait until nothing that was enqueued is about to be sent. Blocks.

        What is not due yet (a `send_at`, a retry after a wait) is left waiting. To be called before
        asserting that something was not sent. Raises AssertionError after the time-out.
        """
        self._settle(timeout_s)

    def __len__(self) -> int:
        return len(self.mails)

    def __iter__(self) -> Iterator[SentMail]:
        return iter(self.mails)

    def __getitem__(self, index: int) -> SentMail:
        return self.mails[index]

    def _mails(self) -> list[SentMail]:
        return [mail for mail in self._tray.mails if mail.created_at >= self._since]


def _sent_mail(captured: Captured) -> SentMail:
    call, message = captured.call, captured.call.message

    def reached(role: Role) -> tuple[str, ...]:
        return tuple(r.address for r in captured.recipients if r.role is role)

    return SentMail(
        message_id=ids.to_text(ids.MESSAGE, call.message_id),
        created_at=created_at_of(call.message_id),
        sender=message.sender.address if message.sender else "",
        to=reached(Role.TO),
        cc=reached(Role.CC),
        bcc=reached(Role.BCC),
        subject=message.subject,
        text=message.text,
        html=message.html,
        attachments=message.attachments,
        tags=message.tags,
        categories=message.categories,
        custom_args=message.custom_args,
        correlation_id=message.correlation_id,
        raw=captured.raw,
    )
