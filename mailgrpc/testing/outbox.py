"""What the gateway sent: where it arrives, and a test's view of it."""

from __future__ import annotations

import email
import email.policy
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.message import EmailMessage
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Self

from mailgrpc.core.message import Attachment

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
    """All that was sent lately, as the gateway's process hands it over at `path`.

    Each mail is confirmed once it lies here: the gateway says SENT no sooner.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed = threading.Condition()
        self.mails: deque[SentMail] = deque(maxlen=_KEPT)
        self._listener = Listener(str(path), family="AF_UNIX")

    def __enter__(self) -> Self:
        threading.Thread(target=self._receive, name="mailgrpc-outbox", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _receive(self) -> None:
        try:
            with self._listener.accept() as gateway:
                while True:
                    mail = pickle.loads(gateway.recv_bytes())  # noqa: S301  our own child's
                    with self.changed:
                        self.mails.append(mail)
                        self.changed.notify_all()
                    gateway.send_bytes(b"")
        except (EOFError, OSError):  # the gateway has ended
            return


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
